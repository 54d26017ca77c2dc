"""What does each network function cost, alone and in a chain, beside one that does nothing and beside the kernel's?"""

from experiments.harness.spec import Experiment
from nfs.dataplane import declaration

BALANCER = "load_balancer"
POOL = [f"10.128.0.{number}" for number in range(2, 6)]
BALANCED = {"functions": {BALANCER: {"virtual_address": "10.128.0.1", "backends": POOL}}}
"""The virtual address is the one the generator sends to."""
ALL = tuple(name for name in declaration.names() if name != BALANCER)
PATH = {"topology": ("back_to_back",), "placement": ("local",)}
OURS = {**PATH, "nf": ALL}
OUR_BALANCER = {**PATH, "nf": (BALANCER,), "settings": BALANCED}
CHAIN = {**PATH, "chain": ("firewall", "nat", "traffic_counter")}
KERNEL = {"topology": ("back_to_back",), "nf": ("firewall", "nat"), "placement": ("nftables",)}
KERNEL_BALANCER = {**KERNEL, "nf": (BALANCER,), "settings": BALANCED}
GROWTH = {**PATH, "nf": ("firewall", "nat"), "flows": (1_000, 100_000)}

EXPERIMENT = Experiment(
    question="How many packets a second does each network function forward on one core, and how many the kernel in its place?",
    procedure="throughput",
    sweeps=(OURS, OUR_BALANCER, CHAIN, KERNEL, KERNEL_BALANCER, GROWTH, {**KERNEL, "flows": (1_000, 100_000)}),
    settings={"saturate": True, "ladder_kpps": (), "search_steps": 0, "seconds": 0.5, "warmup_kpps": 100.0, "capacity": 1 << 19},
    traffic={"flows": 10_000, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {"sweeps": (CHAIN,), "settings": {"seconds": 0.3}},
        "quick": {"sweeps": (OURS, OUR_BALANCER, CHAIN, KERNEL, KERNEL_BALANCER)},
        "paper": {"repeats": 5, "settings": {"seconds": 5.0, "search_steps": 9, "search_high_kpps": 1600.0}},
    },
)
