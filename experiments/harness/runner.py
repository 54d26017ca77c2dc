"""How experiments become results: trials in shuffled order, each in a fresh emulation, each on disk as soon as it ends.

A trial that fails is recorded as invalid with its reason, and the run goes on; at the end it is tried once more, since on a
shared machine the reason is often a neighbour. Both are kept, and the invalid one is counted.

An interrupted run is resumed by its id: what
has a line in trials.jsonl is not repeated.
"""

from __future__ import annotations

import datetime
import importlib
import random
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datastore.base.errors import NearstateError, unknown
from experiments.harness import doctor, spec
from experiments.harness.bench import Bench, network_parameters, settings
from experiments.harness.progress import Progress
from experiments.harness.record import Record, commit
from experiments.harness.spec import Experiment, Trial
from topologies.emulation import recorder
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher, LauncherSilent

ATTEMPTS = 2
"""How often a trial that turns out invalid is run."""
LOADING_S, COMPILING_S = 20.0, 900.0
PRELOAD = ("experiments.harness.preload",)


def select(names: Sequence[str], profile: str) -> dict[str, Experiment]:
    """Return the experiments asked for (all for none), as the profile runs them; everything is checked here."""
    if profile not in spec.PROFILES:
        raise unknown("profile", profile, spec.PROFILES)
    return {name: spec.load(name).for_profile(profile) for name in (names or spec.experiment_names())}


def new_record(experiments: dict[str, Experiment], profile: str, pcap: bool) -> Record:
    """Make the folder of a new run, with what was asked and what this box is."""
    asked = {name: asdict(experiment) for name, experiment in experiments.items()}
    facts = doctor.host_facts()
    return Record.create({"profile": profile, "pcap": pcap, "experiments": asked, **commit()}, facts)


def run(names: Sequence[str], profile: str = "quick", resume: str | None = None, pcap: bool = False) -> Record:
    """Run experiments, or go on with run `resume`; returns its record. Raises NearstateError before anything starts.

    pcap: record every trial at each host interface; a resumed run goes on as it began.
    """
    if resume:
        record = Record.open(resume)
        profile = record.spec["profile"]
        for note in record.notes:
            print(f"{record.run_id}: {note}; its trial is run again", flush=True)
        if pcap and not record.spec.get("pcap"):
            raise NearstateError(f"--pcap: run {record.run_id} began without recording and goes on so; start a new run with it")
        pcap = record.spec.get("pcap", False)
        names = sorted(record.spec["experiments"])
    experiments = select(names, profile)
    doctor.require()  # after the names: a wrong one is told to anybody, root or not
    if pcap:
        recorder.require()
    record = record if resume else new_record(experiments, profile, pcap)
    trials = planned(experiments, pcap)
    finished = record.validity()
    open_trials = [again for trial in trials if (again := next_attempt(trial, finished))]
    for line in dict.fromkeys(line for experiment in experiments.values() for line in spec.replays(experiment)):
        print(line, flush=True)
    random.Random(min(trial.seed for trial in trials)).shuffle(open_trials)
    with Progress(f"run {record.run_id}, profile {profile}", len(trials), len(trials) - len(open_trials)) as progress:
        run_trials(record, experiments, open_trials, progress)
    return record


def planned(experiments: Mapping[str, Experiment], pcap: bool) -> list[Trial]:
    """Return every trial of a run; recorded ones say so in their sweep, so that no median mixes them with others."""
    swept = {"recorded": True} if pcap else {}
    return [replace(trial, sweep={**trial.sweep, **swept}) for name, experiment in experiments.items()
            for trial in spec.trials(name, experiment)]  # fmt: skip


def next_attempt(trial: Trial, finished: Mapping[str, bool]) -> Trial | None:
    """Return the trial as it is to be run next, None when it was valid or has been tried often enough."""
    for attempt in range(ATTEMPTS):
        candidate = replace(trial, attempt=attempt)
        if candidate.name not in finished:
            return candidate
        if finished[candidate.name]:
            return None
    return None


def run_trials(record: Record, experiments: dict[str, Experiment], trials: Sequence[Trial], progress: Progress) -> None:
    """Run trials one after the other and record each."""
    if not trials:
        return
    with Journal(record.run_id) as journal, Launcher(journal, record.folder / "logs", PRELOAD) as launcher:
        wait_for(launcher)
        waiting = deque(trials)
        while waiting:
            trial = waiting.popleft()
            progress.start(trial.name)
            result = run_trial(trial, experiments[trial.experiment], journal, launcher, record.folder / "pcap")
            record.append(result)
            again = next_attempt(trial, record.validity())
            waiting.extend([again] if again else [])
            progress.end(trial.name, result["seconds"], result["invalid_reasons"], bool(again))


def wait_for(launcher: Launcher) -> None:
    """Wait until the launcher has loaded what is compiled, which takes seconds; what has changed it compiles first, and that is
    told: it takes minutes, once."""
    try:
        launcher.wait_ready(LOADING_S)
    except LauncherSilent:
        print(f"compiling what has changed since it was compiled last; this may take {COMPILING_S / 60:.0f} minutes", flush=True)
        launcher.wait_ready(COMPILING_S)


def run_trial(trial: Trial, experiment: Experiment, journal: Journal, launcher: Launcher, pcap: Path) -> dict[str, Any]:
    """Run one trial in a fresh emulation and return its line for trials.jsonl; a failure is a line too, not an exception.

    pcap: the folder where a trial with the setting `recorded` gets a folder of its own.
    """
    procedure: Callable[[Bench], list[dict[str, Any]]] = importlib.import_module(
        f"experiments.harness.procedures.{experiment.procedure}"
    ).measure
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
    line: dict[str, Any] = {
        "trial": trial.name, "experiment": trial.experiment, "topology": trial.topology, "placement": trial.placement,
        "nf": trial.nf, "replicas": trial.replicas, "sweep": dict(trial.sweep), "repeat": trial.repeat, "seed": trial.seed,
        "started": started.isoformat(timespec="milliseconds"), "points": [], "fidelity": {}, "calibration": {},
        "ledger": {}, "network": {}, "invalid_reasons": []}  # fmt: skip
    recorded = settings(trial, experiment)["recorded"]
    network = Network(trial.topology, network_parameters(trial, experiment), journal.run_id, launcher, journal, recorded)
    bench = Bench(trial, experiment, network, launcher)
    recording = recorder.Recorder(network, pcap / trial.name.replace("/", "_"))
    try:
        network.start()
        calibration = network.calibrate()
        line["fidelity"]["up_s"] = time.monotonic() - clock
        line["calibration"] = calibration.to_json()
        line["invalid_reasons"] += list(calibration.reasons)
        if recorded:
            recording.start()
        line["points"] = procedure(bench)
        line["network"] = network.describe()
    except NearstateError as error:
        line["invalid_reasons"].append(str(error))
    except Exception as error:  # a bug costs its trial, not the hours of the others; the traceback is kept
        with (launcher.logs / "errors.log").open("a") as log:
            traceback.print_exc(file=log)
        line["invalid_reasons"].append(f"internal error: {type(error).__name__}: {error}; see logs/errors.log")
    finally:
        down = time.monotonic()
        line["fidelity"] |= steadiness(bench)
        if recorded:
            line["recorded"] = recording.stop()
        bench.stop()
        network.stop()
        line["fidelity"]["down_s"] = time.monotonic() - down
    line["seconds"] = time.monotonic() - clock
    summarise(line)
    return line


def steadiness(bench: Bench) -> dict[str, Any]:
    """Return the trial's false failovers: the system's fault, not the machine's. Counted also where the procedure gave up."""
    try:
        return {"false_failovers": len(bench.false_failovers())} if bench.coordinator else {}
    except NearstateError:  # the coordinator itself is lost
        return {}


def summarise(line: dict[str, Any]) -> None:
    """Put the points' worst fidelity and their summed ledger on the trial's line, and decide whether it is valid."""
    points = line["points"]
    for key in ("generator_lateness_p99_us", "cpu_saturation", "false_failovers"):
        found = [each["fidelity"].get(key) for each in (line, *points) if "fidelity" in each]  # counted from the trial's start on
        if values := [value for value in found if value is not None]:
            line["fidelity"][key] = max(values)
    totals: dict[str, Any] = {}
    for point in points:
        _add(totals, point.get("ledger", {}))
    line["ledger"] = totals
    if points and not any(point["valid"] for point in points):
        line["invalid_reasons"] += [reason for point in points for reason in point["invalid_reasons"]][:3]
    line["valid"] = not line["invalid_reasons"]


def _add(totals: dict[str, Any], counts: dict[str, Any]) -> None:
    for key, count in counts.items():
        if isinstance(count, dict):
            _add(totals.setdefault(key, {}), count)
        else:
            totals[key] = totals.get(key, 0) + count
