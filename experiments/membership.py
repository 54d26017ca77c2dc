"""Is a live host ever taken for dead?"""

from experiments.harness.spec import Experiment

RACK = {"topology": ("rack",), "nf": ("traffic_counter",), "placement": ("integrated",), "replicas": (2,)}

EXPERIMENT = Experiment(
    question="Is a live host ever taken for dead, on an idle box and beside busy processes?",
    procedure="membership",
    sweeps=({**RACK, "busy_processes": (0, 2)},),
    traffic={"flows": 1000, "frame_bytes": 64},
    seed=1,
    profiles={
        "smoke": {"sweeps": ({**RACK, "busy_processes": (2,)},), "settings": {"seconds": 1.0}},
        "quick": {"settings": {"seconds": 3.0}},
        "paper": {"repeats": 300},
    },
)
