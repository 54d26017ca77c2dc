"""How does a checked topology become namespaces, links, a switch and its controller, and exactly that disappear again?

Bringing up the rack overlaps what can be: the controller imports while the hosts' shells start, `ip -batch` makes all links in
one go, then one transaction makes the bridge while interfaces are configured. Link and bridge names carry the run's short id;
all is journalled first. One sysctl of the machine is changed for the length of a run (`_weigh_processes`), and Mininet's own
clean-up, which kills what is not ours, is never called.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from mininet.cli import CLI
from mininet.link import Intf
from mininet.log import setLogLevel
from mininet.net import Mininet

from datastore.base.errors import NearstateError, unknown
from topologies.controller.steering import PARTITIONS
from topologies.emulation import calibration, system
from topologies.emulation import journal as journals
from topologies.emulation.cgroup import CpuLimits
from topologies.emulation.journal import Journal
from topologies.emulation.nodes import Cable, CableEnd, NamespaceHost, ScopedSwitch
from topologies.emulation.processes import ROOT, Launcher
from topologies.emulation.topology import MIDDLE, Plan, plan

CLIENT_ADDRESS, SERVER_ADDRESS = "10.0.0.1", "10.128.0.1"
TRANSLATED_NETWORK = "10.64.0.0/16"
"""Where a NAT's external and a balancer's virtual addresses are: servers route it to the client, the client to `server`."""
STORAGE_NETWORK = "192.168.77"
STORAGE_RTO_MS = 20
"""How long TCP waits at least before it sends a lost segment again (Linux: 200 ms, more than a lease). As data centers set it (V.
Vasudevan et al.: Safe and effective fine-grained TCP retransmissions for datacenter communication, SIGCOMM 2009)."""
IPV6_PREFIX = "fd00::"
"""Of unique local addresses (RFC 4193): who has a.b.c.d on `net` has fd00::a.b.c.d, too."""
CONTROLLER_S, WIRE_S = 15.0, 60.0
Mininet.inited = True  # its init() raises a dozen sysctls of the machine and does nothing else we need


@dataclass(frozen=True)
class Interface:
    """A network device of a host, by its name in the host's namespace."""

    name: str
    mac: str
    ipv4: str | None
    ipv6: str | None = None


@dataclass(frozen=True)
class EmulatedHost:
    """A host of the running network. pid owns its network namespace; cgroup, if its CPU is limited, is the folder to join."""

    name: str
    role: str
    pid: int
    interfaces: Mapping[str, Interface]
    cgroup: Path | None


def ipv6_address(ipv4: str) -> str:
    """Return the IPv6 address that goes with an IPv4 one, which may have its prefix length."""
    return str(IPv6Address(int(IPv6Address(IPV6_PREFIX)) + int(IPv4Address(ipv4.split("/")[0]))))


def middle_names(number: int) -> tuple[str, str]:
    """Return the interfaces in the middle of a delayed cable: a3 faces its first end, b3 the other."""
    return f"a{number}", f"b{number}"


def tap_names(number: int) -> tuple[str, str]:
    """Return the taps of a recorded cable, devices in the middle's namespace: ra3 faces its first end, rb3 the other."""
    return f"ra{number}", f"rb{number}"


def without_offloads(interface: str) -> None:
    """Have the stack complete every frame before it leaves: an AF_XDP socket or a userspace switch takes it as it is.

    With checksums left to the device TCP through the userspace switch loses every segment; with segmentation left to it frames
    exceed what an AF_XDP frame holds. On all interfaces and datapaths alike, so that the same frames travel everywhere.
    """
    for offload in ("tx_checksum", "tso", "gso", "gro"):
        system.set_offload(interface, offload, False)


def datapath() -> str:
    """Return the best datapath here: "kernel", "afxdp" or "userspace". Raises NearstateError without an Open vSwitch."""
    if shutil.which("ovs-vsctl") is None:
        raise NearstateError("ovs-vsctl is not installed: install the distribution's package openvswitch-switch")
    if shutil.which("modprobe") and not Path("/sys/module/openvswitch").exists():
        subprocess.run(["modprobe", "-q", "openvswitch"], capture_output=True, check=False)
    command = ["ovs-vsctl", "--timeout=5", "get", "Open_vSwitch", ".", "iface_types"]
    try:
        types = system.run(command, dict(os.environ))
        system.run(["ovs-appctl", "--timeout=5", "version"], dict(os.environ))  # the database answers also when the switch died
    except NearstateError as error:
        raise NearstateError(f"Open vSwitch does not answer ({error}): start it, `ovs-ctl start` or "
                             "`systemctl start openvswitch-switch`") from None  # fmt: skip
    if system.has_generic_netlink_family("ovs_datapath"):
        return "kernel"
    return "afxdp" if "afxdp-nonpmd" in types else "userspace"


class Network:
    """An emulated data center. `topology` and `parameters` are checked completely here; nothing starts before `start`.

    recorded: every cable goes through taps (`taps`, `recorder.py`), which costs each frame one more veth pair.

    The thread that calls `start` must live until `stop`: hosts and controller die with it (PR_SET_PDEATHSIG).

    Raises NearstateError for an unknown topology or parameter, with the nearest valid names.
    """

    def __init__(
        self,
        topology: str,
        parameters: Mapping[str, Any],
        run_id: str,
        launcher: Launcher,
        journal: Journal,
        recorded: bool = False,
    ) -> None:
        self.plan: Plan = plan(topology, parameters)
        self.run_id, self.launcher, self.journal, self.recorded = run_id, launcher, journal, recorded
        self.hosts: dict[str, EmulatedHost] = {}
        self.switch: ScopedSwitch | None = None
        self.delay_mechanism = "none"
        self.base_us: float | None = None  # what a round trip costs before delays are put in; None: there are none
        self.trim_us = 0.0  # by how much delay lines hold frames shorter than asked for, see wire.py
        self.seconds: dict[str, float] = {}
        self._limits = CpuLimits(journal)
        self._mininet: Mininet | None = None
        self._middle: NamespaceHost | None = None  # the namespace in which cables have their delays
        self._controller: subprocess.Popen[bytes] | None = None
        self._commands: socket.socket | None = None
        self._files: list[Path] = []
        self._stages: list[list[str]] = []  # of NF hosts, as the controller was told
        self._calibration: calibration.Calibration | None = None

    def __enter__(self) -> Network:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Network:
        """Bring everything up, rules installed. On an error everything is taken down again."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        if os.geteuid() != 0:
            raise NearstateError("the emulation makes network namespaces: run as root")
        clock = _Stopwatch(self.seconds)
        self._weigh_processes()
        has_switch = bool(self.plan.graph.switches())
        kind = datapath() if has_switch else ""
        controller_port = self._start_controller() if has_switch else 0
        clock.lap("controller_started")
        self._mininet = self._build(kind)
        for host in self._mininet.hosts:
            host.await_namespace()
        clock.lap("namespaces")
        self._make_links()
        if self._middle:
            self._prepare_middles()
        clock.lap("links")
        starting = self.switch.starting(controller_port) if self.switch else None
        self._configure_hosts()
        clock.lap("hosts_configured")
        if starting:
            starting.finish()
            clock.lap("bridge")
            self._command({"command": "ready"})
            self._stages = [[host.name for host in self.hosts.values() if host.role == "nf"]]
            clock.lap("rules")
        if self.middles():
            self.base_us = calibration.base_us(self)
            self._put_delays_in()
            clock.lap("delays")

    def _weigh_processes(self) -> None:
        """Have the scheduler share cores among processes and not first among sessions (sched(7), the autogroup feature).

        Else the controller, a session of its own, waited up to 0.1 s for a busy core with 3% of what it did, whatever its nice
        value (Linux 6.18, two cores), and packets of a move waited for it. Where the setting cannot be written it stays.
        """
        with contextlib.suppress(OSError):
            if system.AUTOGROUP.read_text().strip() != "0":
                self.journal.setting(system.AUTOGROUP, system.AUTOGROUP.read_text().strip())
                system.AUTOGROUP.write_text("0")

    def _build(self, kind: str) -> Mininet:
        setLogLevel("error")

        def make_host(name: str, **params: Any) -> NamespaceHost:
            return NamespaceHost(name, journal=self.journal, **params)

        def make_switch(name: str, **params: Any) -> ScopedSwitch:
            return ScopedSwitch(name, journal=self.journal, datapath=kind, **params)

        mininet = Mininet(topo=None, host=make_host, switch=make_switch, link=Cable, intf=CableEnd, controller=None, build=False)
        self._mininet = mininet  # before it is full: what was made until an error is stopped too
        mininet.topo = self.plan.graph
        mininet.build()
        if mininet.switches:
            self.switch = mininet.switches[0]
            self.switch.name_ports()
        if self.recorded or any(cable.delay_us for cable in mininet.links):
            self._middle = mininet.addHost(MIDDLE, role=MIDDLE)
        return mininet

    # links and addresses

    def _make_links(self) -> None:
        """Make every veth pair with its ends in place, in one `ip -batch`."""
        assert self._mininet is not None
        batch = []
        for number, cable in enumerate(self._mininet.links):
            ends = []
            for side, interface in enumerate((cable.intf1, cable.intf2)):
                interface.mac = f"02:00:00:00:{number:02x}:{side + 1:02x}"
                ends.append(self._end(interface))
            pairs = self._pairs(number, ends, bool(cable.delay_us))
            batch += [f"link add {end} type veth peer {peer}" for end, peer in pairs]
        if self.switch:
            names = [interface.name for interface in self.switch.ports_in_use()]
            for name in names:
                self.journal.link(name)
            # nothing may change before IPv6 is off, or the kernel sends router solicitations into the switch
            system.run(["ip", "-batch", "-"], self.journal.environment(), "\n".join(batch))
            for name in names:
                system.without_ipv6(name)
            batch = [f"link set {name} up" for name in names]
        system.run(["ip", "-batch", "-"], self.journal.environment(), "\n".join(batch))

    def _pairs(self, number: int, ends: Sequence[str], delayed: bool) -> list[tuple[str, str]]:
        """Return the veth pairs of one cable as `ip` names their ends.

        end == other end; delayed: end == a3 (delay) b3 == end; recorded: end == ra3 (join) rb3 == end; both:
        end == ra3 (join) qa3 == a3 (delay) b3 == qb3 (join) rb3 == end
        """

        def inside(names: Sequence[str]) -> list[str]:
            assert self._middle is not None
            return [f"name {name} netns {self._middle.pid}" for name in names]

        if not self.recorded:
            return list(zip(ends, inside(middle_names(number)))) if delayed else [(ends[0], ends[1])]
        pairs = list(zip(ends, inside(tap_names(number))))
        behind = zip(inside(_behind_taps(number)), inside(middle_names(number))) if delayed else ()
        return [*pairs, *behind]

    def _end(self, interface: Intf) -> str:
        if isinstance(interface.node, NamespaceHost):
            return f"name {interface.name} netns {interface.node.pid} address {interface.mac}"
        assert self.switch is not None
        return f"name {interface.name} group {self._link_group()} address {interface.mac}"

    def _link_group(self) -> int:
        """Return the run's own link group: one command then removes all its links together."""
        return int(self.journal.short, 36) + 1_000_000

    def _configure_hosts(self) -> None:
        """Give interfaces their addresses and static neighbours; all hosts' `ip -batch` run side by side."""
        addresses = self._addresses()
        running = []
        for host in self._emulated():
            interfaces = {}
            for interface in host.intfs.values():
                ipv4 = addresses.get((host.name, interface.name))
                ipv6 = ipv6_address(ipv4) if ipv4 and interface.name == "net" and system.has_ipv6() else None
                interface.ip = ipv4.partition("/")[0] if ipv4 else None
                interfaces[interface.name] = Interface(interface.name, interface.mac, ipv4, ipv6)
            cgroup = self._limits.limit(host.name, self.plan.cpu[host.role]) if host.role in self.plan.cpu else None
            if cgroup:
                (cgroup / "cgroup.procs").write_text(str(host.pid))
            self.hosts[host.name] = EmulatedHost(host.name, host.role, host.pid, interfaces, cgroup)
        for name, emulated in self.hosts.items():
            with system.network_namespace(emulated.pid):
                for interface in emulated.interfaces.values():
                    (system.with_quiet_ipv6 if interface.ipv6 else system.without_ipv6)(interface.name)
                    without_offloads(interface.name)
                running.append(system.start(["ip", "-batch", "-"], self.journal.environment(), self._host_batch(name)))
        for started in running:
            started.finish()

    def _emulated(self) -> list[NamespaceHost]:
        """Return Mininet's hosts without the middle of the cables."""
        assert self._mininet is not None
        return [host for host in self._mininet.hosts if host is not self._middle]

    def _addresses(self) -> dict[tuple[str, str], str]:
        """Return address/prefix by host and interface: the packet loop's ports have none, storage ones count up."""
        addresses = {("client", "net"): f"{CLIENT_ADDRESS}/8"}
        servers = [host.name for host in self._emulated() if host.role == "server"]
        addresses |= {(name, "net"): f"{IPv4Address(SERVER_ADDRESS) + number}/8" for number, name in enumerate(servers)}
        stored = [host.name for host in self._emulated() if "storage" in host.nameToIntf]
        for number, name in enumerate(stored, 1):
            addresses[name, "storage"] = f"{STORAGE_NETWORK}.{number}/24"
        return addresses

    def _host_batch(self, name: str) -> str:
        lines = ["link set lo up"]
        for interface in self.hosts[name].interfaces.values():
            if interface.ipv4:
                lines.append(f"address add {interface.ipv4} dev {interface.name}")
            if interface.ipv6:  # on the interface it would have the kernel report a multicast group (RFC 4861, section 7.2.1)
                lines.append(f"address add {interface.ipv6}/128 dev lo nodad")
            lines += self._up(name, interface)
        return "\n".join(lines)

    def _up(self, name: str, interface: Interface) -> list[str]:
        """Return the commands that bring an interface up, with the neighbours and routes the kernel forgets when it is down."""
        lines = [f"link set {interface.name} up"]
        for peer in self._neighbours(name, interface.name):
            for address in filter(None, (peer.ipv4, peer.ipv6)):
                lines.append(f"neigh replace {address.split('/')[0]} lladdr {peer.mac} dev {interface.name} nud permanent")
            if peer.ipv6:
                lines.append(f"route replace {peer.ipv6}/128 dev {interface.name} src {interface.ipv6}")
        if interface.name == "storage" and interface.ipv4:
            route = f"{STORAGE_NETWORK}.0/24 dev storage proto kernel scope link src {interface.ipv4.partition('/')[0]}"
            lines.append(f"route replace {route} rto_min {STORAGE_RTO_MS}ms")
        if interface.name == "net":
            opposite = SERVER_ADDRESS if self.hosts[name].role == "client" else CLIENT_ADDRESS
            lines.append(f"route replace {TRANSLATED_NETWORK} via {opposite} dev net")
        return lines

    def _neighbours(self, name: str, interface: str) -> Iterator[Interface]:
        """Yield every other interface of the same name that has an address: storage among storage, client with server."""
        for host in self.hosts.values():
            other = host.interfaces.get(interface)
            if host.name != name and other and other.ipv4:
                yield other

    # delays

    def _prepare_middles(self) -> None:
        """Bring all interfaces in the middle up and join the taps; through a delayed cable nothing passes yet."""
        assert self._middle is not None
        joints = self._joints()
        names = {name for _, ends, _ in self.middles() for name in ends} | {name for joint in joints for name in joint}
        with system.network_namespace(self._middle.pid):
            for name in names:
                system.without_ipv6(name)
                without_offloads(name)
            system.run(["ip", "-batch", "-"], self.journal.environment(), "\n".join(f"link set {name} up" for name in names))
            system.run(["tc", "-batch", "-"], self.journal.environment(), "\n".join(_redirects(joints)))

    def _joints(self) -> list[tuple[str, str]]:
        """Return the pairs of interfaces in the middle between which frames pass unchanged, because a tap is on one of them."""
        assert self._mininet is not None
        joints: list[tuple[str, str]] = []
        for number, cable in enumerate(self._mininet.links if self.recorded else ()):
            joints += zip(tap_names(number), _behind_taps(number)) if cable.delay_us else [tap_names(number)]
        return joints

    def taps(self) -> list[tuple[str, str, str]]:
        """Return (host, interface, tap) of each host interface, if the network is recorded.

        A packet socket on the tap, in the namespace of `middle_pid`, sees what the interface sends as incoming and what it
        receives as outgoing.
        """
        if not self.recorded:
            return []
        ends = [(host, interface, tap) for number, (a, a_interface, b, b_interface, _) in enumerate(self.cables())
                for (host, interface), tap in zip(((a, a_interface), (b, b_interface)), tap_names(number))]  # fmt: skip
        return [end for end in ends if end[0] in self.hosts]

    def middles(self) -> list[tuple[int, tuple[str, str], float]]:
        """Return (number, interfaces in the middle, delay_us) of every delayed cable."""
        assert self._mininet is not None
        cables = enumerate(self._mininet.links)
        return [(number, middle_names(number), cable.delay_us) for number, cable in cables if cable.delay_us]

    def middle_pid(self) -> int:
        """Return the process that owns the namespace of the middles."""
        assert self._middle is not None
        return int(self._middle.pid)

    def _put_delays_in(self) -> None:
        """Join the two halves of every delayed cable: bridges with netem where the kernel has it, else the wire process.

        Not at the hosts' own interfaces: what an AF_XDP socket sends bypasses the queueing disciplines of its interface.
        """
        assert self._middle is not None
        with system.network_namespace(self._middle.pid):
            try:
                first = self.middles()[0][1][0]
                system.run(["tc", "qdisc", "add", "dev", first, "root", "netem", "delay", "1us"], self.journal.environment())
                system.run(["tc", "qdisc", "del", "dev", first, "root"], self.journal.environment())
                self.delay_mechanism = "netem"
            except NearstateError:
                self.delay_mechanism = "wire"
            if self.delay_mechanism == "netem":
                links, queues = self._netem_batches()
                system.run(["ip", "-batch", "-"], self.journal.environment(), links)
                system.run(["tc", "-batch", "-"], self.journal.environment(), queues)
        if self.delay_mechanism == "wire":
            cables = [
                {"name": f"cable{number}", "interfaces": list(names), "delay_us": delay_us}
                for number, names, delay_us in self.middles()
            ]
            host = EmulatedHost(MIDDLE, MIDDLE, self._middle.pid, {}, None)
            wire = self.launcher.spawn(MIDDLE, host, "topologies.emulation.wire:run", {"cables": cables}, prompt=True)
            if wire.receive(WIRE_S) is None:
                raise NearstateError(f"the delay line was not ready in {WIRE_S:g} s; its log is {wire.log}")
            self.trim_us = calibration.trim_us(self, self.base_us or 0.0)
            wire.send({"trim_us": self.trim_us})
            wire.receive(WIRE_S)

    def _netem_batches(self) -> tuple[str, str]:
        links, queues = [], []
        for number, names, delay_us in self.middles():
            links.append(f"link add w{number} type bridge stp_state 0 mcast_snooping 0")
            for name in names:
                links.append(f"link set {name} master w{number}")
                queues.append(f"qdisc add dev {name} root netem limit 100000 delay {delay_us:g}us")
            links.append(f"link set w{number} up")
        return "\n".join(links), "\n".join(queues)

    # controller

    def _start_controller(self) -> int:
        """Start the controller's process on sockets that listen already; returns the OpenFlow port."""
        listener = socket.create_server(("127.0.0.1", 0))
        path, topology = self.commands_path(), self.commands_path().with_suffix(".json")
        for file in (path, topology):
            self.journal.file(file)
            self._files.append(file)
            file.unlink(missing_ok=True)
        self._commands = None
        commands = socket.socket(socket.AF_UNIX)
        os.fchmod(commands.fileno(), 0o600)  # what bind(2) gives to the file
        commands.bind(str(path))
        commands.listen()
        topology.write_text(json.dumps(self._port_numbers()))
        descriptors = [str(listener.fileno()), str(commands.fileno())]
        self.journal.process("controller")
        with listener, commands, (self.launcher.logs / "controller.log").open("ab") as log:
            self._controller = subprocess.Popen(
                [sys.executable, "-m", "topologies.controller.app", str(topology), *descriptors], cwd=ROOT,
                env={**self.journal.environment(), "OSKEN_HUB_TYPE": "native"}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[listener.fileno(), commands.fileno()], preexec_fn=system.dying_with_us(), start_new_session=True,
            )  # fmt: skip
            return int(listener.getsockname()[1])

    def commands_path(self) -> Path:
        """Return the path of the controller's command socket."""
        return journals.folder() / f"{self.journal.short}.controller"

    def _port_numbers(self) -> dict[str, Any]:
        """Return what `steering.Ports` needs. Port numbers are the order of the topology's links, MACs their numbers in it."""
        graph = self.plan.graph
        ports: dict[str, Any] = {"client": 0, "server": 0, "instances": {}, "storage": {}, "others": {}}
        for number, (host, _, info) in enumerate(graph.links(sort=True, withInfo=True)):
            port, interface, mac = info["port2"], info["intfName1"], f"02:00:00:00:{number:02x}:01"
            if interface == "net" and host in ("client", "server"):
                ports[host] = port
            elif interface in ("net", "storage"):
                ports["others" if interface == "net" else "storage"][port] = mac
            else:
                ports["instances"].setdefault(host, [0, 0])[interface == "outside"] = port
        return ports

    def _command(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the controller. Raises NearstateError with its reason when it refuses or does not answer."""
        if self._controller is None:
            raise NearstateError(f"topology {self.plan.name} has no switch to steer")
        if self._commands is None:
            self._commands = socket.socket(socket.AF_UNIX)
            self._commands.settimeout(CONTROLLER_S)
            self._commands.connect(str(self.commands_path()))
        log = self.launcher.logs / "controller.log"
        try:
            self._commands.sendall(json.dumps(request).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                if not (received := self._commands.recv(65536)):
                    raise ConnectionError("it closed the connection")
                answer += received
        except OSError as error:
            raise NearstateError(f"controller: {request['command']}: {error or 'no answer'}; its log is {log}") from None
        parsed = json.loads(answer)
        if "error" in parsed:
            raise NearstateError(f"controller: {request['command']}: {parsed['error']}")
        return dict(parsed)

    def steer(self, partitions: Sequence[int], instance: str, returning: str | None = None) -> None:
        """Send these partitions to an NF host; returns when the switch has confirmed the rules.

        returning: the NF host that the answers, from the server to the client, go to; None: the same.
        """
        if self.switch is None and instance in self.hosts:
            return  # back to back: everything meets the one instance anyway
        known = [host.name for host in self.hosts.values() if host.role == "nf"]
        for name in (instance, returning or instance):
            if name not in known:
                raise unknown("instance", name, known)
        self._command({"command": "steer", "partitions": [int(p) for p in partitions], "instance": instance,
                       "return": returning or instance})  # fmt: skip

    def follow(self, instances: Sequence[str]) -> int:
        """Send each partition, answers included, to the NF host named; returns when the switch has confirmed, how many changed.

        Raises NearstateError unless there is a name for each partition, and where a chain has several stages.
        """
        if self.switch is None and list(instances) == self.steering():
            return 0
        return int(self._command({"command": "follow", "instances": list(instances)})["steered"])

    def settle(self) -> None:
        """Wait until the switch does for every flow as its rules say since the last `steer` or `follow`."""
        self._command({"command": "settled"})

    def ports_down(self) -> list[str]:
        """Return the NF hosts' interfaces, as "nf1.inside", whose link the switch sees down."""
        return list(self._command({"command": "ports"})["down"])

    def chain(self, stages: Sequence[Sequence[str]]) -> None:
        """Have packets meet an NF host of each stage, the innermost first, and answers in the opposite order.

        Partitions are dealt to each stage's hosts in turn. At the start all NF hosts are one stage.

        Raises NearstateError where there is no switch to carry them from one to the next.
        """
        wanted = [list(stage) for stage in stages]
        if self.switch is None and len(wanted) == 1:
            return
        if wanted != self._stages:
            self._command({"command": "chain", "stages": wanted})
            self._stages = wanted

    def steering(self) -> list[str]:
        """Return the instance that gets what clients send, for each partition; of a chain over hosts as "nf1|nf2"."""
        if self.switch is None:
            return [self.plan.hosts("nf")[0]] * PARTITIONS
        return list(self._command({"command": "where"})["instances"])

    def show(self) -> dict[str, Any]:
        """Return the controller's picture: instances, returns, rules, refused_packets, connected."""
        return self._command({"command": "show"})

    def sent_bytes(self, interface: str) -> dict[str, int]:
        """Return how many bytes each host has sent on its interface of this name, by host; those without one are left out."""
        sent = {}
        for host in self.hosts.values():
            for line in Path(f"/proc/{host.pid}/net/dev").read_text().splitlines()[2:]:
                name, _, numbers = line.partition(":")
                if name.strip() == interface:
                    sent[host.name] = int(numbers.split()[8])
        return sent

    # trouble

    def cut(self, host: str, interface: str | None = None) -> None:
        """Cut a host off at an interface, or at all: from here on nothing leaves or enters there, until `mend`.

        Raises NearstateError for a host or an interface that does not exist.
        """
        wanted = self._interfaces(host, interface)
        with system.network_namespace(self.hosts[host].pid):
            for cut in wanted:
                system.link_down(cut.name)

    def mend(self, host: str, interface: str | None = None) -> None:
        """Undo `cut`. Raises NearstateError for a host or an interface that does not exist."""
        lines = [line for mended in self._interfaces(host, interface) for line in self._up(host, mended)]
        with system.network_namespace(self.hosts[host].pid):
            system.run(["ip", "-batch", "-"], self.journal.environment(), "\n".join(lines))

    def _interfaces(self, host: str, interface: str | None) -> list[Interface]:
        if host not in self.hosts:
            raise unknown("host", host, self.hosts)
        there = self.hosts[host].interfaces
        if interface is not None and interface not in there:
            raise unknown(f"interface of {host}", interface, there)
        return [there[interface]] if interface else list(there.values())

    # measuring and telling

    def calibrate(self) -> calibration.Calibration:
        """Measure delay and loss of the network's paths; call it before an NF takes its interfaces."""
        self._calibration = calibration.calibrate(self)
        return self._calibration

    def cables(self) -> list[tuple[str, str, str, str, float]]:
        """Return (host, interface, other node, other interface, delay_us) of every cable."""
        assert self._mininet is not None
        return [
            (cable.intf1.node.name, cable.intf1.name, cable.intf2.node.name, cable.intf2.name, cable.delay_us)
            for cable in self._mininet.links
        ]

    def describe(self) -> dict[str, Any]:
        """Return the network as JSON data for the report: nodes with their processes, links with their delays."""
        nodes = [
            {"name": host.name, "role": host.role, "processes": [process.name for process in self.launcher.on_host(host.name)]}
            for host in self.hosts.values()
        ]
        if self.switch:
            nodes.append({"name": self.switch.name, "role": "switch", "processes": []})
        links = [{"a": a, "b": b, "label": interface, "delay_us": delay_us} for a, interface, b, _, delay_us in self.cables()]
        return {
            "name": self.plan.name,
            "nodes": nodes,
            "links": links,
            "datapath": self.switch.datapath if self.switch else "none",
            "delay_mechanism": self.delay_mechanism,
        }

    def shell(self) -> None:
        """Open Mininet's prompt on the running network."""
        setLogLevel("info")
        CLI(self._mininet)

    def stop(self) -> None:
        """Take everything down again; whatever state `start` reached."""
        clock = _Stopwatch(self.seconds)
        self.launcher.kill_on([*self.hosts, MIDDLE])
        if self._controller:
            self._controller.kill()
        if self._commands:
            self._commands.close()
            self._commands = None
        removing = self.switch.stopping() if self.switch else None
        if self._mininet:
            for host in self._mininet.hosts:
                if host.shell:
                    host.shell.kill()
            for host in self._mininet.hosts:
                host.terminate()
        if self._controller:
            self._controller.wait()
            self._controller = None
        clock.lap("processes_gone")
        failures = []
        if self.switch and removing:
            try:
                self.switch.stopped(removing)
            except NearstateError as error:  # the switch died: all else must go nevertheless
                failures.append(error)
            clock.lap("bridge_gone")
            self._remove_links()
            self.switch.terminate()
            clock.lap("links_gone")
        self._limits.remove()
        for file in self._files:
            file.unlink(missing_ok=True)
            self.journal.forget("file", file)
        self._files.clear()
        self.hosts, self.switch, self._mininet, self._middle = {}, None, None, None
        self.base_us, self.trim_us = None, 0.0
        if failures:
            raise failures[0]

    def _remove_links(self) -> None:
        assert self.switch is not None
        names = [interface.name for interface in self.switch.ports_in_use()]
        with contextlib.suppress(NearstateError):  # those of hosts that are gone already went with them
            system.run(["ip", "link", "delete", "group", str(self._link_group())], self.journal.environment())
        deadline = time.monotonic() + journals.REMOVAL_S
        for name in names:
            while Path("/sys/class/net", name).exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            if not Path("/sys/class/net", name).exists():
                self.journal.forget("link", name)


def _behind_taps(number: int) -> tuple[str, str]:
    """Return the devices that a delayed cable's taps are joined with, as its middle takes the taps' place."""
    return f"qa{number}", f"qb{number}"


def _redirects(joints: Sequence[tuple[str, str]]) -> list[str]:
    """Return the `tc` commands that pass every frame from one interface of a joint to the other, both ways.

    Not a bridge: with br_netfilter it drops what is no correct IP packet, and keeps link-local multicast to itself.
    """
    lines = []
    for here, there in [*joints, *(joint[::-1] for joint in joints)]:
        lines.append(f"qdisc add dev {here} ingress")
        everything = f"filter add dev {here} parent ffff: protocol all u32 match u32 0 0"
        lines.append(f"{everything} action mirred egress redirect dev {there}")
    return lines


class _Stopwatch:
    """Seconds of each step, for whoever tunes the start."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, time.monotonic()

    def lap(self, step: str) -> None:
        now = time.monotonic()
        self.seconds[step], self.last = round(now - self.last, 3), now
