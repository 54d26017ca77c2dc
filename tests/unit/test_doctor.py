"""Does the doctor tell this box's truth, each problem with its fix, whatever is missing? Is a doomed run refused?"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from datastore.base import ROOT
from datastore.base.errors import NearstateError
from experiments.__main__ import main
from experiments.harness import doctor
from experiments.harness.doctor import Box, Fact
from experiments.workloads import savefile
from nfs.dataplane import afxdp
from topologies.emulation import journal, system

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="trying AF_XDP and netem needs root")


@pytest.fixture(scope="module")
def facts() -> dict[str, Fact]:
    return {fact.name: fact for fact in doctor.examine()}


def test_every_fact_is_told_once_and_every_problem_has_a_fix(facts: dict[str, Fact]) -> None:
    assert len(facts) == len(doctor.CHECKS)
    assert [fact for fact in facts.values() if (fact.problem is None) != (fact.fix is None)] == []
    assert [fact for fact in facts.values() if "could not be told" in (fact.problem or "")] == []


def test_facts_are_this_box(facts: dict[str, Fact]) -> None:
    assert facts["CPU"].value.startswith(f"{len(os.sched_getaffinity(0))} x ")
    assert os.uname().release in facts["kernel"].value
    assert facts["interpreter"].value.endswith(sys.prefix)
    assert facts["root"].value == "yes" if os.geteuid() == 0 else "no (user id" in facts["root"].value


@as_root
def test_the_trial_agrees_with_the_tools_and_leaves_nothing(facts: dict[str, Fact]) -> None:
    links = set(Path("/sys/class/net").iterdir())
    tried = Box().trial
    assert set(tried) == {"afxdp", "netem", "nftables", "ipv6"}
    assert set(Path("/sys/class/net").iterdir()) == links
    for name, key in (("AF_XDP on veth", "afxdp"), ("netem", "netem"), ("nftables", "nftables"), ("IPv6", "ipv6")):
        assert (facts[name].problem is None) == (tried[key] == "works")
    asked = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    assert (tried["netem"] == "works") == (subprocess.run(asked, capture_output=True, check=False).returncode == 0)


@as_root
def test_a_trial_that_hangs_is_ended_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box()
    box.trial  # noqa: B018  (waits for the true one)
    monkeypatch.setattr(doctor, "TRIAL_S", 0.1)
    box = Box()
    box._trial = subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE, text=True)
    fact = doctor.check_netem(box)
    assert box._trial.returncode == -9
    assert fact.problem is not None
    assert "did not end" in fact.problem


def test_rendering_marks_problems_and_counts_them() -> None:
    text = doctor.render([Fact("CPU", "2 x fast"), Fact("netem", "absent", "links are not delayed", "modprobe sch_netem")])
    assert text.splitlines() == [
        "  CPU    2 x fast",
        "! netem  absent",
        "         problem: links are not delayed",
        "         fix: modprobe sch_netem",
        "",
        "1 problem",
    ]
    assert doctor.render([Fact("CPU", "2 x fast")]).endswith("\nno problems")


def test_what_something_stands_in_for_is_told_and_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    without = doctor.check_netem(SimpleNamespace(root=True, trial={"netem": "tc: kind is unknown"}))  # type: ignore[arg-type]
    assert doctor.render([without]).splitlines()[-3:] == [
        "         until then: links are delayed by our own wire",
        "",
        "no problems",
    ]
    monkeypatch.setattr(doctor, "examine", lambda: [without])
    assert main(["doctor"]) == 0
    monkeypatch.setattr(doctor, "examine", lambda: [without, Fact("root", "no", "experiments need it", "sudo")])
    with pytest.raises(SystemExit, match="1"):
        main(["doctor"])


def test_host_facts_are_plain_data_of_this_box() -> None:
    facts = json.loads(json.dumps(doctor.host_facts()))
    assert facts["kernel"] == os.uname().release
    assert facts["cpus"] == len(os.sched_getaffinity(0))
    assert facts["versions"]["python"] == sys.version.split()[0]
    assert facts["versions"]["numba"]
    assert facts["cgroup"] in (1, 2, None)


@pytest.mark.parametrize(
    ("check", "attributes", "problem"),
    [
        (doctor.check_root, {"root": False}, "need it"),
        (doctor.check_governor, {"governor": "powersave"}, "clock rates change"),
        (doctor.check_memory, {"memory_gib": lambda field: 1.0}, "takes up to 2 GiB"),
        (doctor.check_clock, {"clocksource": "acpi_pm"}, "system call"),
        (doctor.check_numba, {"versions": {}}, "nothing can be compiled"),
        (doctor.check_datapath, {"datapath": "userspace"}, "several times slower"),
        (doctor.check_libxdp, {"packages": {}}, "AF_PACKET"),
        (doctor.check_netem, {"root": True, "trial": {"netem": "tc: kind is unknown"}}, "tc: kind is unknown"),
    ],
)
def test_a_lack_is_a_problem_with_a_fix(check: Any, attributes: dict[str, Any], problem: str) -> None:
    fact = check(SimpleNamespace(**attributes))
    assert problem in fact.problem
    assert fact.fix


def test_missing_tools_are_problems_not_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = {fact.name: fact for fact in doctor.examine()}
    assert len(facts) == len(doctor.CHECKS)
    missing = ("Mininet", "Open vSwitch", "libxdp", "nftables", "Redis", "real clients", "offloads")
    assert [name for name in missing if facts[name].fix is None or "run_all.sh" not in str(facts[name].fix)] == []
    assert not any("could not be told" in (fact.problem or "") for fact in facts.values())


def test_libpcap_tells_its_version_or_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    box: Any = SimpleNamespace()
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?.*", doctor.check_libpcap(box).value)
    monkeypatch.setattr(savefile, "library", refuse_libpcap)
    fact = doctor.check_libpcap(box)
    assert (fact.value, fact.fix) == ("missing", doctor.SET_UP)
    assert "captures cannot be replayed: no libpcap" in str(fact.problem)


def refuse_libpcap() -> None:
    raise NearstateError("no libpcap")


def test_leftovers_are_the_journals_of_dead_runners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "JOURNALS", tmp_path)
    living = {"kind": "runner", "name": "living", "pid": os.getpid(), "start": journal.start_ticks(os.getpid())}
    (tmp_path / "living.jsonl").write_text(json.dumps(living) + "\n")
    assert doctor.check_leftovers(Box()) == Fact("leftovers", "none")
    (tmp_path / "dead.jsonl").write_text(json.dumps(living | {"start": 1}) + '\n{"kind": "li')
    (tmp_path / "torn.jsonl").write_text("")
    fact = doctor.check_leftovers(Box())
    assert fact.value == "of 2 dead runs: dead, torn"
    assert fact.fix is not None
    assert fact.fix.endswith("clean")


def refusal(monkeypatch: pytest.MonkeyPatch, results: Path) -> str:
    """Return the one line with which a run is refused, everything being well that the test does not break."""
    if os.geteuid() != 0:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(doctor, "_datapath", lambda: "userspace")
    with pytest.raises(NearstateError) as caught:
        doctor.require(results)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_root_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NearstateError, match=r"need root.*user id 1000.*sudo ./run_all.sh"):
        doctor.require(tmp_path)


def test_without_mininet_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "Mininet is not installed" in refusal(monkeypatch, tmp_path)


@as_root
def test_without_the_switch_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mnexec").symlink_to(shutil.which("mnexec") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "openvswitch-switch" in refusal(monkeypatch, tmp_path)


def test_without_libxdp_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str, **_: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    afxdp.library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    line = refusal(monkeypatch, tmp_path)
    assert "libxdp.so.1" in line
    assert "apt-get install libxdp1" in line


@pytest.mark.parametrize("full", ["/dev/shm", "results"])
def test_on_a_full_disk_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, full: str) -> None:
    plenty, none = SimpleNamespace(free=10**12), SimpleNamespace(free=12_300_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: none if str(path).endswith(full) else plenty)
    line = refusal(monkeypatch, tmp_path / "results")
    assert "has 12 MB free" in line
    assert full in line


@pytest.mark.parametrize("folder", ["/proc/results", "/sys/results", "{file}/results"])
def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    path = Path(folder.format(file=tmp_path / "file"))
    with pytest.raises(NearstateError, match=r"^results folder .* cannot be written: .*; free some space"):
        doctor.require_results(path)


def test_a_writable_results_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    doctor.require_results(tmp_path / "new/results")
    assert list((tmp_path / "new/results").iterdir()) == []


@as_root
def test_this_box_can_run_experiments() -> None:
    doctor.require(ROOT / "results")


def in_shell(script: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python script in a process of its own, by a command that takes something from it."""
    return subprocess.run([*command, sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


@as_root
def test_a_root_that_may_not_is_told_what_it_lacks() -> None:
    """As in a container without --privileged: setpriv takes the capability from what it starts."""
    lacking = ("setpriv", "--bounding-set", "-sys_admin")
    done = in_shell("from experiments.harness import doctor; doctor.require()", *lacking)
    assert done.stderr.splitlines()[-1].endswith("this root lacks CAP_SYS_ADMIN: give the container `--privileged`, or "
                                                 "--cap-add SYS_ADMIN")  # fmt: skip
    told = in_shell("from experiments.harness import doctor; print(doctor.render(doctor.examine()))", *lacking).stdout
    assert "! root" in told
    assert "yes, without CAP_SYS_ADMIN" in told
    assert "fix: this root lacks CAP_SYS_ADMIN: give the container `--privileged`" in told
    assert "run as root" not in told


IPV6_OFF = """
import ctypes, subprocess
from pathlib import Path
from topologies.emulation import system
from experiments.harness import doctor
assert ctypes.CDLL(None).unshare(system.CLONE_NEWNET) == 0
Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
for command in ("link add one type veth peer name two", "link set one up", "link set two up"):
    subprocess.run(["ip", *command.split()], check=True)
add = ["ip", "address", "add", "fd00::9/128", "dev", "lo", "nodad"]
added = subprocess.run(add, capture_output=True, check=False).returncode
print(added, doctor._try_ipv6())
"""


@as_root
def test_where_ipv6_is_off_by_default_it_is_switched_on_for_our_interfaces() -> None:
    """In a network namespace of its own, with which the settings go."""
    assert in_shell(IPV6_OFF).stdout == "2 works\n"


@pytest.mark.parametrize("name", doctor.SLOW)
def test_a_run_with_a_debugging_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    for each in doctor.SLOW:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(system, "missing_capabilities", list)
    assert refusal(monkeypatch, tmp_path).startswith(f"{name}=1 is set")
