"""Does calibration confirm a network that is right, and refuse one that loses frames or delays them otherwise than asked?"""

import json
import time
from collections.abc import Iterator

import pytest

from topologies.emulation import system
from topologies.emulation.calibration import Calibration, Measurement, judge
from topologies.emulation.journal import Journal
from topologies.emulation.network import Network
from topologies.emulation.processes import Launcher

pytestmark = pytest.mark.alone
PATIENCE = 12


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with Journal("test-calibration") as journal, Launcher(journal, tmp_path_factory.mktemp("logs")) as launcher:
        yield launcher


def calibrated(network: Network) -> Calibration:
    """Return the first valid calibration: others use this machine too, and a busy moment rightly makes one invalid."""
    for _ in range(PATIENCE):
        result = network.calibrate()
        if result.valid:
            break
        time.sleep(0.2)
    return result


def test_a_rack_without_delay_is_confirmed_and_loss_found(launcher: Launcher) -> None:
    with Network("rack", {"store_hosts": 1}, "test-calibration", launcher, launcher.journal) as network:
        result = calibrated(network)
        assert result.valid, result.reasons
        assert {path.path for path in result.paths} >= {
            "client.net - nf1.inside", "client.net - nf2.inside", "server.net - nf1.outside", "server.net - nf2.outside",
            "nf1.storage - store1.storage", "nf2.storage - control.storage", "nf1.storage - nf2.storage",
        }  # fmt: skip
        assert result.loss == 0
        assert 0 < result.base_us <= result.rtt_us
        assert json.loads(json.dumps(result.to_json()))["valid"] is True
        command = ["tc", "qdisc", "add", "dev", "storage", "root", "tbf", "rate", "8kbit", "burst", "100", "limit", "1"]
        with system.network_namespace(network.hosts["store1"].pid):
            system.run(command, launcher.journal.environment())
        broken = network.calibrate()
        assert not broken.valid
        assert {reason.split(":")[0] for reason in broken.reasons if "probes lost" in reason} == {
            "nf1.storage - store1.storage", "nf2.storage - store1.storage",
        }  # fmt: skip
        assert 0 < broken.loss < 0.5
        with system.network_namespace(network.hosts["control"].pid):
            system.run(["ip", "link", "set", "storage", "down"], launcher.journal.environment())
        assert any("control.storage" in reason for reason in network.calibrate().reasons)


def test_directly_wired_hosts_are_confirmed(launcher: Launcher) -> None:
    with Network("back_to_back", {"store_hosts": 1}, "test-calibration", launcher, launcher.journal) as network:
        result = calibrated(network)
        assert result.valid, result.reasons
        assert len(result.paths) == 3


@pytest.mark.parametrize(
    ("spec_us", "rtt_us", "valid"),
    [(0, 20, True), (0, 69, True), (0, 71, False), (400, 460, True), (400, 471, False), (400, 369, False),
     (4000, 4210, True), (4000, 4230, False), (4000, 3800, False), (400, float("nan"), False)],
)  # fmt: skip
def test_the_tolerance_is_5_percent_or_50_us(spec_us: float, rtt_us: float, valid: bool) -> None:
    base_us = 20.0
    measurement = Measurement("a - b", spec_us, rtt_us, excess_us=rtt_us - base_us - spec_us, sent=10)
    assert (judge(measurement, base_us) == []) is valid


def test_a_lost_probe_is_a_reason() -> None:
    measurement = Measurement("a - b", 0, 20, excess_us=0, sent=10, lost=1)
    assert judge(measurement, 20) == ["a - b: 1 of 10 probes lost"]
