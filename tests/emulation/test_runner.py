"""The main job as a user has it: killed in the middle, cleaned, resumed; nothing left, nothing lost, nothing twice."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.harness.record import RESULTS, point_latest
from topologies.emulation.journal import clean, folder, processes_of, short_id
from topologies.emulation.processes import ROOT

COMMAND = [sys.executable, "-m", "experiments", "run"]
RUN_S = 120.0


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=RUN_S, check=False)


def left_of(run_id: str) -> list[str]:
    """Return what of a run is still there."""
    found = [f"process {pid}" for pid in processes_of(run_id)]
    found += [str(path) for path in Path("/dev/shm").glob(f"*{run_id}*")]
    found += [str(path) for path in Path("/sys/class/net").glob(f"ns{short_id(run_id)}*")]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/nearstate-{short_id(run_id)}*")]
    return found + [str(path) for path in folder().glob(f"{run_id}*")]


def trial_names(run_folder: Path) -> list[str]:
    return [json.loads(line)["trial"] for line in (run_folder / "trials.jsonl").read_text().splitlines() if line.endswith("}")]


@pytest.fixture
def killed_run() -> Iterator[Path]:
    """A smoke run killed by SIGKILL in its second trial; its results are removed afterwards."""
    before = (RESULTS / "latest").resolve() if (RESULTS / "latest").exists() else None
    process = subprocess.Popen([*COMMAND, "--profile", "smoke", "packet_latency"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().split()[1].rstrip(",")
    run_folder = RESULTS / run_id
    deadline = time.monotonic() + RUN_S
    while not trial_names(run_folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(random.uniform(0.1, 2.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    yield run_folder
    clean(run_id)
    shutil.rmtree(run_folder, ignore_errors=True)
    (RESULTS / "latest").unlink(missing_ok=True)
    if before is not None and before.exists():
        point_latest(before)


def test_a_killed_run_is_cleaned_and_resumed(killed_run: Path) -> None:
    finished = trial_names(killed_run)
    clean(killed_run.name)
    assert left_of(killed_run.name) == []
    resumed = run("--resume", killed_run.name)
    trials = [json.loads(line) for line in (killed_run / "trials.jsonl").read_text().splitlines()]
    expected = 0 if any(trial["valid"] for trial in trials) else 1  # docs/results.md: a run without any valid trial
    assert resumed.returncode == expected, resumed.stdout + resumed.stderr
    names = trial_names(killed_run)
    assert names[: len(finished)] == finished
    assert len(names) == len(set(names))
    assert len([name for name in names if "/again" not in name]) == 2
    assert (killed_run / "report.html").stat().st_size < 2_000_000
    assert (killed_run / "summary.csv").read_text().startswith("experiment,topology,placement,nf,replicas,sweep,metric,unit")
    assert left_of(killed_run.name) == []


def test_wrong_names_are_refused_before_anything_starts() -> None:
    runs = set(RESULTS.glob("*"))
    for arguments, hint in ((["packet_latncy"], "packet_latency"), (["--profile", "quik"], "quick"), (["--resume", "x"], "run")):
        refused = run(*arguments)
        assert refused.returncode == 1
        assert len(refused.stderr.strip().splitlines()) == 1
        assert refused.stderr.startswith("error: unknown")
        assert hint in refused.stderr
    assert set(RESULTS.glob("*")) == runs


def test_the_shell_pings_all_hosts_that_share_a_network() -> None:
    """Interfaces of the packet loop have no address: a host is known by the first that it has."""
    shell = [sys.executable, "-m", "experiments", "shell", "--nf", "passthrough"]
    done = subprocess.run(shell, cwd=ROOT, input="pingall 1\nexit\n", capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "None" not in said
    reached = ("client -> X X X server", "server -> client X X X", "nf1 -> X control nf2 X", "control -> X nf1 nf2 X")
    for line in reached:
        assert line in said, said
