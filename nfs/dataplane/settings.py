"""What a user can choose of a network function: names with kinds and defaults, found by the function as fields of `env`.

    settings={"external_addresses": ("4u4", ["192.0.2.1"]), "inspect_window": ("u1", False)}

A kind is one of NumPy's ("u1" ... "f8"), with a number before it an array of that many; a shorter list is filled up with zeros.
IPv4 addresses may be given dotted. What does not fit these is brought into shape by the function's own `prepare`.

A name that begins with "_" is the function's memory, of its housekeeping say: nobody can choose it, it begins with its default,
and a change of settings leaves it as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from ipaddress import AddressValueError, IPv4Address
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError, unknown
from nfs.dataplane.requests import ENV

Settings = Mapping[str, tuple[str, Any]]
Prepare = Callable[[dict[str, Any]], dict[str, Any]]
"""From all settings as a user gives them (defaults filled in) to the values of the fields."""

_KIND = re.compile(r"(\d*)([uif][1248])")


def env_layout(settings: Settings) -> np.dtype:
    """Return the layout of an env with these settings, padded to 8 bytes. Raises NearstateError for a kind that is none."""
    fields: list[tuple[str, str, tuple[int, ...]]] = []
    for name, (kind, _) in settings.items():
        found = _KIND.fullmatch(kind)
        if not found:
            raise NearstateError(f"setting {name}: kind {kind!r}; kinds are u1 to u8, i1 to i8, f4, f8, and e.g. 4u4 for four")
        fields.append((name, found[2], (int(found[1]),) if found[1] else ()))
    layout = np.dtype([(name, ENV[name]) for name in ENV.names or ()] + fields, align=True)
    names = list(layout.names or ())
    assert layout.fields
    offsets = [layout.fields[name][1] for name in names]
    return np.dtype({"names": names, "formats": [layout.fields[name][0] for name in names], "offsets": offsets,
                     "itemsize": -(-layout.itemsize // 8) * 8})  # fmt: skip


def is_memory(name: str) -> bool:
    """Tell whether a setting is its function's own memory."""
    return name.startswith("_")


def remember(env: np.ndarray, before: np.ndarray) -> None:
    """Give a new env the memory of the one `before` it."""
    for name in env.dtype.names or ():
        if is_memory(name):
            env[name] = before[name]


def make_env(function: str, settings: Settings, prepare: Prepare | None, given: Mapping[str, Any]) -> np.ndarray:
    """Return a one-element env of network function `function`. Raises NearstateError naming the setting and its value."""
    choices = [name for name in settings if not is_memory(name)]
    for name in given:
        if name not in choices:
            raise unknown(f"setting of network function {function!r}", name, choices)
    values = {name: given.get(name, default) for name, (_, default) in settings.items()}
    if prepare:
        try:
            values = prepare(values)
        except NearstateError:
            raise
        except Exception as error:  # whatever a function makes of a value of another kind
            defaults = {name: settings[name][1] for name in given}
            raise NearstateError(f"settings of network function {function!r}, {dict(given)}: {type(error).__name__}: {error}; "
                                 f"the defaults are {defaults}") from error  # fmt: skip
    env = np.zeros(1, env_layout(settings))
    for name, value in values.items():
        try:
            _fill(env, name, value)
        except (TypeError, ValueError, OverflowError, AddressValueError) as error:
            raise NearstateError(f"setting {name}={value!r} of network function {function!r}: {error}; its kind is "
                                 f"{settings[name][0]!r}") from None  # fmt: skip
    return env


def _fill(env: np.ndarray, name: str, value: Any) -> None:
    field = env[name]
    if field.ndim == 1:
        field[0] = _number(value, field.dtype)
        return
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        value = [value]
    if len(value) > field.shape[1]:
        raise ValueError(f"{len(value)} values, at most {field.shape[1]} are possible")
    for n, item in enumerate(value):
        field[0, n] = _number(item, field.dtype)


def _number(value: Any, kind: np.dtype) -> Any:
    if isinstance(value, str):
        value = int(IPv4Address(value))
    if kind.kind == "f":
        return float(value)
    limits = np.iinfo(kind)
    if not limits.min <= int(value) <= limits.max or int(value) != value:
        raise ValueError(f"{limits.min} to {limits.max} are possible")
    return int(value)
