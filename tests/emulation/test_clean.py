"""`kill -9` of the runner at any moment, then `clean`: is nothing of ours left, and all that is foreign untouched?"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from topologies.emulation.journal import MARKER, Journal, clean, folder, processes_of, short_id, start_ticks

ROOT = Path(__file__).resolve().parents[2]
RUN = "test-clean"
KILLS = 24 if os.environ.get("NEARSTATE_LONG") == "1" else 10
LIFE_S = 4.0
"""A network comes up, goes down and begins to come up again in less."""

RUNNER = """
import sys
from pathlib import Path
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

journal = Journal(sys.argv[1])
shared = Path(journal.shared_memory(f"nearstate-{journal.short}-table"))
shared.write_bytes(bytes(4096))
sysctl = Path("/proc/sys/net/core/wmem_default")
journal.setting(sysctl, sysctl.read_text())
sysctl.write_text(str(int(sysctl.read_text()) + 4096))
print("started", flush=True)
with Launcher(journal, Path(sys.argv[2])) as launcher:
    while True:
        with Network("rack", {"cpu": {"nf": 0.5}}, journal.run_id, launcher, journal) as network:
            launcher.spawn("idle", network.hosts["nf1"], "tests.emulation.test_clean:idle", {})
            print("up", flush=True)
"""


def idle(config: dict, control: object) -> None:
    """A process on a host that takes part in the run and never ends by itself."""
    time.sleep(1000)


def machine() -> dict[str, object]:
    """Return what of this machine a run could leave changed."""
    sysctls = {}
    for name in ("net/core", "net/ipv4", "net/ipv6/conf/default", "net/ipv6/conf/all", "kernel", "vm"):
        for path in Path("/proc/sys", name).iterdir():
            with contextlib.suppress(OSError):
                if path.is_file() and os.access(path, os.W_OK):
                    sysctls[str(path)] = path.read_text()
    for noisy in ("random", "ns_last_pid", "pty", "drop_caches", "netdev_rss_key"):
        for changing in [setting for setting in sysctls if noisy in setting]:
            del sysctls[changing]
    return {"sysctls": sysctls, "named namespaces": sorted(Path("/run/netns").glob("*"))}


def run(command: list[str]) -> str:
    """Run a program and return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def links() -> list[str]:
    return [path.name for path in Path("/sys/class/net").iterdir()]


def left_of_ours() -> list[str]:
    """Return everything that bears the run's name: processes, links, bridges, cgroups, files."""
    short = short_id(RUN)
    bridges = run(["ovs-vsctl", "--timeout=5", "list-br"])
    found = [f"process {pid}" for pid in processes_of(RUN) if start_ticks(pid)]
    found += [f"link {name}" for name in links() if name.startswith(f"ns{short}")]
    found += [f"bridge {name}" for name in bridges.split() if short in name]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/nearstate-{short}*")]
    found += [str(path) for path in Path("/dev/shm").glob(f"*{short}*")]
    return found + [str(path) for path in folder().glob(f"*{short}*")] + [str(p) for p in folder().glob(f"{RUN}.jsonl")]


@pytest.fixture
def foreign() -> Iterator[None]:
    """A bridge, a namespace with a link, and processes that are not ours, one with the marker of another run."""
    name = f"foreign{os.getpid() % 10000}"
    run(["ovs-vsctl", "add-br", name, "--", "set", "bridge", name, "datapath_type=netdev"])
    run(["ip", "netns", "add", name])
    run(["ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", "peer", "netns", name])
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    processes = [subprocess.Popen(sleep, env={**os.environ, MARKER: f"{RUN}-other"}),
                 subprocess.Popen(["ip", "netns", "exec", name, *sleep]), subprocess.Popen(sleep)]  # fmt: skip
    try:
        yield
        assert name in run(["ovs-vsctl", "list-br"]).split()
        assert Path("/sys/class/net", f"{name}v").exists()
        assert Path("/run/netns", name).exists()
        assert all(process.poll() is None for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        run(["ovs-vsctl", "--if-exists", "del-br", name])
        run(["ip", "link", "del", f"{name}v"])
        run(["ip", "netns", "del", name])


def test_kill_at_random_moments(foreign: None, tmp_path: Path) -> None:
    seed = random.Random(20)
    before = machine()
    states = set()
    for kill in range(KILLS):
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, RUN, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert runner.stdout is not None
        assert runner.stdout.readline() == "started\n"
        time.sleep((kill + seed.random()) * LIFE_S / KILLS)  # one kill in each part of the network's life
        namespaces = namespaces_of(processes_of(RUN)) - namespaces_of([os.getpid()])
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        states.add("up" if "up" in runner.stdout.read() else "starting")
        removed = clean(RUN)
        assert removed, "a killed runner leaves at least its shared memory"
        assert left_of_ours() == [], f"after kill {kill}"
        everybody = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        assert not namespaces & namespaces_of(everybody), "a namespace of ours still has a process in it"
        assert clean(RUN) == []
    assert machine() == before
    assert states == {"up", "starting"}


def namespaces_of(processes: Iterable[int]) -> set[str]:
    """Return the network namespaces these processes are in."""
    found = set()
    for pid in processes:
        with contextlib.suppress(OSError):
            found.add(str(Path(f"/proc/{pid}/ns/net").readlink()))
    return found


def test_a_resumed_run_cleans_its_own_remains(tmp_path: Path) -> None:
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, RUN, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    assert [runner.stdout.readline() for _ in range(2)] == ["started\n", "up\n"]
    runner.kill()
    runner.wait()
    with Journal(RUN):
        assert [left for left in left_of_ours() if not left.endswith(".jsonl")] == []
    assert left_of_ours() == []
