"""How many new connections a second does the firewall open, beside the kernel's?"""

from experiments.harness.spec import Experiment

OURS = {"topology": ("back_to_back",), "nf": ("firewall",), "placement": ("local", "integrated")}
KERNEL = {**OURS, "placement": ("nftables",)}

EXPERIMENT = Experiment(
    question="How many TCP connections a second open without a failed handshake, and how many when saturated?",
    procedure="connection_rate",
    sweeps=(OURS, KERNEL),
    seed=1,
    profiles={
        "smoke": {
            "sweeps": ({**OURS, "placement": ("integrated",)},),
            "settings": {"ladder_kops": (20,), "search_steps": 3, "search_seconds": 0.2, "seconds": 0.2, "warmup_seconds": 0.1},
        },
        "quick": {"settings": {"ladder_kops": (50, 150), "warmup_seconds": 0.2}},
        "paper": {
            "repeats": 5,
            "settings": {"seconds": 2.0, "search_seconds": 2.0, "search_steps": 9, "capacity": 1 << 23,
                         "ladder_kops": (25, 50, 75, 100, 150, 200, 300)},
        },
    },
)  # fmt: skip
