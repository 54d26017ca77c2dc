"""What does it cost an NF to reach its state: beside it in the integrated store, or over the network in a central one?"""

from experiments.harness.spec import Experiment

ACCESS = {"topology": ("rack",), "nf": ("traffic_counter",), "placement": ("integrated", "centralized")}
REDIS = {"topology": ("rack",), "placement": ("redis",)}
DIRECT = {"topology": ("back_to_back",), "placement": ("centralized", "redis"), "settings": {"operations": ()}}

EXPERIMENT = Experiment(
    question="How long does one read, one write and one read-modify-write of the state take, beside the NF and across the rack?",
    procedure="state_access",
    sweeps=(ACCESS, REDIS, DIRECT),
    traffic={"flows": 1000, "frame_bytes": 128, "arrivals": "poisson"},
    seed=1,
    profiles={
        "smoke": {"settings": {"count_here": 50_000, "count_there": 1000, "pipeline_count": 32_000, "keys": 2000}},
        "quick": {
            "sweeps": (ACCESS, REDIS, {**DIRECT, "repeats": 2})
        },  # a latency is of thousands of accesses, a rate of one run
        "paper": {"repeats": 5, "settings": {"count_here": 2_000_000, "count_there": 20_000, "pipeline_count": 6_400_000}},
    },
)
