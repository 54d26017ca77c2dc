"""A chain of network functions as the engine runs it: steps, each with one key and one record, and the functions in them.

    chain=("firewall", "traffic_counter", "nat")

    step 0   key FLOW       record [connection | counters]   firewall, traffic_counter
    step 1   key ENDPOINT   record [mapping]                 nat

Neighbours with the same key that rewrite nothing share a step: one access to the state serves both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from datastore.base.errors import NearstateError, unknown
from nfs.dataplane import declaration
from nfs.dataplane.declaration import NetworkFunction, kind_of
from nfs.dataplane.keys import INITIATOR, NONE, SOURCE
from nfs.dataplane.requests import ENV_WORDS
from nfs.dataplane.settings import remember

# columns of `steps` and `members`
KEY, KIND, MEMBERS, MEMBERS_END, REWRITES = range(5)
FUNCTION, OFFSET, ENV_AT = range(3)


class Chain(NamedTuple):
    """steps: int64[n, 5]. members: int64[m, 3], a function's address, the word of its state in the record, of its env in `env`.

    env: int64[...], all functions' envs. passes_mask: frames that every function passes unseen.
    """

    functions: tuple[NetworkFunction, ...]
    steps: np.ndarray
    members: np.ndarray
    env: np.ndarray
    passes_mask: int

    @property
    def rewrites(self) -> bool:
        """True when a function changes addresses or ports."""
        return bool(self.steps[:, REWRITES].any())

    @property
    def by_address(self) -> bool:
        """True when records are kept by address alone, so that a fragment without ports has one."""
        keys = set(self.steps[:, KEY].tolist())
        return keys <= {NONE, SOURCE, INITIATOR} and keys != {NONE}

    def change_settings(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        """Give functions other settings, by name, while they run. Raises NearstateError; then nothing has changed."""
        check_names(self.functions, settings)
        made = {function.name: function.make_env(settings[function.name]) for function in self.functions
                if function.name in settings}  # fmt: skip
        base = ENV_WORDS
        for number, (member, function) in enumerate(zip(self.members, self.functions, strict=True)):
            if function.name in made:
                remember(made[function.name], self.env_of(number))
                words = made[function.name].view(np.int64)
                self.env[member[ENV_AT] + base : member[ENV_AT] + words.size] = words[base:]

    def env_of(self, member: int) -> np.ndarray:
        """Return the env of function number `member`, one element, sharing the engine's memory."""
        at, function = int(self.members[member, ENV_AT]), self.functions[member]
        return self.env[at : at + function.env_layout.itemsize // 8].view(function.env_layout)


def check_names(functions: Sequence[NetworkFunction], settings: Mapping[str, Any]) -> None:
    """Raise NearstateError when `settings` names a function that is not in the chain."""
    for name in settings:
        if name not in {function.name for function in functions}:
            raise unknown("network function with settings", name, [function.name for function in functions])


def _together(left: NetworkFunction, right: NetworkFunction) -> bool:
    return left.key == right.key != NONE and not left.rewrites and not right.rewrites


def _groups(functions: Sequence[NetworkFunction], value_bytes: int) -> list[list[NetworkFunction]]:
    """Return the functions step by step."""
    groups: list[list[NetworkFunction]] = []
    for function in functions:
        last = groups[-1] if groups else None
        room = value_bytes - sum(member.state.itemsize for member in last or ())
        if last and _together(last[-1], function) and function.state.itemsize <= room:
            last.append(function)
        else:
            groups.append([function])
    return groups


def load_chain(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]], value_bytes: int) -> Chain:
    """Return the chain of these network functions. settings: by function, then by setting. value_bytes: of a record.

    Raises NearstateError for unknown names, wrong settings, an empty chain, a function twice, or a record that is too large.
    """
    return make_chain(_loaded(names), settings, value_bytes)


def check_chain(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]], value_bytes: int) -> None:
    """Raise what `load_chain` would raise, and compile nothing."""
    functions = _loaded(names)
    _check(functions, settings, value_bytes)
    for function in functions:
        function.make_env(settings.get(function.name))


def _loaded(names: Sequence[str]) -> list[NetworkFunction]:
    if not names or len(set(names)) != len(names):
        raise NearstateError(f"chain {list(names)}: name one or more network functions, each once")
    return [declaration.load(name) for name in names]


def _check(functions: Sequence[NetworkFunction], settings: Mapping[str, Mapping[str, Any]], value_bytes: int) -> None:
    check_names(functions, settings)
    for name, given in settings.items():
        if not isinstance(given, Mapping):
            raise NearstateError(f"settings of network function {name!r}: {given!r} is no mapping; give {{name: value}}")
    for function in functions:
        if not function.stateless and function.state.itemsize > value_bytes:
            raise NearstateError(f"records of {function.name} have {function.state.itemsize} bytes, the store's {value_bytes}: "
                                 "start the store with larger values")  # fmt: skip


def make_chain(functions: Sequence[NetworkFunction], settings: Mapping[str, Mapping[str, Any]], value_bytes: int) -> Chain:
    """`load_chain` of functions that are loaded."""
    _check(functions, settings, value_bytes)
    steps: list[tuple[int, ...]] = []
    members: list[tuple[int, int, int]] = []
    envs: list[np.ndarray] = []
    env_words = 0
    for group in _groups(functions, value_bytes):
        kind = kind_of("+".join(function.name for function in group), *(function.state for function in group))
        steps.append((group[0].key, kind, len(members), len(members) + len(group), any(f.rewrites for f in group)))
        offset = 0
        for function in group:
            env = function.make_env(settings.get(function.name)).view(np.int64)
            members.append((function.compiled.address, offset, env_words))
            envs.append(env)
            env_words += env.size
            offset += 0 if function.stateless else function.state.itemsize // 8
    mask = functions[0].passes_mask
    for function in functions[1:]:
        mask &= function.passes_mask
    return Chain(tuple(functions), np.array(steps, np.int64), np.array(members, np.int64), np.concatenate(envs), mask)
