"""Do topologies come up as declared, carry TCP without damage, hold processes to their hosts, and leave with the run?"""

import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datastore.base.errors import NearstateError
from topologies.emulation import system
from topologies.emulation.journal import Journal, processes_of, start_ticks
from topologies.emulation.network import Network, datapath
from topologies.emulation.processes import Control, Launcher, RunningProcess

HERE = "tests.emulation.test_network"


def echo(config: dict[str, Any], control: Control) -> None:
    """Answer every message with itself and the interfaces seen, until told to stop."""
    while (message := control.receive(None)) is not None and not message.get("stop"):
        control.send({**message, **config, "interfaces": sorted(name for _, name in socket.if_nameindex())})


def fail(config: dict[str, Any], control: Control) -> None:
    raise ValueError("the table has no room for 7 records")


def deaf(config: dict[str, Any], control: Control) -> None:
    """Ignore both the request to stop and SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control.send({"deaf": True})
    time.sleep(1000)


def busy(config: dict[str, Any], control: Control) -> None:
    """Use all the CPU there is."""
    control.send({"busy": True})
    while True:
        pass


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Journal("test-network") as journal, Launcher(journal, tmp_path_factory.mktemp("logs")) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def rack(launcher: Launcher) -> Iterator[Network]:
    parameters = {"nf_hosts": 2, "store_hosts": 1, "cpu": {"store": 0.2}}
    with Network("rack", parameters, "test-network", launcher, launcher.journal) as network:
        yield network


def addresses(network: Network, host: str) -> dict[str, str]:
    return {name: interface.ipv4 or "" for name, interface in network.hosts[host].interfaces.items()}


def test_rack_has_its_hosts_interfaces_and_addresses(rack: Network) -> None:
    roles = {name: host.role for name, host in rack.hosts.items()}
    assert roles == {"client": "client", "server": "server", "nf1": "nf", "nf2": "nf", "store1": "store", "control": "control"}
    assert addresses(rack, "client") == {"net": "10.0.0.1/8"}
    assert addresses(rack, "server") == {"net": "10.128.0.1/8"}
    ends = [interface for host in rack.hosts.values() for interface in host.interfaces.values() if interface.ipv6]
    assert [end.ipv6 for end in ends] == ["fd00::a00:1", "fd00::a80:1"]
    for nf in ("nf1", "nf2"):
        assert addresses(rack, nf)["inside"] == addresses(rack, nf)["outside"] == ""
        assert addresses(rack, nf)["storage"].startswith("192.168.77.")
    macs = [interface.mac for host in rack.hosts.values() for interface in host.interfaces.values()]
    assert len(set(macs)) == len(macs) == 10
    for host in rack.hosts.values():
        with system.network_namespace(host.pid):
            assert {name for _, name in socket.if_nameindex()} == {"lo", *host.interfaces}
            for name, interface in host.interfaces.items():
                assert Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").read_text() == ("0\n" if interface.ipv6 else "1\n")
                with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as packets:
                    packets.bind((name, 0))
                    assert packets.getsockname()[4].hex(":") == interface.mac


def test_the_best_datapath_here_is_used_and_told(rack: Network) -> None:
    assert rack.switch is not None
    assert rack.switch.datapath == datapath() == rack.describe()["datapath"]
    assert rack.switch.cpu_seconds() > 0
    described = rack.describe()
    assert {node["name"] for node in described["nodes"]} == {*rack.hosts, "tor"}
    assert len(described["links"]) == 10
    assert described["delay_mechanism"] == "none"


def transfer(network: Network, sender: str, receiver: str, megabytes: int) -> tuple[bytes, bytes, int]:
    """Send over the storage network by TCP; return both ends' SHA-256 and the sender's retransmitted segments."""
    received = hashlib.sha256()
    with system.network_namespace(network.hosts[receiver].pid):
        server = socket.create_server(("0.0.0.0", 5001))

    def take() -> None:
        connection, _ = server.accept()
        with connection:
            while data := connection.recv(1 << 18):
                received.update(data)

    thread = threading.Thread(target=take)
    thread.start()
    target = addresses(network, receiver)["storage"].split("/")[0]
    sent = hashlib.sha256()
    with system.network_namespace(network.hosts[sender].pid):
        client = socket.create_connection((target, 5001), timeout=20)
    data = os.urandom(1 << 20)
    with client:
        for _ in range(megabytes):
            client.sendall(data)
            sent.update(data)
        client.shutdown(socket.SHUT_WR)
        thread.join(20)
        information = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    server.close()
    return sent.digest(), received.digest(), int.from_bytes(information[100:104], "little")  # tcpi_total_retrans


@pytest.mark.parametrize(("sender", "receiver"), [("nf1", "store1"), ("control", "nf2")])
def test_tcp_through_the_switch_is_whole(rack: Network, sender: str, receiver: str) -> None:
    sent, received, retransmitted = transfer(rack, sender, receiver, 40)
    assert sent == received
    assert retransmitted < 400, "of 29,000 segments: checksums or segmentation are left to a device that does not exist"
    assert rack.switch is not None
    assert not [key for key in rack.switch.port_statistics() if "err" in key]


def test_back_to_back_is_wired_directly(launcher: Launcher) -> None:
    with Network("back_to_back", {"store_hosts": 1}, "test-network", launcher, launcher.journal) as network:
        assert network.switch is None
        assert set(network.hosts) == {"client", "server", "nf1", "store1"}
        assert network.describe()["datapath"] == "none"
        sent, received, _ = transfer(network, "nf1", "store1", 20)
        assert sent == received
    assert network.hosts == {}


def test_a_process_runs_on_its_host(rack: Network, launcher: Launcher) -> None:
    process = launcher.spawn("echo", rack.hosts["nf1"], f"{HERE}:echo", {"from": "config"})
    process.send({"number": 7, "long": "x" * 1_000_000})
    answer = process.receive(5)
    assert answer is not None
    assert answer["interfaces"] == ["inside", "lo", "outside", "storage"]
    assert (answer["number"], answer["from"], len(answer["long"])) == (7, "config", 1_000_000)
    assert process.receive(0.01) is None
    assert process.poll() is None
    assert Path(f"/proc/{process.pid}/comm").read_text() == "echo\n"
    assert process.rss_bytes() > 1 << 20
    assert rack.describe()["nodes"][[n["name"] for n in rack.describe()["nodes"]].index("nf1")]["processes"] == ["echo"]
    assert process.pid in set(processes_of("test-network"))
    assert process.stop() == 0
    assert process.poll() == 0
    assert process.cpu_seconds() < 5
    assert launcher.on_host("nf1") == []


def test_processes_on_hosts_let_each_other_finish_a_turn(rack: Network, launcher: Launcher) -> None:
    host = rack.hosts["nf1"]
    for name, place, prompt, policy in (
        ("patient", host, False, os.SCHED_BATCH), ("prompt", host, True, os.SCHED_OTHER), ("nowhere", None, False, os.SCHED_OTHER)
    ):  # fmt: skip
        process = launcher.spawn(name, place, f"{HERE}:deaf", {}, prompt=prompt)
        assert process.receive(5) == {"deaf": True}
        assert os.sched_getscheduler(process.pid) == policy
        process.kill()


def test_a_process_that_fails_names_its_log(rack: Network, launcher: Launcher) -> None:
    process = launcher.spawn("failing", rack.hosts["nf2"], f"{HERE}:fail", {})
    with pytest.raises(
        NearstateError, match=r"failing failed with exit code 1: ValueError: .* 7 records; its log is .*failing.log"
    ):
        process.receive(5)
    assert "Traceback" in process.log.read_text()
    missing = launcher.spawn("missing", None, f"{HERE}:nothing", {})
    with pytest.raises(NearstateError, match="nothing"):
        missing.receive(5)


def test_a_deaf_process_is_killed(launcher: Launcher) -> None:
    process = launcher.spawn("deaf", None, f"{HERE}:deaf", {})
    assert process.receive(5) == {"deaf": True}
    assert process.stop(timeout_s=0.1) == -signal.SIGKILL
    with pytest.raises(NearstateError, match="deaf was killed by SIGKILL"):
        process.receive(1)


def test_a_cpu_limit_holds(rack: Network, launcher: Launcher) -> None:
    process = launcher.spawn("busy", rack.hosts["store1"], f"{HERE}:busy", {})
    assert process.receive(5) == {"busy": True}
    before, started = process.cpu_seconds(), time.monotonic()
    time.sleep(1)
    used = (process.cpu_seconds() - before) / (time.monotonic() - started)
    process.kill()
    assert used < 0.35, "limited to 0.2 of a core"


def test_children_die_with_the_launcher(tmp_path: Path) -> None:
    with Journal("test-network-launcher") as journal:
        launcher = Launcher(journal, tmp_path)
        process: RunningProcess = launcher.spawn("orphan", None, f"{HERE}:deaf", {})
        assert process.receive(5) == {"deaf": True}
        os.kill(launcher.pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while start_ticks(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert start_ticks(process.pid) is None
        with pytest.raises(NearstateError, match=r"launcher is gone|it ended"):
            launcher.spawn("late", None, f"{HERE}:echo", {})
        launcher.close()


def test_a_start_that_fails_takes_everything_down(tmp_path: Path) -> None:
    """The delay line cannot start without a launcher, and by then all else is up."""
    with Journal("test-network-failing") as journal:
        launcher = Launcher(journal, tmp_path)
        launcher.wait_ready()
        os.kill(launcher.pid, signal.SIGKILL)
        network = Network("rack", {"delay_us": 100.0}, "test-network-failing", launcher, journal)
        with pytest.raises(NearstateError, match=r"launcher is gone|it ended"):
            network.start()
        assert network.hosts == {}
        assert not [path for path in Path("/sys/class/net").iterdir() if path.name.startswith(f"ns{journal.short}")]
        assert f"ns{journal.short}" not in system.run(["ovs-vsctl", "list-br"], journal.environment()).split()
        launcher.close()
        assert list(processes_of("test-network-failing")) == []


def test_wrong_requests_are_refused_before_anything_starts(launcher: Launcher, tmp_path: Path) -> None:
    with pytest.raises(NearstateError, match="did you mean rack"):
        Network("rakc", {}, "test-network", launcher, launcher.journal)
    with pytest.raises(NearstateError, match="module:function"):
        launcher.spawn("wrong", None, "no target", {})
    with pytest.raises(NearstateError, match="process name"):
        launcher.spawn("../wrong", None, f"{HERE}:echo", {})
    reason = r"import nfs.no_such_module: ModuleNotFoundError.*launcher.log"
    with Journal("test-network-preload") as journal, Launcher(journal, tmp_path, ["nfs.no_such_module"]) as broken, pytest.raises(
        NearstateError, match=reason
    ):  # fmt: skip
        broken.wait_ready()


def test_without_open_vswitch_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NearstateError, match="install the distribution's package openvswitch-switch"):
        datapath()
