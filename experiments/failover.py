"""What does the loss of an NF host cost under each placement?"""

from experiments.harness.spec import Experiment

GRID = {"topology": ("rack",), "nf": ("nat", "traffic_counter")}
STAND_IN = {**GRID, "placement": ("local", "centralized")}
"""Who has no coordinator: the procedure stands in for it."""
COORDINATED = {**GRID, "placement": ("integrated",), "replicas": (1, 2), "settings": {"coordinated": True}}
"""Of our own coordinator, also without replicas: what is lost is then refused, not made up."""
PEERS = {"topology": ("rack",), "nf": ("nat",), "placement": ("nftables",)}
NAT = {"nf": ("nat",)}

EXPERIMENT = Experiment(
    question="For how long is nothing delivered when an NF host is lost, what is lost with it, and which connections break?",
    procedure="failover",
    sweeps=(STAND_IN, COORDINATED, PEERS),
    settings={"functions": {"nat": {"external_addresses": "10.64.0.0/31"}}},
    traffic={"flows": 1000, "client_ports": 256, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {
            "sweeps": ({**STAND_IN, **NAT, "placement": ("local",)}, {**COORDINATED, **NAT, "replicas": (2,)}),
            "settings": {"seconds": 1.6},
        },
        "quick": {"sweeps": ({**STAND_IN, **NAT}, {**COORDINATED, **NAT, "replicas": (1,)},
                             {**COORDINATED, **NAT, "replicas": (2,), "repeats": 3}, PEERS)},
        "paper": {
            "sweeps": ({**STAND_IN, "repeats": 20}, {**COORDINATED, "replicas": (1, 3), "repeats": 20},
                       {**COORDINATED, "replicas": (2,), "repeats": 50}, {**PEERS, "repeats": 20}),
            "network": {"nf_hosts": 3},
        },
    },
)  # fmt: skip
