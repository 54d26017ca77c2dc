"""How many packets per second does each placement carry, and what does a packet cost in CPU?"""

from experiments.harness.spec import Experiment
from experiments.packet_latency import STATEFUL, STATELESS

DIRECT = {"settings": {"search_high_kpps": 1600.0, "saturate": True, "ladder_kpps": (200, 500), "warmup_kpps": 100.0}}
PATH = {"topology": ("back_to_back",), "nf": ("passthrough",), "placement": ("local",), **DIRECT}
BACK_TO_BACK = {
    "topology": ("back_to_back",),
    "nf": ("firewall", "traffic_counter"),
    "placement": ("local", "integrated", "centralized"),
    **DIRECT,
}
KERNEL = {"topology": ("back_to_back",), "nf": ("firewall",), "placement": ("nftables",), **DIRECT}

EXPERIMENT = Experiment(
    question="How much traffic does each placement carry without loss, and what CPU time does a packet cost on each host?",
    procedure="throughput",
    sweeps=(STATEFUL, STATELESS, PATH, BACK_TO_BACK, KERNEL),
    settings={"seconds": 0.4, "search_seconds": 0.3, "search_steps": 6},
    traffic={"flows": 10_000, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {
            "sweeps": (
                {**STATEFUL, "nf": ("traffic_counter",), "placement": ("integrated", "centralized")},
                {**BACK_TO_BACK, "nf": ("firewall",), "placement": ("local",)},
                KERNEL,
            ),
            "settings": {"ladder_kpps": (20, 80), "seconds": 0.3, "search_steps": 3, "search_seconds": 0.2},
        },
        "quick": {  # repeated where ratios are taken: one measurement of a rate moves by a fifth
            "sweeps": (
                {**STATEFUL, "nf": ("firewall",), "placement": ("integrated", "centralized")},
                {**STATEFUL, "nf": ("traffic_counter",), "placement": ("integrated", "centralized"), "repeats": 2},
                {**STATEFUL, "nf": ("traffic_counter",), "placement": ("local", "integrated:hashed")},
                STATELESS,
                {**PATH, "repeats": 3},
                {**BACK_TO_BACK, "nf": ("firewall",), "placement": ("local", "integrated"), "repeats": 3},
                {**BACK_TO_BACK, "nf": ("traffic_counter",), "placement": ("local", "integrated"), "repeats": 2},
                {**BACK_TO_BACK, "placement": ("centralized",)},
                {**KERNEL, "repeats": 3},
            ),
            "settings": {"ladder_kpps": (80, 160)},
        },
        "paper": {"repeats": 5, "settings": {"seconds": 5.0, "search_seconds": 5.0, "search_steps": 9}},
    },
)
