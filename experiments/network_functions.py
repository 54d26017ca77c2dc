"""What does each network function cost, alone and in a chain, beside one that does nothing and beside the kernel's?"""

from experiments.harness.spec import Experiment
from nfs.dataplane import declaration

ALL = tuple(declaration.names())
PATH = {"topology": ("back_to_back",), "placement": ("local",)}
OURS = {**PATH, "nf": ALL}
CHAIN = {**PATH, "chain": ("firewall", "nat", "traffic_counter")}
KERNEL = {"topology": ("back_to_back",), "nf": ("firewall", "nat"), "placement": ("nftables",)}
GROWTH = {**PATH, "nf": ("firewall", "nat"), "flows": (1_000, 100_000)}

EXPERIMENT = Experiment(
    question="How many packets a second does each network function forward on one core, and how many the kernel in its place?",
    procedure="throughput",
    sweeps=(OURS, CHAIN, KERNEL, GROWTH, {**KERNEL, "flows": (1_000, 100_000)}),
    settings={"saturate": True, "ladder_kpps": (), "search_steps": 0, "seconds": 0.5, "warmup_kpps": 100.0, "capacity": 1 << 19},
    traffic={"flows": 10_000, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {"sweeps": (CHAIN,), "settings": {"seconds": 0.3}},
        "quick": {"sweeps": (OURS, CHAIN, KERNEL)},
        "paper": {"repeats": 5, "settings": {"seconds": 5.0, "search_steps": 9, "search_high_kpps": 1600.0}},
    },
)
