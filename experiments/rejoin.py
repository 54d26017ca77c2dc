"""What does it cost the packets when a host comes back and is filled with 100,000 records?"""

from experiments.harness.spec import Experiment

GRID = {"topology": ("rack",), "nf": ("traffic_counter", "firewall"), "placement": ("integrated",), "replicas": (2,)}
OF_THREE = {**GRID, "replicas": (3,), "nf_hosts": (3,), "settings": {"offered_kpps": 40.0}}
"""Two survivors fill the third at the same time; with three copies of every write a small box carries less."""

EXPERIMENT = Experiment(
    question="How long until a host that comes back is a backup again, what bounds it, and what do packets lose by it?",
    procedure="rejoin",
    sweeps=(GRID, OF_THREE),
    traffic={"flows": 100_000, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {"sweeps": ({**GRID, "nf": ("traffic_counter",)},), "traffic": {"flows": 10_000}},
        "quick": {"sweeps": ({**GRID, "nf": ("traffic_counter",)}, {**OF_THREE, "nf": ("traffic_counter",)})},
        "paper": {"repeats": 5},
    },
)  # fmt: skip
