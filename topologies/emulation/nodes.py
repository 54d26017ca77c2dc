"""Mininet's hosts, cables and switch, without the parts that are slow or reach beyond the run.

Mininet configures every interface through a shell per host, one `ifconfig` at a time; here the shells start all at once and are
only talked to when someone types at the prompt, and `network.py` makes and configures all links in a few batches.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from mininet.link import Intf, Link
from mininet.node import Host, Node, OVSSwitch
from mininet.util import getincrementaldecoder

from datastore.base.errors import NearstateError
from topologies.emulation import system
from topologies.emulation.journal import Journal
from topologies.emulation.processes import cpu_seconds
from topologies.emulation.topology import port_name

NAMESPACE_S = 5.0


class QuietShell(Node):
    """A Mininet node whose shell carries the run's marker, dies with the runner, and is not waited for before its first use."""

    def __init__(self, name: str, journal: Journal, **params: Any) -> None:
        self.journal = journal
        self._prompted = False
        super().__init__(name, **params)

    @classmethod
    def setup(cls) -> None:
        if shutil.which("mnexec") is None:
            raise NearstateError("mnexec is not installed: install the distribution's package mininet (PyPI's lacks it)")

    def _popen(self, cmd: list[str], **params: Any) -> Any:
        self.journal.process(f"shell of {self.name}")
        environment = {**self.journal.environment(), **params.pop("env", {})}
        return subprocess.Popen(cmd, env=environment, preexec_fn=system.dying_with_us(), **params)

    def startShell(self, mnopts: str | None = None) -> None:
        """Start the shell, as Mininet's own does, but leave its first prompt for `sendCmd` to wait for."""
        options = ("-cd" if mnopts is None else mnopts) + ("n" if self.inNamespace else "")
        command = ["mnexec", options, "env", f"PS1={chr(127)}", "bash", "--norc", "--noediting", "-is", f"mininet:{self.name}"]
        self.master, self.slave = pty.openpty()
        self.shell = self._popen(command, stdin=self.slave, stdout=self.slave, stderr=self.slave, close_fds=False)
        self.stdin = self.stdout = os.fdopen(self.master, "r")
        self.pid = self.shell.pid
        self.pollOut = select.poll()
        self.pollOut.register(self.stdout)
        self.outToNode[self.stdout.fileno()] = self.inToNode[self.stdin.fileno()] = self
        self.execed, self.lastCmd, self.lastPid, self.readbuf = False, None, None, ""
        self.decoder = getincrementaldecoder()

    def sendCmd(self, *args: Any, **kwargs: Any) -> None:
        if not self._prompted:
            self._prompted = True
            self.waiting = True
            self.waitOutput()
            self.cmd("unset HISTFILE; stty -echo; set +m")
        super().sendCmd(*args, **kwargs)

    def await_namespace(self) -> None:
        """Wait until the shell has left the runner's network namespace (mnexec does so before it becomes the shell)."""
        ours, deadline = Path("/proc/self/ns/net").readlink(), time.monotonic() + NAMESPACE_S
        while True:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{self.pid}/ns/net").readlink() != ours:
                    return
            if self.shell.poll() is not None or time.monotonic() > deadline:
                raise NearstateError(f"host {self.name}: no network namespace; {system.privilege_advice()}")
            time.sleep(0.001)

    def terminate(self) -> None:
        """Kill the shell; nothing in it is worth a farewell."""
        if self.shell:
            with contextlib.suppress(ProcessLookupError):
                self.shell.kill()
            self.outToNode.pop(self.stdout.fileno(), None)
            self.inToNode.pop(self.stdin.fileno(), None)
            self.cleanup()


class NamespaceHost(QuietShell, Host):
    """A host: a network namespace held by its shell. `role` comes from the topology."""

    def __init__(self, name: str, role: str, journal: Journal, **params: Any) -> None:
        self.role = role
        super().__init__(name, journal=journal, **params)

    def configDefault(self, **_: Any) -> None:
        """Nothing: the network configures all interfaces at once."""

    def IP(self, intf: Any = None) -> str | None:
        """Return an interface's address; without one that of the first that has one: the packet loop's own have none."""
        return super().IP(intf) if intf else next((end.ip for end in self.intfList() if end.ip), None)


class Cable(Link):
    """A link whose devices the network makes later, all in one batch. `delay_us` is for each direction."""

    def __init__(self, node1: Node, node2: Node, delay_us: float = 0.0, **params: Any) -> None:
        self.delay_us = delay_us
        super().__init__(node1, node2, **params)

    @classmethod
    def makeIntfPair(cls, *_: Any, **__: Any) -> tuple[None, None]:
        return None, None

    def delete(self) -> None:
        """Nothing: links go in one batch."""


class CableEnd(Intf):
    """An interface that is configured in a batch, not by commands."""

    def config(self, **_: Any) -> dict[str, Any]:
        return {}

    def setMAC(self, macstr: str) -> None:
        self.mac = macstr


class ScopedSwitch(QuietShell, OVSSwitch):
    """An Open vSwitch bridge named by the run. One ovs-vsctl transaction makes it with all ports, another removes it.

    datapath: "kernel"; "afxdp" (userspace, ports of type afxdp-nonpmd); "userspace" (userspace, plain ports).
    """

    def __init__(self, name: str, journal: Journal, datapath: str, **params: Any) -> None:
        params.pop("batch", None)
        super().__init__(name, journal=journal, failMode="secure", datapath=datapath, protocols="OpenFlow13", **params)
        self.bridge = f"ns{journal.short}"

    def startShell(self, mnopts: str | None = None) -> None:
        """No shell before the first command: a switch rarely gets one."""
        self.shell: Any = None
        self.waiting, self.pid = False, os.getpid()

    def sendCmd(self, *args: Any, **kwargs: Any) -> None:
        if self.shell is None:
            QuietShell.startShell(self)
        super().sendCmd(*args, **kwargs)

    def cmd(self, *args: Any, **kwargs: Any) -> Any:
        if self.shell is None:
            QuietShell.startShell(self)
        return super().cmd(*args, **kwargs)

    def dpctl(self, *args: Any) -> Any:
        """Run ovs-ofctl on the bridge (the prompt's `dpctl`)."""
        return self.cmd("ovs-ofctl", "-O", "OpenFlow13", args[0], self.bridge, *args[1:])

    def name_ports(self) -> None:
        """Give the ports device names with the run and what is plugged in ("nsk3x9-nf1i"), in place of Mininet's ("tor-eth3")."""
        for interface in self.ports_in_use():
            end = interface.link.intf1 if interface is interface.link.intf2 else interface.link.intf2
            del self.nameToIntf[interface.name]
            interface.name = port_name(self.bridge, end.node.name, end.node.role, end.name)
            self.nameToIntf[interface.name] = interface

    def starting(self, controller_port: int) -> system.Started:
        """Make the bridge with its ports and controller, in one transaction; returns at once."""
        self.journal.bridge(self.bridge)
        kind = "" if self.datapath == "kernel" else "netdev"
        command = [
            "ovs-vsctl", "--timeout=20", "--", "--id=@controller", "create", "Controller",
            f'target="tcp:127.0.0.1:{controller_port}"', "max_backoff=1000",
            "--", "add-br", self.bridge,
            "--", "set", "bridge", self.bridge, "controller=[@controller]", "fail_mode=secure", "protocols=OpenFlow13",
            f"datapath_type={kind or 'system'}", "other_config:disable-in-band=true",
            f"other_config:datapath-id={self.dpid}", "mcast_snooping_enable=false",
        ]  # fmt: skip
        for interface in self.ports_in_use():
            name = interface.name
            command += [
                "--",
                "add-port",
                self.bridge,
                name,
                "--",
                "set",
                "interface",
                name,
                f"ofport_request={self.ports[interface]}",
            ]
            if self.datapath == "afxdp":
                command += ["type=afxdp-nonpmd", "options:xdp-mode=native"]  # trying the other modes first costs 0.23 s a port
        return system.start(command, self.journal.environment())

    def ports_in_use(self) -> list[Intf]:
        """Return the ports in the order of their numbers, without Mininet's own `lo`."""
        return [interface for _, interface in sorted(self.intfs.items()) if interface.name != "lo"]

    def stopping(self) -> system.Started:
        """Remove the bridge (its links are the network's); returns at once, `stopped` waits."""
        return system.start(["ovs-vsctl", "--timeout=10", "--if-exists", "del-br", self.bridge], self.journal.environment())

    def stopped(self, removing: system.Started) -> None:
        removing.finish()
        self.journal.forget("bridge", self.bridge)

    def cpu_seconds(self) -> float:
        """Return the CPU time of ovs-vswitchd, which all userspace bridges of this machine share; the kernel datapath's work is
        done in the context of whoever sends and is not in it."""
        with contextlib.suppress(OSError, ValueError):
            return cpu_seconds(int(Path("/var/run/openvswitch/ovs-vswitchd.pid").read_text()))
        return 0.0

    def port_statistics(self) -> dict[str, int]:
        """Return frames dropped and errors by port and direction since the bridge was made, without the zeros."""
        command = ["ovs-vsctl", "--timeout=5", "--format=json", "--columns=name,statistics", "list", "interface"]
        names = [interface.name for interface in self.ports_in_use()]
        return _drops(system.run([*command, *names], self.journal.environment()))


def _drops(listed: str) -> dict[str, int]:
    drops = {}
    for name, (_, statistics) in json.loads(listed)["data"]:
        for key, value in statistics:
            if value and (key.endswith(("dropped", "errors")) or "err" in key):
                drops[f"{name}.{key}"] = int(value)
    return drops
