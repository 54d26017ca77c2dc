"""What an experiment is: data. A file of `experiments/` declares one; this module checks it completely before anything starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datastore import placements
from datastore.base.errors import NearstateError, import_file, unknown
from experiments.workloads import capture
from experiments.workloads.traffic import Traffic
from nfs.dataplane import declaration

PROFILES = ("smoke", "quick", "paper")
FOLDER = Path(__file__).resolve().parents[1]
DEFAULTS: Mapping[str, Any] = {"topology": "rack", "nf": "", "placement": "", "replicas": 1}
"""What a trial has where its grid does not say."""
GRID_KEYS = tuple(DEFAULTS)
"""Sweep keys with a meaning of their own; every other key is a parameter of the topology or a setting of the procedure."""
NOT_SWEPT = ("settings", "repeats", "chain")
"""What a grid says of its trials besides the values it sweeps."""
CHAIN = "+"
"""Joins network functions that run one after the other in one process: "firewall+nat" is what chain=("firewall", "nat") runs."""
OVER_HOSTS = "|"
"""Joins the stages of a chain, each on NF hosts of its own: "firewall|nat" has the switch carry packets from one to the next."""


@dataclass(frozen=True)
class Experiment:
    """One question and how it is answered.

    procedure: file of `experiments/harness/procedures/` that measures one trial. sweeps: grids, each {parameter: values};
    trials are the union of the grids' products; a grid's "settings" hold for its trials and are not swept, its "repeats"
    stand in place of the experiment's, its "chain" names network functions that run one after the other in one process, as
    "firewall+nat" in "nf" does; "firewall|nat" runs each on NF hosts of its own. settings: the procedure's parameters. traffic:
    the workload's. network: the topology's. A grid may sweep settings, and parameters of the topology ("nf_hosts"). profiles: for
    each profile what differs ("sweeps", "settings", "traffic", "network", "repeats"). seed: of shuffling and workload.
    """

    question: str
    procedure: str
    sweeps: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    traffic: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    repeats: int = 1
    seed: int = 1

    def for_profile(self, profile: str) -> Experiment:
        """Return the experiment as `profile` runs it. Raises NearstateError for a profile or an override that does not exist."""
        if profile not in PROFILES:
            raise unknown("profile", profile, PROFILES)
        changes: dict[str, Any] = {}
        for name, value in self.profiles.get(profile, {}).items():
            if name in ("settings", "traffic", "network"):
                if not isinstance(value, Mapping):
                    raise NearstateError(f"profile {profile!r}: {name}={value!r} is no mapping; give {{name: value}}")
                changes[name] = {**getattr(self, name), **value}
            elif name in ("sweeps", "repeats"):
                changes[name] = value
            else:
                raise unknown(f"key of profile {profile!r}", name, ("settings", "traffic", "network", "sweeps", "repeats"))
        return replace(self, **changes)


@dataclass(frozen=True)
class Trial:
    """One run of one combination: what `trials.jsonl` has a line for."""

    experiment: str
    topology: str
    nf: str
    placement: str
    replicas: int
    sweep: Mapping[str, Any]
    settings: Mapping[str, Any]
    repeat: int
    seed: int
    attempt: int = 0

    @property
    def name(self) -> str:
        """Unique within a run, and the same whenever the run is resumed."""
        rest = ",".join(f"{key}={value}" for key, value in sorted(self.sweep.items()))
        parts = [self.experiment, self.topology, self.placement, self.nf, f"r{self.replicas}", rest, str(self.repeat)]
        parts += [f"again{self.attempt}"] if self.attempt else []
        return "/".join(part for part in parts if part)


def experiment_names() -> list[str]:
    """Return the names of all experiments: the files of `experiments/`."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def procedure_names() -> list[str]:
    return _stems(FOLDER / "harness" / "procedures")


def peer_names() -> list[str]:
    """Return the systems that can stand in a placement's place: the files of `experiments/peers/`."""
    return _stems(FOLDER / "peers")


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> Experiment:
    """Return the experiment of file `experiments/<name>.py`, checked. Raises NearstateError."""
    if name not in experiment_names():
        raise unknown("experiment", name, experiment_names())
    found = getattr(import_file(f"experiments.{name}"), "EXPERIMENT", None)
    if not isinstance(found, Experiment):
        raise NearstateError(f"experiments/{name}.py declares no EXPERIMENT = Experiment(...)")
    for profile in found.profiles:
        if profile not in PROFILES:
            raise unknown(f"profile of experiment {name!r}", str(profile), PROFILES)
    for profile in PROFILES:
        check(name, found.for_profile(profile))
    return found


def check(name: str, experiment: Experiment) -> None:
    """Check everything that can be checked without starting anything. Raises NearstateError naming the wrong value."""
    from experiments.harness import checks

    _check_fields(name, experiment)
    if experiment.procedure not in procedure_names():
        raise unknown(f"procedure of experiment {name!r}", experiment.procedure, procedure_names())
    _check_grids(name, experiment.sweeps)
    for repeats in (experiment.repeats, *(grid.get("repeats", 1) for grid in experiment.sweeps)):
        check_setting(name, "repeats", repeats, 1)
        if repeats < 1:
            raise NearstateError(f"experiment {name!r}: repeats={repeats}; at least 1 is needed")
    check_traffic(name, experiment)
    defaults = import_file(f"experiments.harness.procedures.{experiment.procedure}").SETTINGS
    for key, value in experiment.settings.items():
        if key not in defaults:
            raise unknown(f"setting of experiment {name!r}", key, defaults)
        _check_value(name, key, value, defaults)
    for grid in experiment.sweeps:
        _check_keys(name, grid, defaults)
        _check_names(grid)
    checks.check_trials(name, experiment)


def _check_keys(name: str, grid: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that a grid sweeps what there is, and its values. defaults: the procedure's settings."""
    shaping = network_keys(grid)
    for key in (*grid, *grid.get("settings", ())):
        if key not in (*GRID_KEYS, *NOT_SWEPT, *shaping) and key not in defaults:
            raise unknown(f"sweep parameter of experiment {name!r}", key, (*GRID_KEYS, *defaults))
    swept = [(key, value) for key in grid if key not in NOT_SWEPT for value in grid[key]]
    for key, value in (*swept, *grid.get("settings", {}).items()):
        _check_value(name, key, value, {**defaults, **DEFAULTS})


def _check_value(name: str, key: str, value: Any, defaults: Mapping[str, Any]) -> None:
    from experiments.harness import bench

    if key in defaults:
        check_setting(name, key, value, defaults[key])
    check_choice(key, value, bench.CHOICES_OF)


def _check_names(grid: Mapping[str, Any]) -> None:
    """Check that a grid's topologies, placements and network functions exist and can be loaded."""
    from topologies.emulation import topology

    known = {"topology": topology.names(), "nf": ["", *declaration.names()], "placement": placements.names() + peer_names()}
    for key, names in known.items():
        for value in values_of(grid, key):
            for part in itertools.chain(*stages(value)) if key == "nf" else [value]:
                if part not in names or (value and not part):
                    raise unknown(key if key != "nf" else "network function", part, names)
                if key == "nf" and part:
                    declaration.load(part)


def _check_fields(name: str, experiment: Experiment) -> None:
    """Raise NearstateError for a field of the wrong kind."""
    kinds: Mapping[str, type | tuple[type, ...]] = {
        "question": str, "procedure": str, "settings": Mapping, "traffic": Mapping, "network": Mapping, "profiles": Mapping,
        "repeats": int, "seed": int}  # fmt: skip
    for field_name, kind in kinds.items():
        value: Any = getattr(experiment, field_name)
        right = isinstance(value, kind) and (not isinstance(value, int) or (value >= 0 and not isinstance(value, bool)))
        if not right:
            wanted = {str: "text", int: "whole number from 0"}.get(kind, "mapping")  # type: ignore[arg-type]
            raise NearstateError(f"experiment {name!r}: {field_name}={value!r} is no {wanted}")


def topologies_of(grid: Mapping[str, Any]) -> Sequence[str]:
    """Return the topologies of a grid."""
    return values_of(grid, "topology") or [DEFAULTS["topology"]]


def network_keys(grid: Mapping[str, Any]) -> list[str]:
    """Return the keys of a grid that are parameters of one of its topologies."""
    from topologies.emulation import topology

    known = {key for name in topologies_of(grid) for key in topology.parameters(name)}
    return [key for key in grid if key in known]


def _check_grids(name: str, grids: Any) -> None:
    """Raise NearstateError unless the sweeps are mappings of non-empty lists: Python's ("rack") is a text, ("rack",) a list."""
    if not isinstance(grids, (tuple, list)) or not grids or not all(isinstance(grid, Mapping) for grid in grids):
        raise NearstateError(f"experiment {name!r}: sweeps={grids!r} is no list of grids; write sweeps=({{...}},)")
    for grid in grids:
        if "chain" in grid and "nf" in grid:
            raise NearstateError(
                f"experiment {name!r}: a grid has both nf and chain; give one, nf=('firewall+nat',) is a chain too"
            )
        if not isinstance(grid.get("settings", {}), Mapping):
            raise NearstateError(f"experiment {name!r}: settings={grid['settings']!r} is no mapping; give {{name: value}}")
        for part in grid.get("chain", ()):
            check_setting(name, "chain", part, "")
        for key, values in grid.items():
            if key not in ("settings", "repeats") and not (isinstance(values, (tuple, list)) and values):
                raise NearstateError(f"experiment {name!r}: {key}={values!r} is no list of values; write {key}=({values!r},)")


def check_setting(name: str, key: str, value: Any, default: Any) -> None:
    """Raise NearstateError unless a value is of its default's kind: a number of at least 0 (whole where the default is), a
    list with items like the default's, and so on. A default of None says no kind: whoever reads the setting checks it."""
    if default is not None and not _alike(value, default):
        raise NearstateError(f"experiment {name!r}: {key}={value!r} is no {_kind(default)}; the default is {default!r}")


def check_choice(key: str, value: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Raise NearstateError unless a setting with a few valid words is one of them, and the number of replicas at least 1."""
    if key in choices and value not in choices[key]:
        raise unknown(f"value of setting {key}", value, choices[key])
    if key == "replicas" and value < 1:
        raise NearstateError(f"replicas={value}; at least 1 is needed: the record itself")


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, (tuple, list)):
        like = 0.0 if default and isinstance(default[0], int) else next(iter(default), "")
        return isinstance(value, (tuple, list)) and all(_alike(item, like) for item in value)
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        right = isinstance(value, int if isinstance(default, int) else (int, float)) and not isinstance(value, bool)
        return right and math.isfinite(value) and value >= 0
    return isinstance(value, Mapping if isinstance(default, Mapping) else type(default))


def _kind(default: Any) -> str:
    names = {bool: "True or False", int: "whole number from 0", float: "number from 0", str: "text"}
    if isinstance(default, (tuple, list)):
        return "list of texts" if default and isinstance(default[0], str) else "list of numbers from 0"
    return names.get(type(default), "mapping")


def values_of(grid: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Return the values a grid sweeps of `key`; a chain is one value of "nf"."""
    if key == "nf" and "chain" in grid:
        return (CHAIN.join(grid["chain"]),)
    values: Sequence[Any] = grid.get(key, ())
    return values


def stages(nf: str) -> list[list[str]]:
    """Return the network functions that `nf` names, by stage from inside to outside: "a+b|c" is [["a", "b"], ["c"]]."""
    return [stage.split(CHAIN) for stage in nf.split(OVER_HOSTS)]


def staged(nf_hosts: Sequence[str], nf: str) -> list[list[str]]:
    """Return the NF hosts of each stage of `nf`: equally many, the first ones innermost. Raises NearstateError where they do not
    divide so."""
    count = len(stages(nf))
    if len(nf_hosts) % count:
        raise NearstateError(f"chain {nf!r} over {len(nf_hosts)} NF host{'s' if len(nf_hosts) > 1 else ''}: each of its {count} "
                             f"stages needs as many, so nf_hosts={count} or a multiple (topology rack)")  # fmt: skip
    each = len(nf_hosts) // count
    return [list(nf_hosts[number * each : (number + 1) * each]) for number in range(count)]


def check_traffic(name: str, experiment: Experiment) -> None:
    """Check the workload: a capture file is read to its end. Raises NearstateError."""
    if ("pcap" in experiment.traffic) != (experiment.procedure == "replay"):
        raise NearstateError(f"experiment {name!r}: procedure={experiment.procedure!r} with traffic {dict(experiment.traffic)}; "
                             "a capture file (traffic pcap=...) and procedure='replay' need each other")  # fmt: skip
    if experiment.procedure != "replay":
        Traffic.of(**{**experiment.traffic, "seed": experiment.seed})
        return
    for grid in experiment.sweeps:
        for speed in speeds_of(experiment, grid):
            look = capture.check(capture.at_speed(experiment.traffic, speed))
        for nf in values_of(grid, "nf") if look.has_tcp and experiment.traffic.get("sides") == "client" else ():
            _check_one_side(name, nf)
    placements = {value for grid in experiment.sweeps for value in grid.get("placement", ())}
    for peer in placements.intersection(peer_names()):
        raise NearstateError(f"experiment {name!r}: a replay through {peer!r} is not possible: the kernel asks for the addresses "
                             "of the file's hosts (ARP), and nobody answers")  # fmt: skip


def speeds_of(experiment: Experiment, grid: Mapping[str, Any]) -> Sequence[float | None]:
    """Return the speeds at which a grid's trials replay a file; None: at the traffic's own."""
    swept: Sequence[float | None] = grid.get("speed", (grid.get("settings", {}).get("speed", experiment.settings.get("speed")),))
    return swept


def _check_one_side(name: str, nf: str) -> None:
    """Raise NearstateError when a network function of `nf` cannot be measured by the clients' TCP segments alone."""
    for function in itertools.chain(*stages(nf)) if nf else ():
        if declaration.load(function).needs_answers:
            raise NearstateError(f"experiment {name!r}: a replay with sides='client' through {function!r}: it judges TCP by both "
                                 "sides' segments and would drop what it hears no answer to; write sides='both'")  # fmt: skip


def replays(experiment: Experiment) -> list[str]:
    """Return a line for each speed at which an experiment replays a file; none where it replays nothing."""
    if experiment.procedure != "replay":
        return []
    speeds = dict.fromkeys(itertools.chain.from_iterable(speeds_of(experiment, grid) for grid in experiment.sweeps))
    wanted = [capture.at_speed(experiment.traffic, speed) for speed in speeds]
    return [capture.describe(replay, capture.check(replay)) for replay in wanted]


def trials(name: str, experiment: Experiment) -> Iterator[Trial]:
    """Yield every trial of an experiment, in the order of its grids."""
    for grid in experiment.sweeps:
        swept = {key: values for key, values in grid.items() if key not in NOT_SWEPT}
        if "chain" in grid:
            swept["nf"] = values_of(grid, "nf")
        for values in itertools.product(*swept.values()):
            chosen = dict(zip(swept, values, strict=True))
            fixed = {**DEFAULTS} | {key: chosen.pop(key) for key in GRID_KEYS if key in chosen}
            for repeat in range(grid.get("repeats", experiment.repeats)):
                yield Trial(
                    name, fixed["topology"], fixed["nf"], fixed["placement"], fixed["replicas"], chosen,
                    grid.get("settings", {}), repeat, experiment.seed + repeat,
                )  # fmt: skip
