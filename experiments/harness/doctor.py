"""What has this box, what does it lack, and how is each lack mended?

`examine` looks at everything and changes nothing (the kernel may load a module it is asked about). What can only be
known by trying (AF_XDP on veth, netem, connection tracking) is tried in a network namespace of a process of its own,
with which it disappears. `host_facts` is the same knowledge as data, written beside every run's results. `require`
refuses to start what could not end well.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datastore.base import ROOT
from datastore.base.errors import NearstateError
from experiments.workloads import real_servers, savefile
from topologies.emulation import cgroup, journal, system

RESULTS = ROOT / "results"
JOURNALS = Path("/run/nearstate")
RESULTS_MBYTES = 500
"""Free space asked for before a run: a `paper` run's histograms and logs take less."""
SHARED_MEMORY_MBYTES = 256
"""Free space in /dev/shm asked for: a store of a million records; a full /dev/shm kills the writer with SIGBUS."""
LOCKED_MBYTES = 64
"""What the frames of a few AF_XDP ports take; root is not limited."""
TRIAL_S = 2.5
TOOL_S = 2.0
PACKAGES = ("mininet", "openvswitch-switch", "libxdp1", "nftables", "redis-server", "ethtool", "iproute2", "nginx", "iperf3",
            "wrk", "curl", "conntrackd", "libpcap0.8", "libpcap0.8t64")  # fmt: skip
LIBRARIES = ("numba", "llvmlite", "numpy", "pandas", "matplotlib", "os-ken", "scapy", "pyroute2", "hdrhistogram")
QUICK_CLOCKS = ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter")
"""Clock sources read without a system call (vDSO); each packet is stamped, so the others cost throughput."""
DATAPATHS = {
    "kernel": "the kernel's module",
    "afxdp": "userspace, ports of type afxdp-nonpmd",
    "userspace": "userspace, plain ports",
}
SLOW = ("NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK")
"""With these set a packet costs many times what is to be measured."""
SET_UP = "call ./run_all.sh or ./run_tests.sh: they install it"


@dataclass(frozen=True)
class Fact:
    """One line of the examination; `problem` and `fix` are set together, or neither. `instead`: what does as well meanwhile."""

    name: str
    value: str
    problem: str | None = None
    fix: str | None = None
    instead: str | None = None

    @property
    def lacking(self) -> bool:
        """Whether something is missing that nothing stands in for."""
        return self.problem is not None and self.instead is None


def examine() -> list[Fact]:
    """Return what this box has, in a fixed order. Works without root and with anything missing; takes half a second."""
    box = Box()
    return [_guarded(check, box) for check in CHECKS]


def render(facts: list[Fact]) -> str:
    """Return the facts as aligned lines; under each problem, how to mend it."""
    width = max(len(fact.name) for fact in facts)
    lines = []
    for fact in facts:
        lines.append(f"{'!' if fact.lacking else ' '} {fact.name:<{width}}  {fact.value}")
        if fact.problem:
            lines.append(f"  {'':<{width}}  problem: {fact.problem}")
            lines.append(f"  {'':<{width}}  fix: {fact.fix}")
            lines += [f"  {'':<{width}}  until then: {fact.instead}"] if fact.instead else []
    problems = sum(fact.lacking for fact in facts)
    return "\n".join([*lines, "", f"{problems} problem{'' if problems == 1 else 's'}" if problems else "no problems"])


def host_facts() -> dict[str, Any]:
    """Return what is needed to believe a measurement of this box, for host.json: numbers, names and versions only."""
    box = Box()
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "distribution": box.distribution,
        "virtualisation": box.virtualisation,
        "cpu_model": box.cpu_model,
        "cpus": len(os.sched_getaffinity(0)),
        "governor": box.governor,
        "sched_autogroup": _text(system.AUTOGROUP) or None,
        "memory_gib": round(box.memory_gib("MemTotal"), 1),
        "clocksource": box.clocksource,
        "versions": box.versions,
        "datapath": box.datapath,
        "afxdp": box.trial.get("afxdp"),
        "netem": box.trial.get("netem") == "works",
        "cgroup": cgroup.version(),
    }


def require(results: Path = RESULTS) -> None:
    """Return when experiments can run and their results be written. Raises NearstateError: one line, with the fix."""
    if os.geteuid() != 0:
        raise NearstateError(
            f"experiments need root, for network namespaces and the switch (this is user id "
            f"{os.geteuid()}): call `sudo ./run_all.sh`, or put sudo before the command"
        )
    if system.missing_capabilities():
        raise NearstateError(f"experiments make network namespaces and links: {system.privilege_advice()}")
    slow = [f"{name}={os.environ[name]}" for name in SLOW if os.environ.get(name, "0") != "0"]
    if slow:
        raise NearstateError(f"{' '.join(slow)} is set, for debugging: an interpreted or checked packet path would be measured; "
                             "unset it and call again")  # fmt: skip
    if shutil.which("mnexec") is None or importlib.util.find_spec("mininet") is None:
        raise NearstateError(f"Mininet is not installed, or .venv does not see it: {SET_UP}")
    _datapath()
    from nfs.dataplane import afxdp

    afxdp.library()
    _require_space(Path("/dev/shm"), SHARED_MEMORY_MBYTES, "mount -o remount,size=1G /dev/shm, or remove what fills it")
    require_results(results)


def require_results(results: Path = RESULTS) -> None:
    """Return when `results` can be written and has room. Raises NearstateError. Needs no root."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise NearstateError(
            f"results folder {results} cannot be written: {error.strerror}; free some space, mend its "
            "permissions or mount it writable"
        ) from None
    _require_space(results, RESULTS_MBYTES, "free some, for instance old runs under results/")


def _datapath() -> str:
    """Return the datapath a run would use. Raises NearstateError also without Mininet, which `network` imports."""
    try:
        from topologies.emulation import network
    except ImportError as error:
        raise NearstateError(f"Mininet is not installed, or .venv does not see it ({error}): {SET_UP}") from None
    return network.datapath()


def _require_space(folder: Path, mbytes: int, fix: str) -> None:
    free = shutil.disk_usage(folder).free / 1e6
    if free < mbytes:
        raise NearstateError(f"{folder} has {free:.0f} MB free, a run asks for {mbytes}: {fix}")


class Box:
    """What several facts are told from, read once. The trial runs beside the rest."""

    def __init__(self) -> None:
        self.root = os.geteuid() == 0
        self._trial = self._start_trial() if self.root else None

    def _start_trial(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "experiments.harness.doctor"]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
            preexec_fn=system.dying_with_us(),
        )

    @cached_property
    def trial(self) -> dict[str, str]:
        """What trying gave, by name: "works", or the reason why not; empty when nothing could be tried."""
        if self._trial is None:
            return {}
        try:
            output, _ = self._trial.communicate(timeout=TRIAL_S)
            return dict(json.loads(output))
        except (subprocess.TimeoutExpired, ValueError):
            self._trial.kill()
            self._trial.communicate()
            return {}

    @cached_property
    def packages(self) -> dict[str, str]:
        """The distribution's packages that are installed, with their versions."""
        command = ["dpkg-query", "-W", "-f", "${Package}\t${db:Status-Status}\t${Version}\n", *PACKAGES]
        rows = (line.split("\t") for line in _output(command).splitlines())
        return {name: version for name, status, version in rows if status == "installed"}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of all that a measurement depends on."""
        versions = {"python": platform.python_version(), **self.packages}
        for name in LIBRARIES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        return versions

    @cached_property
    def datapath(self) -> str | None:
        """The datapath a run would use: kernel, afxdp or userspace; None when Open vSwitch does not answer."""
        with contextlib.suppress(NearstateError):
            return _datapath() if self.root else None
        return None

    @cached_property
    def cpu_model(self) -> str:
        names = ("model name", "Model", "Hardware", "uarch")  # x86, then Arm and RISC-V
        found = dict(line.split(":", 1) for line in _text("/proc/cpuinfo").splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in found.items()}
        return next((fields[name] for name in names if name in fields), platform.machine())

    @cached_property
    def governor(self) -> str | None:
        """The frequency governors in use; None where the machine shows none (virtual machines)."""
        paths = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
        return ", ".join(sorted({_text(path) for path in paths})) or None

    @cached_property
    def clocksource(self) -> str:
        return _text("/sys/devices/system/clocksource/clocksource0/current_clocksource")

    @cached_property
    def virtualisation(self) -> str:
        """The hypervisor's or container's name after systemd-detect-virt(1); "none" on bare metal."""
        if shutil.which("systemd-detect-virt"):
            return _output(["systemd-detect-virt"]) or "unknown"
        return "unknown" if " hypervisor " in _text("/proc/cpuinfo") else "none"

    @cached_property
    def distribution(self) -> str:
        with contextlib.suppress(OSError):
            return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
        return "unknown"

    def memory_gib(self, field: str) -> float:
        """Return a field of /proc/meminfo."""
        fields = dict(line.split(":", 1) for line in _text("/proc/meminfo").splitlines())
        return int(fields[field].split()[0]) / 2**20


# --- the facts, in the order they are shown -----------------------------------------------------------------------


def check_root(box: Box) -> Fact:
    lacking = system.missing_capabilities() if box.root else []
    if lacking:
        problem = "network namespaces, links and packet sockets need all of them"
        return Fact("root", f"yes, without {', '.join(lacking)}", problem, system.privilege_advice())
    if box.root:
        return Fact("root", "yes")
    return Fact(
        "root",
        f"no (user id {os.geteuid()})",
        "network namespaces and the switch need it; some facts stay unknown",
        "put sudo before the command",
    )


def check_kernel(box: Box) -> Fact:
    value = f"{platform.release()} {platform.machine()}, {box.distribution}, virtualisation: {box.virtualisation}"
    major, minor = (int(part) for part in platform.release().split(".")[:2])
    if (major, minor) < (5, 10):
        return Fact("kernel", value, "older than 5.10: AF_XDP on veth is incomplete", "use Debian 12, Ubuntu 22.04 or newer")
    return Fact("kernel", value)


def check_cpu(box: Box) -> Fact:
    count = len(os.sched_getaffinity(0))
    value = f"{count} x {box.cpu_model}"
    if count < 2:
        return Fact(
            "CPU",
            value,
            "one processor: generator, NF and switch take turns, trials will be marked invalid",
            "give the machine, or this process (taskset), 2 processors or more",
        )
    return Fact("CPU", value)


def check_governor(box: Box) -> Fact:
    if box.governor in (None, "performance"):
        return Fact("CPU governor", box.governor or "none shown (the host of this virtual machine decides)")
    return Fact(
        "CPU governor",
        box.governor,
        "clock rates change during trials",
        "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
    )


def check_memory(box: Box) -> Fact:
    value = f"{box.memory_gib('MemAvailable'):.1f} of {box.memory_gib('MemTotal'):.1f} GiB available"
    if box.memory_gib("MemAvailable") < 2:
        return Fact("memory", value, "a rack with its processes takes up to 2 GiB", "end other programs or add memory")
    return Fact("memory", value)


def check_clock(box: Box) -> Fact:
    if box.clocksource in QUICK_CLOCKS:
        return Fact("clock source", box.clocksource)
    return Fact(
        "clock source",
        box.clocksource or "unknown",
        "reading the clock takes a system call, and every packet is stamped",
        "boot with tsc=reliable clocksource=tsc where the processor's TSC is stable",
    )


def check_interpreter(box: Box) -> Fact:
    value = f"Python {platform.python_version()} in {sys.prefix}"
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        return Fact("interpreter", value, "not the repository's .venv", "call ./run_all.sh, or .venv/bin/python")
    return Fact("interpreter", value)


def check_numba(box: Box) -> Fact:
    version = box.versions.get("numba")
    if version is None:
        return Fact("Numba", "missing", "nothing can be compiled", SET_UP)
    return Fact("Numba", f"{version}, compiled functions under {os.environ.get('NUMBA_CACHE_DIR', 'no fixed folder')}")


def check_mininet(box: Box) -> Fact:
    seen, mnexec = importlib.util.find_spec("mininet") is not None, shutil.which("mnexec")
    value = f"{box.packages.get('mininet', 'no package')}, mnexec {mnexec or 'missing'}"
    if mnexec is None:
        return Fact("Mininet", value, "the distribution's package is not installed", SET_UP)
    if not seen:
        return Fact("Mininet", value, "this interpreter does not see it", SET_UP)
    return Fact("Mininet", value)


def check_switch(box: Box) -> Fact:
    name = "Open vSwitch"
    if shutil.which("ovs-vsctl") is None:
        return Fact(name, "missing", "the rack has no switch", SET_UP)
    version = box.packages.get("openvswitch-switch", "unknown version")
    if not box.root:
        return Fact(name, f"{version}, running: {'yes' if _output(['pgrep', '-x', 'ovs-vswitchd']) else 'no'}")
    answer = _output(["ovs-appctl", "-T", "2", "-t", "ovs-vswitchd", "version"])
    if not answer:
        return Fact(
            name,
            f"{version}, not running",
            "the rack has no switch",
            "systemctl start openvswitch-switch, or /usr/share/openvswitch/scripts/ovs-ctl start "
            "--system-id=random; or ./run_all.sh",
        )
    return Fact(name, f"{version}, running")


def check_datapath(box: Box) -> Fact:
    fix = "load the kernel's module: modprobe openvswitch; on Ubuntu apt-get install linux-modules-extra-$(uname -r)"
    if box.datapath is None:
        return Fact("datapath", "unknown without root, Open vSwitch and Mininet")
    value = DATAPATHS[box.datapath]
    if box.datapath == "userspace":
        return Fact("datapath", value, "neither the kernel's module nor ports of type afxdp-nonpmd: several times slower", fix)
    return Fact("datapath", value)


def check_libxdp(box: Box) -> Fact:
    version = box.packages.get("libxdp1")
    if version is None:
        return Fact("libxdp", "missing", "packets go through AF_PACKET, several times slower", SET_UP)
    return Fact("libxdp", version)


def check_libpcap(box: Box) -> Fact:
    try:
        return Fact("libpcap", savefile.version())
    except NearstateError as error:
        return Fact("libpcap", "missing", f"captures cannot be replayed: {error}", SET_UP)


def check_afxdp(box: Box) -> Fact:
    return _tried(
        box,
        "AF_XDP on veth",
        "afxdp",
        "native mode, a frame went through",
        "a kernel with CONFIG_XDP_SOCKETS, and libxdp1; until then AF_PACKET is used",
    )


def check_netem(box: Box) -> Fact:
    return _tried(
        box,
        "netem",
        "netem",
        "the kernel delays links",
        "modprobe sch_netem; on Ubuntu apt-get install linux-modules-extra-$(uname -r)",
        "links are delayed by our own wire",
    )


def check_nftables(box: Box) -> Fact:
    if shutil.which("nft") is None:
        return Fact("nftables", "missing", "the kernel's firewall cannot be measured beside ours", SET_UP)
    return _tried(
        box,
        "nftables",
        "nftables",
        f"{box.packages.get('nftables', '')}, with connection tracking",
        "modprobe nf_tables nf_conntrack",
    )


def check_ipv6(box: Box) -> Fact:
    default = _text("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    good = (
        "works" if default == "0" else "off by default here (net.ipv6.conf.default.disable_ipv6), switched on for our interfaces"
    )
    instead = "hosts have IPv4 alone, and IPv6 is not measured" if not system.has_ipv6() else None
    return _tried(box, "IPv6", "ipv6", good, "boot without ipv6.disable=1, and have /proc/sys writable", instead)


def check_redis(box: Box) -> Fact:
    if shutil.which("redis-server") is None:
        return Fact("Redis", "missing", "Redis cannot be measured beside our store", SET_UP)
    return Fact("Redis", box.packages.get("redis-server", "unknown version"))


def check_real_clients(box: Box) -> Fact:
    missing = [program for program in {**real_servers.SERVERS, **real_servers.CLIENTS} if not shutil.which(program)]
    if missing:
        return Fact("real clients", f"missing: {', '.join(missing)}", "the experiment real_clients and its tests fail", SET_UP)
    versions = [f"{name} {box.packages[name]}" for name in ("nginx", "iperf3", "wrk", "curl") if name in box.packages]
    return Fact("real clients", ", ".join(versions) or "all there, by no package")


def check_offloads(box: Box) -> Fact:
    if shutil.which("ethtool") is None:
        return Fact("offloads", "ethtool missing", "offload settings cannot be seen", SET_UP)
    return Fact("offloads", f"set per host; ethtool {box.packages.get('ethtool', '')} shows them")


def check_cgroup(box: Box) -> Fact:
    version = cgroup.version()
    if version is None:
        return Fact(
            "cgroup",
            "no cpu controller",
            "hosts cannot be limited to a share of the processors",
            "mount cgroup2 on /sys/fs/cgroup, in a container with --cgroupns=host and write access",
        )
    return Fact("cgroup", f"version {version}, cpu controller")


def check_shared_memory(box: Box) -> Fact:
    free = shutil.disk_usage("/dev/shm").free / 1e6
    if free < SHARED_MEMORY_MBYTES:
        return Fact(
            "/dev/shm",
            f"{free:.0f} MB free",
            "a store's table lies there and does not fit",
            "mount -o remount,size=1G /dev/shm, or remove what fills it",
        )
    return Fact("/dev/shm", f"{free:.0f} MB free")


def check_locked_memory(box: Box) -> Fact:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or box.root:
        return Fact("locked memory", "unlimited for root" if box.root else "unlimited")
    value = f"{limit / 1e6:.0f} MB"
    if limit < LOCKED_MBYTES * 1e6:
        return Fact("locked memory", value, "AF_XDP's frames are locked in memory", "ulimit -l unlimited, or run as root")
    return Fact("locked memory", value)


def check_disk(box: Box) -> Fact:
    free = shutil.disk_usage(ROOT).free / 1e6
    if free < RESULTS_MBYTES:
        return Fact("disk", f"{free:.0f} MB free", f"a run asks for {RESULTS_MBYTES} MB", "free some, for instance old runs")
    return Fact("disk", f"{free / 1000:.1f} GB free")


def check_results(box: Box) -> Fact:
    folder = next(path for path in (RESULTS, ROOT) if path.exists())
    read_only = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    if read_only or not os.access(folder, os.W_OK):
        return Fact("results folder", str(RESULTS), "not writable", f"chown or chmod {folder}, or mount it writable")
    return Fact("results folder", f"{RESULTS}, writable")


def check_leftovers(box: Box) -> Fact:
    dead = [path.stem for path in sorted(JOURNALS.glob("*.jsonl")) if not _runner_lives(path)]
    if not dead:
        return Fact("leftovers", "none")
    return Fact(
        "leftovers",
        f"of {len(dead)} dead run{'s' * (len(dead) > 1)}: {', '.join(dead[:3])}",
        "namespaces, links or processes may be left",
        ".venv/bin/python -m experiments clean",
    )


CHECKS: tuple[Callable[[Box], Fact], ...] = (
    check_root,
    check_kernel,
    check_cpu,
    check_governor,
    check_memory,
    check_clock,
    check_interpreter,
    check_numba,
    check_mininet,
    check_switch,
    check_datapath,
    check_libxdp,
    check_libpcap,
    check_cgroup,
    check_offloads,
    check_redis,
    check_real_clients,
    check_shared_memory,
    check_locked_memory,
    check_disk,
    check_results,
    check_leftovers,
    check_afxdp,
    check_netem,
    check_nftables,
    check_ipv6,
)


def _guarded(check: Callable[[Box], Fact], box: Box) -> Fact:
    """A file of /proc that is missing or reads otherwise must not hide the other facts."""
    name = check.__name__.removeprefix("check_").replace("_", " ")
    try:
        return check(box)
    except (OSError, ValueError, KeyError, NearstateError) as error:
        return Fact(name, "unknown", f"could not be told: {error!r}", "report this line with your distribution's name")


def _tried(box: Box, name: str, key: str, good: str, fix: str, instead: str | None = None) -> Fact:
    if not box.root:
        return Fact(name, "unknown without root")
    result = box.trial.get(key, "the trial did not end: see .venv/bin/python -m experiments.harness.doctor")
    return Fact(name, good) if result == "works" else Fact(name, "does not work", result, fix, instead)


def _runner_lives(path: Path) -> bool:
    """Tell from a journal's first line whether its runner still runs."""
    try:
        runner: Mapping[str, Any] = json.loads(path.read_text().split("\n", 1)[0])
        return runner["start"] is not None and journal.start_ticks(runner["pid"]) == runner["start"]
    except (OSError, ValueError, KeyError):
        return False


def _output(command: list[str]) -> str:
    """Return a tool's standard output; empty when it is missing, fails to answer or has nothing to say."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


# --- the trial: run as a process of its own in a network namespace of its own -------------------------------------


def try_out() -> dict[str, str]:
    """Return, for each thing tried on a fresh veth pair, "works" or the reason why not."""
    if ctypes.CDLL(None, use_errno=True).unshare(system.CLONE_NEWNET) != 0:
        why = f"unshare of the network namespace: {os.strerror(ctypes.get_errno())}; {system.privilege_advice()}"
        return dict.fromkeys(("afxdp", "netem", "nftables", "ipv6"), why)
    made = _try(["ip", "-batch", "-"], "link add one type veth peer name two\nlink set one up\nlink set two up\n")
    if made != "works":
        reason = f"no veth pair could be made: {made}"
        return {"afxdp": reason, "netem": reason, "ipv6": reason, "nftables": _try_nftables()}
    netem = _try(["tc", "qdisc", "add", "dev", "two", "root", "netem", "delay", "1ms"])
    if netem == "works":
        _try(["tc", "qdisc", "del", "dev", "two", "root"])
    return {"netem": netem, "nftables": _try_nftables(), "ipv6": _try_ipv6(), "afxdp": _try_afxdp()}


def _try_ipv6() -> str:
    """Give an interface an IPv6 address as the emulation does, also where new namespaces begin with IPv6 off."""
    if not system.has_ipv6():
        return "the kernel has no IPv6 (ipv6.disable=1 at boot, or not built in)"
    try:
        system.with_quiet_ipv6("one")
    except OSError as error:
        return f"/proc/sys/net/ipv6 cannot be written: {error.strerror}"
    return _try(["ip", "-batch", "-"], "address add fd00::1/128 dev lo nodad\nroute replace fd00::2/128 dev one src fd00::1\n")


def _try_nftables() -> str:
    rules = "table ip trial { chain through { type filter hook forward priority 0; ct state established accept; }; }"
    return _try(["nft", "-f", "-"], rules)


def _try_afxdp() -> str:
    """Open an AF_XDP port on one end of the pair and have it receive a frame sent into the other."""
    from nfs.dataplane import afxdp, frames

    try:
        area = frames.make_frames(2 * afxdp.RING_SLOTS)
        opened = afxdp.open_ports(["one"], area)[0]
    except NearstateError as error:
        return str(error)
    port = opened.port
    port.fill_ring[:64] = area.stack[:64]
    port.fill_producer[0] += 64
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind(("two", 0))
        poll = select.poll()
        poll.register(opened.fd, select.POLLIN)
        for _ in range(10):  # the link may need a moment after its XDP program was loaded
            sender.send(b"\xff" * 6 + bytes.fromhex("020000000001 88b5") + bytes(46))
            if poll.poll(50):
                break
        else:
            return "the socket opened, but 10 frames sent to it did not arrive"
    link = json.loads(_output(["ip", "-json", "link", "show", "dev", "one"]) or "[{}]")[0]
    native = link.get("xdp", {}).get("mode") == 1
    return "works" if native else "only in generic (slow) mode: the kernel's veth has no native XDP"


def _try(command: list[str], text: str = "") -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TOOL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return "works" if done.returncode == 0 else f"{command[0]}: {' '.join((done.stderr or done.stdout).split())[:200]}"


if __name__ == "__main__":
    print(json.dumps(try_out()))
