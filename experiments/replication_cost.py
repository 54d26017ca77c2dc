"""What does each copy of the state cost, where the state is local and where it is not?"""

from experiments.harness.spec import Experiment

GRID = {"topology": ("rack",), "nf": ("traffic_counter", "firewall"), "placement": ("integrated", "centralized")}
"""A write with every packet; and, once connections are open, hardly any."""
SYNCHRONOUS = {**GRID, "replicas": (1, 2)}
ASYNCHRONOUS = {**GRID, "nf": ("traffic_counter",), "replicas": (2,), "asynchronous": (True,)}

EXPERIMENT = Experiment(
    question="How much latency and throughput does each copy of the state cost, and how many bytes on the storage network?",
    procedure="replication_cost",
    sweeps=(SYNCHRONOUS, ASYNCHRONOUS),
    settings={"search_seconds": 0.3, "search_steps": 6},
    traffic={"flows": 1_000, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {"sweeps": ({**SYNCHRONOUS, "nf": ("traffic_counter",), "placement": ("integrated",)},),
                  "settings": {"search_steps": 3, "search_seconds": 0.2}},
        "quick": {"sweeps": ({**SYNCHRONOUS, "nf": ("traffic_counter",), "repeats": 2},
                             {**SYNCHRONOUS, "nf": ("firewall",), "placement": ("integrated",), "repeats": 2},
                             {**GRID, "nf": ("firewall",), "placement": ("centralized",), "repeats": 2},
                             {**ASYNCHRONOUS, "placement": ("integrated",)}),
                  "settings": {"search_steps": 5}},
        "paper": {"sweeps": ({**GRID, "replicas": (1, 2, 3)}, {**ASYNCHRONOUS, "replicas": (2, 3)}), "repeats": 5,
                  "network": {"nf_hosts": 3}, "settings": {"search_steps": 8, "search_seconds": 1.0, "seconds": 3.0}},
    },
)  # fmt: skip
