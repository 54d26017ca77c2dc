"""How much memory does the store take for its records?"""

from experiments.harness.spec import Experiment

EXPERIMENT = Experiment(
    question="How much memory does a store process take, and how much of it is records, as their number grows?",
    procedure="store_memory",
    sweeps=({"topology": ("back_to_back",), "placement": ("integrated",), "records": (10_000, 100_000, 1_000_000)},),
    seed=1,
    profiles={
        "smoke": {"sweeps": ({"topology": ("back_to_back",), "placement": ("integrated",), "records": (100_000,)},)},
        "paper": {
            "sweeps": (
                {
                    "topology": ("back_to_back",),
                    "placement": ("integrated",),
                    "records": (1_000, 10_000, 100_000, 1_000_000, 3_000_000),
                },
            )
        },
    },
)
