"""The few Linux calls the emulation needs and Python lacks: namespaces by process, private folders, death with the parent,
offloads."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datastore.base.errors import NearstateError

_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
CLONE_NEWNS = 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
"""Whether the scheduler shares cores among sessions first, and then among their processes (sched(7))."""
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
SIOCETHTOOL = 0x8946
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
# <linux/ethtool.h>: transmit checksum, TCP segmentation, generic segmentation and receive offload
OFFLOADS = {"rx_checksum": 0x15, "tx_checksum": 0x17, "tso": 0x1F, "gso": 0x24, "gro": 0x2C}


def enter_network_namespace(pid: int) -> None:
    """Move the calling thread into the network namespace of a process."""
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def network_namespace(pid: int) -> Iterator[None]:
    """Within the block, sockets opened, sysctls written and programs started by this thread belong to that namespace."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_network_namespace(pid)
        yield
    finally:
        _setns(home)
        os.close(home)


CAPABILITIES = {"CAP_SYS_ADMIN": 21, "CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_PTRACE": 19}
"""What the emulation needs (capabilities(7)), by bit: namespaces and mounts, links and rules, packet sockets, other processes'
namespaces. A container's root may lack some."""


def missing_capabilities() -> list[str]:
    """Return which of CAPABILITIES this process has not."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    held = int(line.split()[1], 16)
    return [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]


def privilege_advice() -> str:
    """Return what to do where the kernel said no: become root, or have a root that may."""
    if os.geteuid() != 0:
        return "run as root"
    lacking = missing_capabilities()
    if not lacking:
        return "this root has the capabilities, so a policy forbids it (seccomp, AppArmor): give the container `--privileged`"
    options = " ".join(f"--cap-add {name.removeprefix('CAP_')}" for name in lacking)
    return f"this root lacks {', '.join(lacking)}: give the container `--privileged`, or {options}"


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise NearstateError(f"setns into a network namespace: {os.strerror(code)}; {privilege_advice()}")


def private_folder(folder: str, mbytes: int) -> None:
    """Cover an existing folder by an empty one, in memory, that only this process and those it starts see.

    It goes with the last of them, however they end, so nothing in it needs to be cleaned up.
    """
    if _libc.unshare(CLONE_NEWNS) != 0:
        code = ctypes.get_errno()
        raise NearstateError(f"unshare of the mount namespace: {os.strerror(code)}; {privilege_advice()}")
    _mount(None, "/", None, MS_REC | MS_PRIVATE, None)
    _mount("tmpfs", folder, "tmpfs", 0, f"size={mbytes}m,mode=755")


def cover_file(file: str, by: str) -> None:
    """Show this process, after `private_folder`, and those it starts another file in a file's place."""
    _mount(by, file, None, MS_BIND, None)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    texts = [text.encode() if text is not None else None for text in (source, target, kind, options)]
    if _libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]) != 0:
        code = ctypes.get_errno()
        raise NearstateError(f"mount on {target}: {os.strerror(code)}; {privilege_advice()}")


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the *thread* that started it ends (prctl(2), PR_SET_PDEATHSIG)."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


def dying_with_us() -> Callable[[], None]:
    """Return a `preexec_fn`: the process started dies with the thread that starts it."""
    parent = os.getpid()
    return lambda: die_with_parent(parent)


def set_name(name: str) -> None:
    """Set what `ps` and `top` show for this process: 15 bytes."""
    _libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0)


def wait_for_turns() -> None:
    """Have this thread, and those it starts, wait for a core when woken, and not take it from who runs (SCHED_BATCH, sched(7)).

    The hosts of a rack share a few cores, each with bursts to work off. Where each of them, woken by the first packet, takes
    the core from the one that was about to send the next 30, bursts are short and system calls many: with two copies of every
    write a rack on two cores carried 43 to 50 kpps, and with this 84 to 94; with one copy 93 to 103 and 121 to 130. Who may
    not choose (EPERM) stays as he is.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def set_offload(interface: str, offload: str, on: bool) -> None:
    """Switch one of OFFLOADS of an interface of the calling thread's namespace; what a device lacks is left as it is."""
    value = ctypes.create_string_buffer(struct.pack("II", OFFLOADS[offload], on))
    request = struct.pack("16sP8x", interface.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle, contextlib.suppress(OSError):
        fcntl.ioctl(handle, SIOCETHTOOL, request)


def link_down(interface: str) -> None:
    """Set an interface of this network namespace down (netdevice(7)). Raises NearstateError for one that is not there.

    In this process: a helper program takes some 10 ms on a busy machine, and this is how links are cut at a moment.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", interface.encode(), 0)
        try:
            flags = struct.unpack_from("h", fcntl.ioctl(control, SIOCGIFFLAGS, request), 16)[0]
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", interface.encode(), flags & ~IFF_UP))
        except OSError as error:
            raise NearstateError(f"interface {interface!r} cannot be set down: {error.strerror}") from None


def has_generic_netlink_family(name: str) -> bool:
    """Tell whether the kernel has a generic netlink family (asking loads the module that provides it, if there is one)."""
    attribute = struct.pack("HH", 4 + len(name) + 1, 2) + name.encode() + b"\0"  # CTRL_ATTR_FAMILY_NAME
    attribute += bytes(-len(attribute) % 4)
    body = struct.pack("BBH", 3, 1, 0) + attribute  # CTRL_CMD_GETFAMILY
    message = struct.pack("IHHII", 16 + len(body), 16, 1, 1, 0) + body  # GENL_ID_CTRL, NLM_F_REQUEST
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16) as netlink:
        netlink.settimeout(1)
        netlink.send(message)
        return int(struct.unpack_from("H", netlink.recv(8192), 4)[0]) != 2  # NLMSG_ERROR


class Started:
    """A helper program on its way: `finish` waits and turns its failure into one line."""

    def __init__(self, command: Sequence[str], text: str, environment: dict[str, str]) -> None:
        self.command = command
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment, preexec_fn=dying_with_us())  # fmt: skip
        except FileNotFoundError:
            raise NearstateError(f"{command[0]} is not installed: install the package that has it") from None
        self.text = text

    def finish(self, timeout_s: float = 20) -> str:
        """Return the standard output. Raises NearstateError with the program's own words."""
        try:
            output, complaint = self.process.communicate(self.text, timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise NearstateError(f"{' '.join(self.command)[:120]}: no answer in {timeout_s:g} s") from None
        if self.process.returncode != 0:
            raise NearstateError(f"{' '.join(self.command)[:120]}: {' '.join(complaint.split())[:300]}")
        return output


def start(command: Sequence[str], environment: dict[str, str], text: str = "") -> Started:
    """Start a helper program with the run's marker; it dies with the caller."""
    return Started(command, text, environment)


def run(command: Sequence[str], environment: dict[str, str], text: str = "", timeout_s: float = 20) -> str:
    """Run a helper program to its end and return its output."""
    return Started(command, text, environment).finish(timeout_s)


def has_ipv6() -> bool:
    """Tell whether this kernel speaks IPv6."""
    return Path("/proc/sys/net/ipv6").exists()


def with_quiet_ipv6(interface: str) -> None:
    """IPv6 without a word of its own on one interface: no link-local address, so no solicitations, and no advertisement heard.

    It is on there, and on the loopback interface, also where the machine has it off by default (`disable_ipv6` of sysctl.d, or
    ipv6.disable_ipv6=1 at boot): a new namespace may begin with that.
    """
    for name, value in (("addr_gen_mode", 1), ("accept_ra", 0), ("accept_dad", 0), ("disable_ipv6", 0)):
        path = Path(f"/proc/sys/net/ipv6/conf/{interface}/{name}")
        if path.exists():
            path.write_text(str(value))
    loopback = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
    if loopback.exists() and loopback.read_text().strip() != "0":
        loopback.write_text("0")


def without_ipv6(interface: str) -> None:
    """No link-local address, so no router solicitation or multicast noise, on one interface ('default': all later ones)."""
    path = Path(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6")
    if path.exists():
        path.write_text("1")
