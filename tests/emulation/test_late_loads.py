"""Is all compiled code that stores and NF processes call loaded before they are forked?

Loading a function takes 10 ms, and more on a busy box. A store that loaded seven when the first map came was replaced for its
silence.
"""

from __future__ import annotations

import os

import pytest

from experiments.harness import spec
from experiments.harness.bench import Bench
from experiments.harness.spec import Experiment
from tests.rack import working_rack
from topologies.emulation.journal import Journal
from topologies.emulation.processes import Launcher

RACK = Experiment(
    question="What is loaded when maps change?",
    procedure="packet_latency",
    sweeps=({"nf": ("nat",), "placement": ("integrated",), "replicas": (2,)},),
    settings={"functions": {"nat": {"external_addresses": "10.64.0.0/31"}}},
    traffic={"flows": 100},
)


def late(bench: Bench) -> list[str]:
    logs = [process.log for process in (*bench.stores.values(), *bench.functions.values())]
    return [f"{log.stem}: {line}" for log in logs for line in log.read_text().splitlines() if line.startswith("loaded late")]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it builds the emulated rack")
def test_no_process_loads_code_while_maps_change(tmp_path_factory: pytest.TempPathFactory) -> None:
    trial = next(spec.trials("late", RACK))
    logs, preload = tmp_path_factory.mktemp("logs"), ("experiments.harness.preload", "tests.late_loads")
    with (
        Journal(f"test-late-{os.getpid()}") as journal,
        Launcher(journal, logs, preload) as launcher,
        working_rack((journal, launcher), trial, RACK) as (bench, _),
    ):
        half = [p for p, host in enumerate(bench.network.steering()) if host == "nf1"]
        bench.move(half, "nf2")
        bench.move(half, "nf1")
        bench.lose("store", "nf2")
        bench.restart_store("nf2")
        bench.wait_full()
        assert late(bench) == []
        bench.function_statistics()
        assert late(bench) == []
