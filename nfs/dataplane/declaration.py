"""How a network function is declared: one Python function, the record it keeps, and the key it keeps it under.

The decorated function gets `(packet, record, env)` and returns DROP, FORWARD or TURN. It sees one packet and its record at a
time and cannot know where the record lives. Compiled, it is a C function that the engine calls by address (3 ns, so one
engine serves all); with NUMBA_DISABLE_JIT=1 the same function runs as ordinary Python.

The function may be called again for a packet whose record, or claim, somebody else took meanwhile: only its last run counts.
What it may ask for beyond its record, by `claim`, `add` and the fields of `env`, is in `requests.py`.
"""

from __future__ import annotations

import ctypes
import dis
import importlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np

from datastore.base.errors import NearstateError, import_file, unknown
from datastore.compiled import INTERPRETED
from nfs.dataplane import ledger
from nfs.dataplane.headers import PACKET
from nfs.dataplane.keys import NONE
from nfs.dataplane.settings import Prepare, Settings, env_layout, make_env

DROP, FORWARD, TURN = 0, 1, 2
"""TURN: back through the network functions, as if the packet had come from the other side (a NAT's hairpin)."""
MAX_RECORD_BYTES = 64
KINDS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8")
EXCEPTIONS = {"truncated": ledger.TRUNCATED, "oversized": ledger.OVERSIZED, "malformed": ledger.MALFORMED,
              "not_ip": ledger.NOT_IP, "fragment": ledger.FRAGMENT, "unreadable": ledger.UNREADABLE}  # fmt: skip

Housekeep = Callable[[np.ndarray, Callable[[int, int], np.ndarray], float], None]


def record(**fields: str) -> np.dtype:
    """Return the layout of a record: field names with NumPy kinds ("u1", "u4", "f8", ...), all zero for a key never seen.

    Fields are aligned as in C and the whole is padded to 8 bytes. Raises NearstateError over 64 bytes or for a wrong kind.
    """
    wrong = [f"{name}={kind!r}" for name, kind in fields.items() if kind not in KINDS]
    if wrong:
        raise NearstateError(f"record({', '.join(wrong)}): kinds are {' '.join(KINDS)}")
    layout = np.dtype(list(fields.items()), align=True)
    if not fields or layout.itemsize > MAX_RECORD_BYTES:
        raise NearstateError(f"record({fields}) has {layout.itemsize} bytes; 1 to {MAX_RECORD_BYTES} are possible")
    size = -(-layout.itemsize // 8) * 8
    offsets = [layout.fields[name][1] for name in fields] if layout.fields else []
    kinds = [layout.fields[name][0] for name in fields] if layout.fields else []
    return np.dtype({"names": list(fields), "formats": kinds, "offsets": offsets, "itemsize": size})


NO_STATE = record(unused="u8")


@dataclass(frozen=True)
class NetworkFunction:
    """A declared function: `name`, the Python `function`, `key` (of `keys`), `state` layout, and the frames it passes unseen."""

    name: str
    function: Callable[[Any, Any, Any], int]
    key: int
    state: np.dtype
    passes: frozenset[int]
    question: str
    rewrites: bool = False
    settings: Settings = field(default_factory=dict)
    prepare: Prepare | None = None
    housekeep: Housekeep | None = None
    needs_answers: bool = False

    @property
    def kind(self) -> int:
        """Number of the record type, 1 to 254: keeps the records of different functions apart in one store."""
        return kind_of(self.name, self.state)

    @property
    def stateless(self) -> bool:
        """True when the function keeps no record."""
        return self.key == NONE

    @property
    def passes_mask(self) -> int:
        """Bit n set: a frame whose parser status is n is forwarded without asking the function."""
        return sum(1 << status for status in self.passes)

    @cached_property
    def env_layout(self) -> np.dtype:
        """The layout of this function's `env`: `ENV`, then its settings."""
        return env_layout(self.settings)

    def make_env(self, given: Mapping[str, Any] | None = None) -> np.ndarray:
        """Return a one-element env with the settings `given`, else the defaults. Raises NearstateError for a wrong one."""
        return make_env(self.name, self.settings, self.prepare, given or {})

    @cached_property
    def compiled(self) -> Any:
        """The C function `int32 f(packet *, record *, env *)`. Raises NearstateError with file and line that do not compile."""
        if INTERPRETED:
            return InterpretedFunction(self.function, (PACKET, self.state, self.env_layout))
        signature = numba.types.int32(*(numba.from_dtype(layout) for layout in (PACKET, self.state, self.env_layout)))
        try:
            return numba.cfunc(signature, cache=True, nopython=True)(self.function)
        except (numba.core.errors.NumbaError, KeyError) as error:
            line, reason = _compile_error(self.function, error)
            raise NearstateError(f"{self.function.__code__.co_filename}:{line}: network function {self.name!r} does not compile: "
                                 f"{reason}") from error  # fmt: skip

    def process(self, packets: np.ndarray, index: int, state: np.ndarray, env: np.ndarray) -> int:
        """Run the function on `packets[index]` and the one-element arrays `state` and `env`; returns the verdict.

        For tests and debugging; the engine calls the compiled function itself.
        """
        if INTERPRETED:
            views = (packets.view(np.recarray)[index], state.view(np.recarray)[0], env.view(np.recarray)[0])
            return int(self.function(*views))
        call = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 3)(self.compiled.address)
        return int(call(packets.ctypes.data + index * PACKET.itemsize, state.ctypes.data, env.ctypes.data))


class InterpretedFunction:
    """In place of a compiled function where all runs as plain Python: it is called by its address, too."""

    def __init__(self, function: Callable[..., int], layouts: Sequence[np.dtype]) -> None:
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 3)(self._run)
        self._function, self._layouts = function, layouts
        self.address = ctypes.cast(self._callback, ctypes.c_void_p).value

    def _run(self, *addresses: int) -> int:
        memory = [(ctypes.c_char * layout.itemsize).from_address(at) for layout, at in zip(self._layouts, addresses, strict=True)]
        return int(self._function(*(np.frombuffer(bytes_, layout).view(np.recarray)[0]
                                    for bytes_, layout in zip(memory, self._layouts, strict=True))))  # fmt: skip


def _compile_error(function: Callable[..., int], error: Exception) -> tuple[int, str]:
    """Return the line that does not compile, and why in one line."""
    code = function.__code__
    if isinstance(error, KeyError):  # all that Numba says of a field that packet, record or env does not have
        at = next((step.offset for step in dis.get_instructions(function) if step.argval == error.args[0]), 0)
        line = next((line for start, end, line in code.co_lines() if start <= at < end and line), code.co_firstlineno)
        return line, f"there is no field {error.args[0]!r}"
    said = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Failed in nopython")]
    where = getattr(error, "loc", None)
    return where.line if where else code.co_firstlineno, said[0] if said else type(error).__name__


def network_function(
    key: int, state: np.dtype | None = None, passes: Iterable[str] = (), rewrites: bool = False,
    settings: Settings | None = None, prepare: Prepare | None = None, housekeep: Housekeep | None = None,
    needs_answers: bool = False,
) -> Callable[[Callable[[Any, Any, Any], int]], NetworkFunction]:  # fmt: skip
    """Declare the decorated function a network function.

    key: FLOW, ENDPOINT, TUPLE, SOURCE or NONE. state: its record's layout, made by `record`. passes: what it lets through
    although it is no packet of a flow ("not_ip", the link protocols with a name in `link.py`; "unreadable", all others that are
    not IP; "fragment", "malformed", ...); everything else of that kind is dropped and counted. rewrites: addresses and ports
    that it sets in `packet` are written into the frame. settings: {name: (kind, default)}, what a user can choose; the function
    finds them in `env` (see `settings.py`). prepare: from what the user gives to what the fields hold. housekeep: called about
    ten times a second, in Python, with `(env, read, now_s)`: it may read counters that all instances share,
    `read(key_high, key_low)` gives a record's words, and change settings in `env[name][0]`.
    needs_answers: it judges TCP by both sides' segments, so traffic of one side alone cannot measure it.
    """
    wrong = [name for name in passes if name not in EXCEPTIONS]
    if wrong:
        raise unknown("exception that a network function passes", wrong[0], EXCEPTIONS)
    if (state is None) != (key == NONE):
        raise NearstateError("a network function with a key needs state=record(...), one with key=NONE must have none")

    def declare(function: Callable[[Any, Any, Any], int]) -> NetworkFunction:
        text = importlib.import_module(function.__module__).__doc__ or ""
        return NetworkFunction(function.__name__, function, key, NO_STATE if state is None else state,
                               frozenset(EXCEPTIONS[name] for name in passes), text.strip().split("\n")[0],
                               rewrites, settings or {}, prepare, housekeep, needs_answers)  # fmt: skip

    return declare


def kind_of(name: str, *layouts: np.dtype) -> int:
    """Return the number of the record type of the network function called `name`; claims of its own carry it too.

    layouts: of its record, or of those that share it. A record of another layout has another number but for one time in 254, so
    what an older version left in a store is never seen by a newer one: it is as if there were none, and expires when idle.
    """
    fields = [(field, *map(str, (layout.fields or {})[field])) for layout in layouts for field in layout.names or ()]
    return zlib.crc32(f"{name}{fields or ''}".encode()) % 254 + 1


def names() -> list[str]:
    """Return the names of all network functions: the files of `nfs/`."""
    return sorted(path.stem for path in Path(__file__).resolve().parents[1].glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> NetworkFunction:
    """Return the network function of file `nfs/<name>.py`. Raises NearstateError for unknown names."""
    if name not in names():
        raise unknown("network function", name, names())
    found = getattr(import_file(f"nfs.{name}"), name, None)
    if not isinstance(found, NetworkFunction):
        raise NearstateError(f"nfs/{name}.py declares no network function named {name}: decorate it with @network_function")
    return found
