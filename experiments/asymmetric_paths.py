"""Which placements still open connections when answers come back by another instance?"""

from experiments.harness.spec import Experiment

GRID = {"topology": ("rack",), "nf": ("firewall",), "placement": ("local", "integrated", "integrated:hashed", "centralized")}

EXPERIMENT = Experiment(
    question="How many TCP handshakes succeed, and how long do they take, when the answers come back by another NF host?",
    procedure="handshakes",
    sweeps=(GRID,),
    settings={"rate_per_s": 500.0, "seconds": 0.7},
    seed=1,
    profiles={
        "smoke": {"sweeps": ({**GRID, "placement": ("integrated",)},), "settings": {"seconds": 0.4}},
        "quick": {"settings": {"seconds": 0.4, "timeout_s": 0.5}},  # 200 handshakes each way
        "paper": {"repeats": 5, "settings": {"seconds": 10.0}},
    },
)
