"""Who goes on serving when a store host is cut off from its peers, who refuses, and does anything diverge?"""

from experiments.harness.spec import Experiment

GRID = {"topology": ("rack",), "nf": ("traffic_counter",)}
INTEGRATED = {**GRID, "placement": ("integrated",), "replicas": (1, 2), "settings": {"coordinated": True}}
CENTRALIZED = {**GRID, "placement": ("centralized",), "replicas": (1, 2), "settings": {"coordinated": True}}

EXPERIMENT = Experiment(
    question="Who goes on serving when a store host is cut off from its peers, who refuses, and does anything diverge?",
    procedure="partition_from_peers",
    sweeps=(INTEGRATED, CENTRALIZED),
    traffic={"flows": 500, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {"sweeps": ({**INTEGRATED, "replicas": (2,)},)},
        "quick": {"sweeps": (INTEGRATED, {**CENTRALIZED, "replicas": (2,)})},
        "paper": {"sweeps": ({**INTEGRATED, "replicas": (1, 2, 3)}, {**CENTRALIZED, "replicas": (1, 2, 3)}), "repeats": 5,
                  "network": {"nf_hosts": 3}},
    },
)  # fmt: skip
