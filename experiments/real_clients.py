"""What do users of real programs notice of where the state is?"""

from experiments.harness.spec import Experiment
from experiments.packet_latency import STATEFUL, STATELESS

COMPARED = {**STATEFUL, "nf": ("firewall",), "placement": ("integrated", "centralized")}

EXPERIMENT = Experiment(
    question="What goodput, request rate and request latency do iperf3, curl and wrk get through the rack under each placement?",
    procedure="real_clients",
    sweeps=(STATEFUL, STATELESS),
    seed=1,
    profiles={
        "smoke": {
            "sweeps": ({**COMPARED, "placement": ("integrated",)},),
            "settings": {"workloads": ("download", "many_connections", "handshakes"), "downloads": 1},
        },
        "quick": {"sweeps": (COMPARED,), "settings": {"downloads": 2, "handshakes": 100}},
        "paper": {"repeats": 5, "settings": {"seconds": 10, "downloads": 20, "handshakes": 2000, "capacity": 1 << 19}},
    },
)
