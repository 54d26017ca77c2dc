"""Does a cable with a delay delay by that much, by round-trip arithmetic, keep order and content, and lose nothing?"""

import hashlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import pytest

from tests.documents import example
from topologies.emulation import system, topology
from topologies.emulation.calibration import Calibration
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher, RunningProcess

pytestmark = pytest.mark.alone
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    preload = ["topologies.emulation.wire"]
    with Journal("test-wire") as journal, Launcher(journal, tmp_path_factory.mktemp("logs"), preload) as launcher:
        yield launcher


def calibrated(network: Network) -> Calibration:
    """Return the first valid calibration: others use this machine too, and a busy moment rightly makes one invalid."""
    deadline = time.monotonic() + PATIENCE_S
    while not (result := network.calibrate()).valid and time.monotonic() < deadline:
        time.sleep(0.5)
    return result


def wire_of(launcher: Launcher) -> RunningProcess:
    return next(process for process in launcher.processes if process.name == "wire")


def counts(launcher: Launcher) -> dict[str, dict[str, int]]:
    wire = wire_of(launcher)
    wire.send({"show": True})
    answer = wire.receive(5)
    assert answer is not None
    return dict(answer["cables"])


@pytest.mark.parametrize("delay_us", [200.0, 1000.0])
def test_back_to_back_round_trips_are_twice_the_delay(launcher: Launcher, delay_us: float) -> None:
    parameters = {"delay_us": delay_us, "store_hosts": 1}
    with Network("back_to_back", parameters, "test-wire", launcher, launcher.journal) as network:
        result = calibrated(network)
        assert result.valid, result.reasons
        assert {path.spec_us for path in result.paths} == {2 * delay_us}
        for path in result.paths:
            assert path.rtt_us - result.base_us == pytest.approx(2 * delay_us, abs=max(50, 0.1 * delay_us))


def test_rack_round_trips_are_four_times_the_delay(launcher: Launcher) -> None:
    with Network("rack", {"delay_us": 1000.0}, "test-wire", launcher, launcher.journal) as network:
        result = calibrated(network)
        assert result.valid, result.reasons
        assert {path.spec_us for path in result.paths} == {4000.0}
        if network.delay_mechanism == "wire":
            assert all(cable["dropped"] == cable["dropped_before"] == 0 for cable in counts(launcher).values())


def test_the_readme_topology_delays_its_storage_cables_alone(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    far_store = ModuleType("topologies.far_store")
    exec(example("topologies/far_store.py"), far_store.__dict__)  # the document's own code
    monkeypatch.setitem(sys.modules, "topologies.far_store", far_store)
    monkeypatch.setattr(topology, "names", lambda: ["far_store"])
    with Network("far_store", {"storage_delay_us": 1000.0, "store_hosts": 1}, "test-wire", launcher, launcher.journal) as network:
        result = calibrated(network)
        assert result.valid, result.reasons
        specified_us = {("storage" in path.path, "control" in path.path): path.spec_us for path in result.paths}
        assert specified_us == {(False, False): 0.0, (True, False): 4000.0, (True, True): 2000.0}


def test_a_delay_that_is_not_the_one_asked_for_is_refused(launcher: Launcher) -> None:
    with Network("back_to_back", {"delay_us": 1000.0}, "test-wire", launcher, launcher.journal) as network:
        if network.delay_mechanism != "wire":
            pytest.skip("only our own delay line can be told to be wrong")
        wire_of(launcher).send({"trim_us": 300})
        assert wire_of(launcher).receive(5) is not None
        result = network.calibrate()
        assert not result.valid
        assert "for 2000 us specified" in result.reasons[0]


def test_frames_keep_their_order_and_content(launcher: Launcher) -> None:
    seed = 7
    with Network("back_to_back", {"delay_us": 300.0}, "test-wire", launcher, launcher.journal) as network:
        ends = []
        for host, interface in (("client", "net"), ("nf1", "inside")):
            with system.network_namespace(network.hosts[host].pid):
                end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
            end.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
            end.bind((interface, 0x88B5))
            end.settimeout(2)
            ends.append(end)
        header = bytes.fromhex("02000000000202000000000188b5")
        sent, received = [], []
        for number in range(2000):
            body = hashlib.shake_128(struct.pack(">II", seed, number)).digest(46 + number % 1400)
            frame = header + struct.pack(">I", number) + body
            ends[0].send(frame)
            sent.append(frame)
            if number % 50 == 49:
                received += [ends[1].recv(2048) for _ in range(50)]
        assert [len(frame) for frame in received] == [len(frame) for frame in sent]
        assert received == sent
        numbers = [struct.unpack_from(">I", frame, 14)[0] for frame in received]
        assert all(after == before + 1 for before, after in pairwise(numbers))
        for end in ends:
            end.close()


def test_tcp_over_a_delayed_cable_is_whole(launcher: Launcher) -> None:
    parameters = {"delay_us": 100.0, "store_hosts": 1}
    with Network("back_to_back", parameters, "test-wire", launcher, launcher.journal) as network:
        with system.network_namespace(network.hosts["store1"].pid):
            server = socket.create_server(("0.0.0.0", 5002))
        received = hashlib.sha256()

        def take() -> None:
            connection, _ = server.accept()
            while data := connection.recv(1 << 18):
                received.update(data)

        thread = threading.Thread(target=take)
        thread.start()
        address = (network.hosts["store1"].interfaces["storage"].ipv4 or "").split("/")[0]
        with system.network_namespace(network.hosts["nf1"].pid):
            client = socket.create_connection((address, 5002), timeout=20)
        data = os.urandom(20 << 20)
        client.sendall(data)
        client.close()
        thread.join(30)
        server.close()
        assert received.digest() == hashlib.sha256(data).digest()
