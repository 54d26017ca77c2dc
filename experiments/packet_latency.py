"""What does it cost a packet in latency to have its state elsewhere?"""

from experiments.harness.spec import Experiment

PLACEMENTS = ("local", "integrated", "integrated:hashed", "centralized")
STATEFUL = {"topology": ("rack",), "nf": ("firewall", "traffic_counter"), "placement": PLACEMENTS}
STATELESS = {"topology": ("rack",), "nf": ("passthrough",), "placement": ("local",)}
"""The floor: without state, every placement is the same."""
CHAINED = {"topology": ("rack",), "nf": ("firewall+nat", "firewall|nat"), "placement": ("integrated",)}
"""Two functions in one process on each of two NF hosts, and each on a host of its own."""

EXPERIMENT = Experiment(
    question="How long does a packet take through the rack when its state is local, beside the NF, or on a store host?",
    procedure="packet_latency",
    sweeps=(STATEFUL, STATELESS),
    settings={"offered_kpps": 10.0, "seconds": 1.5},
    traffic={"flows": 1000, "frame_bytes": 128, "arrivals": "poisson"},
    seed=1,
    profiles={
        "smoke": {
            "sweeps": ({**STATEFUL, "nf": ("traffic_counter",), "placement": ("integrated", "centralized")},),
            "settings": {"seconds": 0.5},
        },
        "quick": {"settings": {"seconds": 1.0}},  # 10,000 packets
        "paper": {
            "sweeps": (STATEFUL, STATELESS, CHAINED),
            "repeats": 5,
            "settings": {"seconds": 10.0},
            "traffic": {"flows": 10_000},
        },
    },
)
