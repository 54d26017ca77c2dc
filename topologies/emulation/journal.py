"""What did a run create, and how is exactly that removed again, even after `kill -9`?

Everything a run makes outside its own memory (processes, links, bridges, cgroups, shared memory, files, settings) is
written here *before* it is created; `clean` replays the journals whose runner is gone. Processes need no entry each: a run's
children carry NEARSTATE_RUN=<run id> in the environment they were executed with, which forks inherit and nobody else has.
Network namespaces are anonymous: they go with the last process in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datastore.base.errors import NearstateError

MARKER = "NEARSTATE_RUN"
SHORT_LENGTH = 4
REMOVAL_S = 5.0
"""Longest wait for killed processes to disappear: their namespaces, and so their links, go with them."""


def folder() -> Path:
    """Return the folder of the journals: /run/nearstate, or a private one in /tmp where /run cannot be written."""
    path = Path("/run/nearstate") if os.access("/run", os.W_OK) else Path(f"/tmp/nearstate-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise NearstateError(f"{path} belongs to another user: journals there cannot be trusted; remove it")
    return path


def short_id(run_id: str) -> str:
    """Return 4 base-36 digits of the run's id: short enough for interface names (15 characters), same for the same run."""
    number = int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8], "big")
    digits = ""
    for _ in range(SHORT_LENGTH):
        number, digit = divmod(number, 36)
        digits += "0123456789abcdefghijklmnopqrstuvwxyz"[digit]
    return digits


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (proc(5), stat field 22); None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


class Journal:
    """The record of one run. A journal left by a dead runner of the same id is cleaned first (a resumed run).

    Raises NearstateError when another living runner has the same id.
    """

    def __init__(self, run_id: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", run_id):
            raise NearstateError(f"run id {run_id!r}: use letters, digits, '.', '_' and '-', at most 100")
        self.run_id, self.short = run_id, short_id(run_id)
        self.path = folder() / f"{run_id}.jsonl"
        if self.path.exists():
            if _alive(_read(self.path)):
                raise NearstateError(f"run {run_id} is already running (journal {self.path}); choose another id")
            clean(run_id)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._entries: dict[tuple[str, str], Any] = {}
        self._write({"kind": "runner", "name": run_id, "pid": os.getpid(), "start": start_ticks(os.getpid())})

    def environment(self) -> dict[str, str]:
        """Return the environment, with the marker, that every process of the run must be executed with."""
        return {**os.environ, MARKER: self.run_id}

    def process(self, name: str) -> None:
        """A process, executed with `environment()`, is about to start."""
        self._add("process", name)

    def link(self, name: str) -> None:
        """A network link of this name is about to appear in the namespace of the runner."""
        self._add("link", name)

    def bridge(self, name: str) -> None:
        """An Open vSwitch bridge is about to be made."""
        self._add("bridge", name)

    def cgroup(self, path: str | Path) -> None:
        """A cgroup folder is about to be made."""
        self._add("cgroup", str(path))

    def shared_memory(self, name: str) -> str:
        """A file of this name is about to appear in /dev/shm; returns its path."""
        if "/" in name or name in ("", ".", ".."):
            raise NearstateError(f"shared memory name {name!r}: use a plain file name")
        self._add("shared_memory", name)
        return f"/dev/shm/{name}"

    def file(self, path: str | Path) -> None:
        """A file or socket outside the results folder is about to be made."""
        self._add("file", str(path))

    def setting(self, path: str | Path, restore: str) -> None:
        """A file of /proc/sys or /sys is about to be written; writing `restore` to it undoes that. The first entry counts."""
        if ("setting", str(path)) not in self._entries:
            self._add("setting", str(path), restore=restore)

    def forget(self, kind: str, name: str | Path) -> None:
        """The thing was removed by whoever made it."""
        if self._entries.pop((kind, str(name)), None) is not None:
            self._write({"kind": "removed", "of": kind, "name": str(name)})

    def close(self) -> list[str]:
        """Remove what is still there, processes first, then the journal itself; return what was removed."""
        removed = _remove(self.run_id, self._entries.values())
        self._entries.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            self.path.unlink(missing_ok=True)
        return removed

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, kind: str, name: str, **more: str) -> None:
        entry = {"kind": kind, "name": name, **more}
        if (kind, name) not in self._entries:
            self._write(entry)
        self._entries[kind, name] = entry

    def _write(self, entry: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(entry).encode() + b"\n")


def runs() -> list[str]:
    """Return the ids of the runs that have a journal: they run, or were killed."""
    return sorted(path.stem for path in folder().glob("*.jsonl"))


def clean(run_id: str | None = None) -> list[str]:
    """Remove what dead runners left (one run, or all of them); return a line for each thing removed. Idempotent.

    Runs whose runner lives (same process id and start time) are left alone.
    """
    removed = []
    for path in sorted(folder().glob("*.jsonl")):
        if run_id is not None and path.stem != run_id:
            continue
        lines = _read(path)
        if _alive(lines):
            continue
        entries: dict[tuple[str, str], Any] = {}
        for line in lines:
            if line["kind"] == "removed":
                entries.pop((line["of"], line["name"]), None)
            else:
                entries[line["kind"], line["name"]] = line
        removed += _remove(path.stem, entries.values())
        path.unlink(missing_ok=True)
    return removed


def processes_of(run_id: str) -> Iterator[int]:
    """Yield the ids of the processes executed for a run, told by the marker in their environment."""
    marker = b"\0" + f"{MARKER}={run_id}".encode() + b"\0"
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if marker in b"\0" + Path(entry.path, "environ").read_bytes() + b"\0":
                    yield int(entry.name)


def ancestors(pid: int) -> set[int]:
    """Return a process and all its parents: whoever cleans from a shell inside the run does not kill itself."""
    found = set()
    while pid > 0:
        found.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the journal's lines; the last one may be torn by a crash, and then what it names was not created."""
    lines = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _alive(lines: list[dict[str, Any]]) -> bool:
    runners = [line for line in lines if line["kind"] == "runner"]
    return any(line["start"] is not None and start_ticks(line["pid"]) == line["start"] for line in runners)


def _remove(run_id: str, entries: Iterable[dict[str, Any]]) -> list[str]:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        by_kind.setdefault(entry["kind"], []).append(entry)
    names = {kind: [entry["name"] for entry in group] for kind, group in by_kind.items()}
    removed = _kill(run_id)
    removed += _remove_bridges(names.get("bridge", []))
    removed += _remove_links(names.get("link", []))
    for path in sorted(map(Path, names.get("cgroup", [])), reverse=True):
        if path.exists():
            _remove_cgroup(path)
            removed.append(f"cgroup {path}")
    for path in [Path("/dev/shm", name) for name in names.get("shared_memory", [])] + [
        Path(name) for name in names.get("file", [])
    ]:
        if path.exists() or path.is_symlink():
            path.unlink()
            removed.append(f"file {path}")
    for entry in by_kind.get("setting", []):
        with contextlib.suppress(OSError):
            if Path(entry["name"]).read_text().strip() != entry["restore"].strip():
                Path(entry["name"]).write_text(entry["restore"])
                removed.append(f"setting {entry['name']} back to {entry['restore'].strip()}")
    return removed


def _kill(run_id: str) -> list[str]:
    """SIGKILL the run's processes until none is left: one that was forking may leave a child behind the first pass."""
    spared = ancestors(os.getpid())
    killed: dict[int, str] = {}
    deadline = time.monotonic() + REMOVAL_S
    while found := [pid for pid in processes_of(run_id) if pid not in spared and start_ticks(pid) is not None]:
        for pid in found:
            with contextlib.suppress(OSError):
                killed.setdefault(pid, Path(f"/proc/{pid}/comm").read_text().strip())
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise NearstateError(f"processes {found} of run {run_id} do not die; try `clean` again or reboot")
        time.sleep(0.005)
    return [f"process {pid} ({name})" for pid, name in killed.items()]


def _remove_bridges(names: list[str]) -> list[str]:
    if not names:
        return []
    try:
        listed = subprocess.run(["ovs-vsctl", "--timeout=5", "list-br"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []  # no database: no bridge either, and the links go below
    present = [name for name in names if name in listed.stdout.split()]
    if present:
        command = ["ovs-vsctl", "--timeout=10"]
        for name in present:
            command += ["--", "--if-exists", "del-br", name]
        subprocess.run(command, capture_output=True, check=False)
    return [f"bridge {name}" for name in present]


def _remove_links(names: list[str]) -> list[str]:
    """Delete links that remain. Those whose other end died with its namespace go by themselves, a little later."""
    present = [name for name in names if Path("/sys/class/net", name).exists()]
    batch = "".join(f"link del {name}\n" for name in present)
    deadline = time.monotonic() + REMOVAL_S
    if present:
        subprocess.run(["ip", "-force", "-batch", "-"], input=batch, capture_output=True, text=True, check=False)
    while any(Path("/sys/class/net", name).exists() for name in present) and time.monotonic() < deadline:
        time.sleep(0.005)
    return [f"link {name}" for name in present]


def _remove_cgroup(path: Path) -> None:
    deadline = time.monotonic() + REMOVAL_S
    while True:
        try:
            return path.rmdir()
        except FileNotFoundError:
            return None
        except OSError:  # a member is still exiting
            if time.monotonic() > deadline:
                raise NearstateError(f"cgroup {path} still has members: {path.joinpath('cgroup.procs')}") from None
            time.sleep(0.005)
