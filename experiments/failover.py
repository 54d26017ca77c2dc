"""What does the loss of an NF host cost under each placement?"""

from experiments.harness.spec import Experiment

OUTSIDE = {"functions": {"nat": {"external_addresses": "10.64.0.0/31"}}}
"""Two addresses for all clients: several of them want the same port."""
NAT = {"topology": ("rack",), "nf": ("nat",), "settings": OUTSIDE}
COUNTER = {"topology": ("rack",), "nf": ("traffic_counter",)}
STAND_IN = {"placement": ("local", "centralized")}
"""Who has no coordinator: the procedure stands in for it."""
COORDINATED = {"placement": ("integrated",), "settings": {"coordinated": True}}
"""Our own, also without replicas: what is lost is then refused, not made up."""
COORDINATED_NAT = {**NAT, **COORDINATED, "settings": {**OUTSIDE, "coordinated": True}}
COORDINATED_COUNTER = {**COUNTER, **COORDINATED}
ASYNCHRONOUS = {**COORDINATED_COUNTER, "replicas": (2,), "asynchronous": (True,)}
"""What is lost of the state when packets do not wait until it is copied: every packet counts."""
PARTS = {**COORDINATED_NAT, "replicas": (2,), "lost": ("function", "store", "link")}
"""What may be lost of a host instead of all of it."""
PEERS = {**NAT, "placement": ("nftables", "conntrackd")}

EXPERIMENT = Experiment(
    question="For how long is nothing delivered when an NF host is lost, what is lost with it, and which connections break?",
    procedure="failover",
    sweeps=({**NAT, **STAND_IN}, {**COUNTER, **STAND_IN}, {**COORDINATED_NAT, "replicas": (1, 2)},
            {**COORDINATED_COUNTER, "replicas": (1, 2)}, ASYNCHRONOUS, PARTS, PEERS),
    traffic={"flows": 1000, "client_ports": 256, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {
            "sweeps": ({**NAT, "placement": ("local",)}, {**COORDINATED_NAT, "replicas": (2,)}),
            "settings": {"seconds": 1.6},
        },
        "quick": {"sweeps": ({**NAT, **STAND_IN}, {**COORDINATED_NAT, "replicas": (1,)},
                             {**COORDINATED_NAT, "replicas": (2,), "repeats": 2},
                             {**COORDINATED_COUNTER, "replicas": (2,)}, ASYNCHRONOUS, PARTS, PEERS)},
        "paper": {  # 100 kills of two replicas
            "sweeps": ({**NAT, **STAND_IN, "repeats": 20}, {**COUNTER, **STAND_IN, "repeats": 20},
                       {**COORDINATED_NAT, "replicas": (1, 3), "repeats": 20},
                       {**COORDINATED_NAT, "replicas": (2,), "repeats": 50},
                       {**COORDINATED_COUNTER, "replicas": (1, 3), "repeats": 20},
                       {**COORDINATED_COUNTER, "replicas": (2,), "repeats": 50}, {**ASYNCHRONOUS, "repeats": 20},
                       {**PARTS, "repeats": 20},
                       {**PEERS, "nf_hosts": (2,), "repeats": 20}),
            "network": {"nf_hosts": 3},
        },
    },
)  # fmt: skip
