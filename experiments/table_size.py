"""What does a packet's state cost in nanoseconds, and how does that grow with the table?"""

from experiments.harness.spec import Experiment

EXPERIMENT = Experiment(
    question="How many ns does keeping state add to a packet, from 1,000 to 1,000,000 flows, beside what a cache miss takes?",
    procedure="table_size",
    sweeps=({"topology": ("back_to_back",), "nf": ("firewall", "traffic_counter"), "placement": ("local",)},),
    seed=1,
    profiles={
        "smoke": {
            "sweeps": ({"topology": ("back_to_back",), "nf": ("firewall",), "placement": ("local",)},),
            "settings": {"flows": (1_000, 100_000), "packets": 50_000},
        },
        "paper": {
            "repeats": 5,
            "settings": {"flows": (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000), "packets": 1_000_000, "passes": 5},
        },
    },
)
