"""Can a trial be what its line in the results will say? Asked for every combination of an experiment, before anything starts.

What holds for all trials is here. A procedure adds what only it needs in `check(planned)`, a peer too; both raise NearstateError.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datastore import placements
from datastore.base.errors import NearstateError, unknown
from datastore.coordination.heartbeats import Timing
from datastore.placements import Cluster, Placement
from datastore.store.table import CLIENT_SLOTS, check_layout
from experiments.harness import spec
from experiments.harness.bench import ASYMMETRIC, network_parameters, settings, steering_of
from experiments.harness.spec import Experiment, Trial
from experiments.workloads.traffic import Replay, Traffic
from nfs.dataplane.steps import check_chain
from topologies.emulation import topology
from topologies.emulation.topology import Plan

ABOVE_ZERO = ("seconds", "search_seconds", "background_seconds", "warmup_kpps", "warmup_kops", "bin_us", "window", "tries",
              "rate_per_s", "timeout_s", "udp_mbps", "packets", "passes", "pipeline", "frames", "small_bytes", "large_bytes",
              "count_here", "count_there", "pipeline_count", "search_low_kpps", "search_high_kpps", "search_low_kops",
              "search_high_kops", "records", "downloads", "connections", "many", "handshakes")  # fmt: skip
"""Settings that nothing can be measured with when they are 0."""


@dataclass(frozen=True)
class Planned:
    """A trial before it starts, with what follows from its experiment and its topology."""

    trial: Trial
    experiment: Experiment
    plan: Plan

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The procedure's parameters as the trial has them."""
        return settings(self.trial, self.experiment)

    @property
    def nf_hosts(self) -> list[str]:
        return self.plan.hosts("nf")

    @property
    def stages(self) -> list[list[str]]:
        """The NF hosts of each stage of the chain."""
        return spec.staged(self.nf_hosts, self.trial.nf)

    @property
    def peer(self) -> Any:
        """The module of the peer in the placement's place, or None."""
        name = self.trial.placement
        return importlib.import_module(f"experiments.peers.{name}") if name in spec.peer_names() else None

    @property
    def placement(self) -> Placement:
        """The placement. Only without a peer."""
        return placements.load(self.trial.placement)

    def cluster(self, stage: list[str]) -> Cluster:
        """What the placement may know of a stage."""
        return Cluster(tuple(stage), tuple(self.plan.hosts("store")), tuple(steering_of(stage)), self.trial.replicas)

    @property
    def stores(self) -> list[str]:
        """The hosts that run a store process; none with a peer."""
        if self.peer:
            return []
        return list(dict.fromkeys(host for stage in self.stages for host in self.placement.store_hosts(self.cluster(stage))))

    @property
    def is_coordinated(self) -> bool:
        return bool(self.trial.replicas > 1 or self.settings["coordinated"])

    def refuse(self, what: str) -> NearstateError:
        """Return the error that names the experiment and `what` is wrong."""
        return NearstateError(f"experiment {self.trial.experiment!r}: {what}")

    def need_path(self) -> None:
        """Raise NearstateError where no packet would come through: no network function, and no peer that forwards."""
        if self.peer:
            if not getattr(self.peer, "FORWARDS", True):
                raise self.refuse(f"procedure={self.experiment.procedure!r} with placement={self.trial.placement!r}: this peer "
                                  "forwards no packets; use procedure='state_access'")  # fmt: skip
        elif not self.trial.nf:
            raise self.refuse(f"procedure={self.experiment.procedure!r} without a network function: nothing would come through; "
                              "give nf, for instance nf=('passthrough',)")  # fmt: skip

    def need_moves(self, victim: str | None = None) -> None:
        """Raise NearstateError unless packets can be steered to another NF host, away from `victim` if one is named."""
        hosts = self.nf_hosts
        if len(hosts) < 2 or not self.plan.graph.switches():
            raise self.refuse(f"procedure={self.experiment.procedure!r} with {counted(len(hosts), 'NF host')}: another one must "
                              "take over, so nf_hosts=2 or more (topology rack)")  # fmt: skip
        if len(self.stages) > 1:
            raise self.refuse(f"procedure={self.experiment.procedure!r} with nf={self.trial.nf!r}: only hosts of one stage stand "
                              "in for each other; run the chain in one process, as in 'firewall+nat'")  # fmt: skip
        if victim is not None and victim not in hosts:
            raise unknown("victim among the NF hosts", str(victim), hosts)
        if self.settings["paths"] == ASYMMETRIC:
            raise self.refuse(f"procedure={self.experiment.procedure!r} with paths='asymmetric': a move brings both directions "
                              "to one host; use paths='symmetric'")  # fmt: skip

    def need_order(self, *names: str) -> None:
        """Raise NearstateError unless these settings rise, each above the one before."""
        values = [self.settings[name] for name in names]
        if not all(before < after for before, after in itertools.pairwise(values)):
            raise self.refuse(f"{', '.join(f'{name}={value}' for name, value in zip(names, values, strict=True))}: each must be "
                              "later than the one before")  # fmt: skip


def check_trials(name: str, experiment: Experiment) -> None:
    """Check every combination of an experiment once. Raises NearstateError naming the first that cannot be measured as asked."""
    seen: dict[str, Trial] = {}
    for trial in spec.trials(name, experiment):
        if trial.name in seen:
            raise NearstateError(f"experiment {name!r}: {trial.name} is in its grids twice, so only one would be measured: have "
                                 "the grids differ in what they sweep, not only in \"settings\"")  # fmt: skip
        seen[trial.name] = trial
        if not trial.placement:
            raise NearstateError(f"experiment {name!r}: a grid without placement; give placement=('integrated',)")
        if trial.repeat == 0:
            try:
                check_trial(Planned(trial, experiment, topology.plan(trial.topology, network_parameters(trial, experiment))))
            except NearstateError as error:
                said = str(error)
                raise error if repr(name) in said else NearstateError(f"experiment {name!r}: {said}") from error


def check_trial(planned: Planned) -> None:
    """Raise NearstateError unless this trial can be measured as asked."""
    for check in (check_numbers, check_traffic, check_paths, check_peer if planned.peer else check_state):
        check(planned)
    procedure = importlib.import_module(f"experiments.harness.procedures.{planned.experiment.procedure}")
    if getattr(procedure, "FORWARDS", True):
        planned.need_path()
    for module in (procedure, planned.peer):
        getattr(module, "check", lambda planned: None)(planned)


def check_numbers(planned: Planned) -> None:
    """Check settings that must be above zero or within a range."""
    given = planned.settings
    for name in ABOVE_ZERO:
        if name in given and given[name] is not None and not isinstance(given[name], (tuple, list)) and given[name] <= 0:
            raise planned.refuse(f"{name}={given[name]}: it must be above 0")
    if not 0 < given.get("fill", 0.5) < 1:
        raise planned.refuse(f"fill={given['fill']}: a share between 0 and 1")
    if len(given.get("shown_ms", (0, 0))) != 2:
        raise planned.refuse(f"shown_ms={given['shown_ms']!r}: two times, before and after")
    Timing.of(given["lease_ms"] or None)
    check_layout(given["capacity"], given["value_bytes"])


def check_traffic(planned: Planned) -> None:
    """Check the workload with what the trial changes of it."""
    given = planned.settings
    if planned.experiment.procedure == "replay":
        if given["speed"] is not None:
            Replay.of(**{**planned.experiment.traffic, "speed": given["speed"]})
    elif given.get("flows"):
        for flows in given["flows"] if isinstance(given["flows"], (tuple, list)) else [given["flows"]]:
            Traffic.of(**{**planned.experiment.traffic, "flows": flows})


def check_paths(planned: Planned) -> None:
    """Check that asymmetric paths have another host to come back by."""
    paths = planned.settings["paths"]
    for stage in planned.stages:
        steering_of(stage, paths)
    if paths == ASYMMETRIC and not planned.plan.graph.switches():
        raise planned.refuse(f"paths={paths!r} on topology {planned.trial.topology!r}: without a switch nothing is steered")


def check_peer(planned: Planned) -> None:
    """Check that nothing is asked of a peer that only our own stores do."""
    trial, given = planned.trial, planned.settings
    ours = {"replicas": trial.replicas > 1, "coordinated": given["coordinated"], "asynchronous": given["asynchronous"]}
    for name in [name for name, wanted in ours.items() if wanted]:
        value = trial.replicas if name == "replicas" else given[name]
        raise planned.refuse(f"{name}={value} with the peer {trial.placement!r}: it keeps its state in its own way; leave it out")


def check_state(planned: Planned) -> None:
    """Check functions, their settings and the hosts that keep their records."""
    trial, given, stores = planned.trial, planned.settings, planned.stores
    chains = spec.stages(trial.nf) if trial.nf else []
    functions = given["functions"]
    named = [name for chain in chains for name in chain]
    for name in functions:
        if name not in named:
            raise unknown(f"network function with settings, of nf={trial.nf!r}", str(name), named)
    for chain in chains:
        check_chain(chain, {name: functions[name] for name in chain if name in functions}, given["value_bytes"])
    _check_copies(planned, stores)
    if given["asynchronous"] and trial.replicas < 2:
        raise planned.refuse("asynchronous=True with replicas=1: there is no copy that could be waited for; give replicas=2")
    if planned.is_coordinated:
        _check_coordinated(planned)
    elif "lease_ms" in trial.sweep and planned.experiment.procedure != "failover":
        raise planned.refuse(
            f"lease_ms={given['lease_ms']} is swept where nothing has a lease: give replicas=2 or coordinated=True"
        )
    _check_reach(planned, stores)


def _check_copies(planned: Planned, stores: list[str]) -> None:
    """Check that each record has as many copies as `replicas` says, each on a host of its own."""
    trial = planned.trial
    if planned.placement.store_role is None:
        if trial.replicas > 1:
            raise planned.refuse(f"replicas={trial.replicas} with placement={trial.placement!r}: it keeps no copies; leave "
                                 "replicas out")  # fmt: skip
        return
    for stage in planned.stages:
        there = planned.placement.store_hosts(planned.cluster(stage))
        if trial.replicas > len(there):
            more = f"{planned.placement.store_role}_hosts={trial.replicas}"
            raise planned.refuse(f"replicas={trial.replicas} with placement={trial.placement!r} and "
                                 f"{counted(len(there), 'host')} with a store: each copy needs one of its own; "
                                 f"give {more} (topology rack)")  # fmt: skip
        for partition, group in enumerate(planned.placement.map(planned.cluster(stage)).replicas):
            if len(group) != trial.replicas:
                raise planned.refuse(f"replicas={trial.replicas} with placement={trial.placement!r}: it gives partition "
                                     f"{partition} {counted(len(group), 'host')}, {', '.join(group)}")  # fmt: skip


def _check_reach(planned: Planned, stores: list[str]) -> None:
    """Check that stores, and what asks them, have an interface for it, and that a store has room for all that ask."""
    if len(stores) > 1 or planned.placement.store_role == "store" or planned.is_coordinated:
        for host in dict.fromkeys([*stores, *planned.nf_hosts]):
            if "storage" not in planned.plan.interfaces(host):
                raise planned.refuse(f"{trial_state(planned)} on topology {planned.trial.topology!r}: host {host} has no cable "
                                     "`storage`, by which state is reached")  # fmt: skip
    asking = len(planned.stages[0])
    slots = asking * len(stores) if planned.is_coordinated else asking
    if slots > CLIENT_SLOTS:
        raise planned.refuse(f"{trial_state(planned)} with {asking} NF hosts and {len(stores)} stores: a store would remember "
                             f"{slots} clients; {CLIENT_SLOTS} are possible")  # fmt: skip


def _check_coordinated(planned: Planned) -> None:
    """Check that a coordinator has a host to run on, and one stage to steer."""
    if "control" not in planned.plan.hosts("control") or "storage" not in planned.plan.interfaces("control"):
        raise planned.refuse(f"{trial_state(planned)}, topology={planned.trial.topology!r}: a coordinator needs a host `control` "
                             "with a cable `storage` (topology rack)")  # fmt: skip
    if len(planned.stages) > 1:
        raise planned.refuse(f"{trial_state(planned)}, nf={planned.trial.nf!r}: a coordinator steers one stage; run the chain in "
                             "one process, as in 'firewall+nat'")  # fmt: skip


def trial_state(planned: Planned) -> str:
    """Return how a trial's state is kept, in the words of its experiment."""
    return f"placement={planned.trial.placement!r}, replicas={planned.trial.replicas}"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun: `1 trial`, `2 trials`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
