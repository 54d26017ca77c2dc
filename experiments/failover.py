"""What does the loss of an NF host cost under each placement?"""

from experiments.harness.spec import Experiment

GRID = {"topology": ("rack",), "nf": ("nat", "traffic_counter")}
OURS = {**GRID, "placement": ("local", "centralized", "integrated")}
PEERS = {"topology": ("rack",), "nf": ("nat",), "placement": ("nftables",)}

EXPERIMENT = Experiment(
    question="For how long is nothing delivered when an NF host is lost, what is lost with it, and which connections break?",
    procedure="failover",
    sweeps=(OURS, PEERS),
    traffic={"flows": 500, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {"sweeps": ({**OURS, "nf": ("nat",), "placement": ("local", "centralized")},), "settings": {"seconds": 1.6}},
        "quick": {"sweeps": ({**OURS, "nf": ("nat",)}, PEERS)},
        "paper": {"repeats": 20},
    },
)
