"""How does a process get onto an emulated host in milliseconds, and never outlive the run?

Importing the compiled packet path costs about a second, so one process, the launcher, does it once, early and
single-threaded; every later process is a fork of it:

    runner --request, control socket (SCM_RIGHTS)--> launcher --fork--> child: cgroup, namespace, log file, target(...)
    runner <----------------- control socket (SOCK_SEQPACKET, one JSON object a message) ------------> child

The launcher dies with the runner and the children with the launcher (PR_SET_PDEATHSIG). A child that is already past its
fork when the runner dies is still found by the marker in its environment.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from datastore.base.errors import NearstateError
from datastore.security.secret import key_file
from topologies.emulation import system
from topologies.emulation.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
BUFFER_BYTES = 8 << 20
"""Room in a control socket: a result with its histograms fits, so that a sender does not wait for the runner."""
PRELOAD_S = 180.0
"""Longest wait for the launcher's imports: the first ones after a source changed compile."""
SO_SNDBUFFORCE = 32


class LauncherSilent(NearstateError):
    """The launcher lives and has not answered yet."""


class Placeable(Protocol):
    """What a process needs to know of the host it runs on."""

    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def cgroup(self) -> Path | None: ...


class Control:
    """One end of a control socket: JSON objects, one a message, in order."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)

    def fileno(self) -> int:
        """Return the descriptor, readable when a message or the end of the other side is there."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises BrokenPipeError (ConnectionError) when the other side is gone."""
        self._socket.settimeout(None)
        self._socket.send(json.dumps(message).encode())

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Return the next message; None after `timeout_s` without one (None: wait for ever).

        Raises EOFError when the other side is gone and everything it sent has been read.
        """
        self._socket.settimeout(timeout_s)
        try:
            size = self._socket.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
            message = self._socket.recv(size) if size else b""
        except (TimeoutError, BlockingIOError):
            return None
        except ConnectionResetError:
            message = b""
        if not message:
            raise EOFError("the other side of the control socket is gone")
        return dict(json.loads(message))

    def close(self) -> None:
        self._socket.close()


class RunningProcess:
    """A process on an emulated host, seen from the runner."""

    def __init__(self, launcher: Launcher, name: str, host: str | None, pid: int, control: Control, log: Path) -> None:
        self.name, self.host, self.pid, self.log = name, host, pid, log
        self._launcher, self._control = launcher, control

    def fileno(self) -> int:
        return self._control.fileno()

    def send(self, message: dict[str, Any]) -> None:
        """Send the process a message. Raises NearstateError when it has ended."""
        try:
            self._control.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """Return its next message, None after `timeout_s`. Raises NearstateError, naming the log, when it has ended."""
        try:
            return self._control.receive(timeout_s)
        except EOFError:
            raise self._ended() from None

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal that killed it), or None while it runs."""
        ending = self._launcher.ending(self.pid, 0)
        return None if ending is None else int(ending["code"])

    def wait(self, timeout_s: float) -> int | None:
        """Like `poll`, but wait up to `timeout_s` for the end."""
        ending = self._launcher.ending(self.pid, timeout_s)
        return None if ending is None else int(ending["code"])

    def signal(self, number: int) -> None:
        """Send the process a signal; nothing happens when it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self, timeout_s: float = 2.0) -> int:
        """Ask with {"stop": true}; after `timeout_s` SIGTERM, half a second later SIGKILL. Return the exit code.

        What the process sent before its end can still be received.
        """
        with contextlib.suppress(NearstateError):
            self.send({"stop": True})
        code = self.wait(timeout_s)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if code is None:
                self.signal(number)
                code = self.wait(0.5)
        if code is None:
            raise NearstateError(f"{self.name} (process {self.pid}) does not die; see {self.log}")
        return code

    def kill(self) -> int:
        """SIGKILL, as a crash would look; return the exit code."""
        self.signal(signal.SIGKILL)
        return self.wait(5) or -signal.SIGKILL

    def cpu_seconds(self) -> float:
        """Return user plus system time; after its end the total."""
        ending = self._launcher.ending(self.pid, 0)
        return float(ending["cpu_seconds"]) if ending else cpu_seconds(self.pid)

    def rss_bytes(self) -> int:
        """Return resident memory, pages shared with the launcher included; 0 after its end."""
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def close(self) -> None:
        self._control.close()

    def _ended(self) -> NearstateError:
        code = self.wait(1.0)
        how = {None: "closed its control socket", 0: "ended"}.get(code, f"failed with exit code {code}")
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        why = f": {lines[-1][:200]}" if lines and code not in (None, 0) else ""
        return NearstateError(f"{self.name} {how}{why}; its log is {self.log}")


def cpu_seconds(pid: int) -> float:
    """Return the user plus system time of a process, all its threads; 0 when there is none.

    By the process' own clock (clock_getcpuclockid(3)), which counts nanoseconds; /proc/<pid>/stat counts ticks of 10 ms,
    which is several microseconds a packet in a step of half a second.
    """
    with contextlib.suppress(OSError):
        return time.clock_gettime_ns(~pid << 3 | 2) / 1e9
    return 0.0


class Launcher:
    """The process that forks the others. Make it early: its imports run while the caller goes on.

    logs: folder for <process name>.log, made if missing. preload: modules to import before the first fork. The thread that
    makes the launcher must live as long as it does (PR_SET_PDEATHSIG watches the thread).
    """

    def __init__(self, journal: Journal, logs: Path, preload: Sequence[str] = ()) -> None:
        self.journal, self.logs = journal, Path(logs)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.processes: list[RunningProcess] = []
        self._lock = threading.RLock()
        self._endings: dict[int, dict[str, Any]] = {}
        self._replies: list[dict[str, Any]] = []
        self._ready = False
        self.log = self.logs / "launcher.log"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control, self._end = Control(ours), ours
        journal.process("launcher")
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs, self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "topologies.emulation.processes", str(theirs.fileno()), *preload],
                cwd=ROOT, env={**journal.environment(), **threads, "PYTHONUNBUFFERED": "1"}, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=system.dying_with_us(), start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self, timeout_s: float = PRELOAD_S) -> None:
        """Wait for the imports. Raises NearstateError, with the failing import, when they fail."""
        with self._lock:
            if not self._ready:
                reply = self._reply(timeout_s)
                if "failed" in reply:
                    raise NearstateError(f"launcher: {reply['failed']}; its log is {self.log}")
                self._ready = True

    def spawn(
        self, name: str, host: Placeable | None, target: str, config: dict[str, Any], prompt: bool = False, key: bytes = b""
    ) -> RunningProcess:
        """Fork a process that runs `target` ("module:function") as function(config, control) on a host (None: on none).

        name: unique among the run's processes; its log is <name>.log. prompt: woken, it takes the core from a process that runs,
        for those with little to do and others waiting for it; processes on hosts else let each other finish a turn
        (SCHED_BATCH, sched(7)). key: the process finds its descriptor as config["secret"]. Costs about 2 ms.
        """
        if not re.fullmatch(r"[A-Za-z0-9._:-]{1,60}", name):
            raise NearstateError(f"process name {name!r}: use letters, digits, '.', '_', ':' and '-', at most 60")
        if not re.fullmatch(r"[\w.]+:\w+", target):
            raise NearstateError(f"process target {target!r}: write it as module:function")
        log = self.logs / f"{name}.log"
        self.journal.process(name)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "name": name, "target": target, "config": config, "log": str(log.resolve()),
            "namespace": host.pid if host else None, "cgroup": str(host.cgroup) if host and host.cgroup else None,
            "prompt": prompt or host is None,
        }  # fmt: skip
        with theirs, self._lock, contextlib.ExitStack() as keys:
            self.wait_ready()
            try:
                descriptors = [theirs.fileno()]
                if key:
                    descriptors.append(key_file(key))
                    keys.callback(os.close, descriptors[1])
                self._end.settimeout(None)
                socket.send_fds(self._end, [json.dumps(request).encode()], descriptors)
                pid = int(self._reply(10)["pid"])
            except OSError:
                raise NearstateError(f"{name}: the launcher is gone; its log is {self.log}") from None
        process = RunningProcess(self, name, host.name if host else None, pid, Control(ours), log)
        self.processes.append(process)
        return process

    def on_host(self, name: str) -> list[RunningProcess]:
        """Return the running processes of a host."""
        return [process for process in self.processes if process.host == name and process.poll() is None]

    def kill_on(self, hosts: Sequence[str]) -> None:
        """SIGKILL every process on these hosts and wait for their ends."""
        running = [process for host in hosts for process in self.on_host(host)]
        for process in running:
            process.signal(signal.SIGKILL)
        for process in running:
            process.wait(5)
        for process in [process for process in self.processes if process.host in hosts]:
            process.close()
            self.processes.remove(process)

    def ending(self, pid: int, timeout_s: float) -> dict[str, Any] | None:
        """Return {"pid", "code", "cpu_seconds"} of a process that ended, waiting up to `timeout_s`; None: it still runs."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if pid not in self._endings:
                    self._drain(max(0.0, min(0.05, deadline - time.monotonic())))
                if pid in self._endings:
                    return self._endings[pid]
            if time.monotonic() >= deadline:
                return None

    def close(self) -> None:
        """Kill what still runs and the launcher itself."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for process in self.processes:
            process.close()
        self._control.close()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reply(self, timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while not self._replies:
            if time.monotonic() > deadline:
                raise LauncherSilent(f"launcher: no answer in {timeout_s:g} s; its log is {self.log}")
            self._drain(0.5)
            if -1 in self._endings:
                raise NearstateError(f"launcher: it ended; its log is {self.log}")
        return self._replies.pop(0)

    def _drain(self, timeout_s: float) -> None:
        """Sort what the launcher sent into endings and replies; without anything there, wait up to `timeout_s` once."""
        try:
            while (message := self._control.receive(timeout_s)) is not None:
                timeout_s = 0
                if "code" in message:
                    self._endings[message["pid"]] = message
                else:
                    self._replies.append(message)
                    return
        except EOFError:  # the launcher is gone, and its children with it
            self._endings[-1] = {"pid": -1, "code": -signal.SIGKILL, "cpu_seconds": 0.0}
            for process in self.processes:
                self._endings.setdefault(process.pid, {**self._endings[-1], "pid": process.pid})


class _Server:
    """The launcher's own loop: requests from the runner, ends of children."""

    def __init__(self, end: socket.socket) -> None:
        self.end, self.control = end, Control(end)
        self.selector = selectors.DefaultSelector()
        self.selector.register(end, selectors.EVENT_READ, None)

    def serve(self) -> None:
        while True:
            for key, _ in self.selector.select():
                if key.data is not None:
                    self._report(key.fd, key.data)
                elif not self._accept():
                    return

    def _accept(self) -> bool:
        """Serve one request; False when the runner is gone."""
        size = self.end.recv_into(bytearray(1), 1, socket.MSG_PEEK | socket.MSG_TRUNC)
        message, descriptors, _, _ = socket.recv_fds(self.end, max(size, 1), 2)
        if not message:
            return False
        end, parent = descriptors[0], os.getpid()
        pid = os.fork()
        if pid == 0:
            for key in list(self.selector.get_map().values()):  # siblings and the way to the runner are not this child's
                os.close(key.fd)
            self.selector.close()
            self.end.detach()
            request = json.loads(message)
            if descriptors[1:]:
                request["config"]["secret"] = descriptors[1]
            _run_child(request, socket.socket(fileno=end), parent)
        for descriptor in descriptors:
            os.close(descriptor)
        self.selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
        self.control.send({"pid": pid})
        return True

    def _report(self, pidfd: int, pid: int) -> None:
        self.selector.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        used = usage.ru_utime + usage.ru_stime
        self.control.send({"pid": pid, "code": os.waitstatus_to_exitcode(status), "cpu_seconds": used})


def _run_child(request: dict[str, Any], end: socket.socket, parent: int) -> None:
    """Become the process asked for; never returns."""
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        system.die_with_parent(parent)
        system.set_name(request["name"])
        if not request["prompt"]:
            system.wait_for_turns()
        if request["cgroup"]:
            Path(request["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
        if request["namespace"]:
            system.enter_network_namespace(request["namespace"])
        module, _, function = request["target"].partition(":")
        getattr(importlib.import_module(module), function)(request["config"], Control(end))
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except NearstateError as error:
        print(error, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """The launcher: `python -m topologies.emulation.processes <descriptor> [module ...]`, started by Launcher only."""
    system.set_name("launcher")
    server = _Server(socket.socket(fileno=int(sys.argv[1])))
    for module in sys.argv[2:]:
        try:
            importlib.import_module(module)
        except Exception as error:
            traceback.print_exc()
            server.control.send({"failed": f"import {module}: {type(error).__name__}: {error}"})
            return
    gc.collect()
    gc.freeze()  # children share these pages as long as nobody's collector touches them
    server.control.send({"ready": True})
    server.serve()


if __name__ == "__main__":
    main()
