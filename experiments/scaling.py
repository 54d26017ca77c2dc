"""What do packets notice when a second NF host joins, and when it leaves again?"""

from experiments.harness.spec import Experiment

GRID = {"topology": ("rack",), "nf": ("nat", "traffic_counter"), "flows": (200, 2_000, 20_000)}
STEERED = {**GRID, "placement": ("local", "centralized")}
MOVED = {**GRID, "placement": ("integrated",), "replicas": (1, 2), "settings": {"coordinated": True}}
FEW = {"nf": ("traffic_counter",), "flows": (2_000,)}

EXPERIMENT = Experiment(
    question="What is lost, delayed or out of order while flows move to a host that joins, and back, and how long does it take?",
    procedure="scaling",
    sweeps=(STEERED, MOVED),
    traffic={"frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {"sweeps": ({**MOVED, **FEW, "replicas": (1,)},)},
        "quick": {"sweeps": ({**STEERED, **FEW, "placement": ("centralized",)},
                             {**MOVED, **FEW, "flows": (2_000, 20_000), "replicas": (2,)})},
        "paper": {"repeats": 5},
    },
)  # fmt: skip
