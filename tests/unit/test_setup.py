"""Does set-up install exactly what is missing, once, and say what is wrong in one line?

The real scripts run in a copy of the tree whose path has a space. Programs that would change this machine (apt-get,
systemctl ...) or tell its state (dpkg-query, ovs-appctl) are replaced by recording ones, first on the PATH; .venv is
not filled from a network.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from datastore.base import ROOT

SETUP = "experiments/harness/setup.sh"
PACKAGES = ["python3", "python3-venv", "mininet", "libxdp1", "libpcap0.8", "etcd-server", "openvswitch-switch", "nftables"]
PACKAGES += ["redis-server"]
PACKAGES += ["ethtool", "iproute2", "iputils-ping", "procps", "kmod", "util-linux", "nginx", "curl", "wrk", "iperf3"]
PACKAGES += ["openssh-server", "openssh-client", "dnsmasq-base", "bind9-dnsutils", "traceroute", "tcpdump", "conntrackd"]
# Builds what `venv_is_complete` looks for without pip, so that the decisions around it run as they are.
QUICK_VENV = """
build_venv() {
  echo built >>builds
  mkdir -p .venv/bin .venv/lib/python3.11/site-packages/mininet
  ln -sf /usr/bin/python3 .venv/bin/python
  touch .venv/lib/python3.11/site-packages/mininet/net.py
  ${BUILD_THEN:-true}
  venv_identity >.venv/complete
}
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="set-up for emulation refuses without root, which has its own test")


class Tree:
    """A copy of the scripts with recording programs in front of the machine's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a checkout"
        self.programs = folder / "programs"
        self.programs.mkdir()
        for name in ("run_all.sh", "run_tests.sh", ".ci/run", "requirements.txt", SETUP):
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
        for name in ("datastore", "nfs", "topologies"):
            (self.folder / name).mkdir()
        for name in ("throughput", "packet_latency", "_shared"):
            (self.folder / f"experiments/{name}.py").touch()
        (self.folder / "experiments/harness/warm.py").write_text("print('compiling everything')\n")
        self.installed(*PACKAGES)
        self.program("dpkg-query", f"cat '{folder}/installed'; exit 1")
        self.program("ovs-appctl", f"test -e '{folder}/switch'")
        self.switch(runs=True)

    def program(self, name: str, script: str) -> None:
        """Put a program in front of the machine's own; its calls are recorded in `calls`."""
        path = self.programs / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"{self.folder.parent}/calls"\n{script}\n')
        path.chmod(0o755)

    def installed(self, *packages: str) -> None:
        (self.folder.parent / "installed").write_text("".join(f"{name} installed\n" for name in packages))

    def switch(self, runs: bool) -> None:
        path = self.folder.parent / "switch"
        path.touch() if runs else path.unlink(missing_ok=True)

    @property
    def calls(self) -> str:
        path = self.folder.parent / "calls"
        return path.read_text() if path.exists() else ""

    @property
    def builds(self) -> int:
        path = self.folder / "builds"
        return len(path.read_text().split()) if path.exists() else 0

    def start(self, command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command of bash in the tree, with only these variables in its environment."""
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env={"PATH": f"{self.programs}:/usr/bin:/bin", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, **environment: str) -> tuple[int, str, str]:
        """Return exit status, output and complaints."""
        process = self.start(command, **environment)
        output, complaints = process.communicate(timeout=60)
        return process.returncode, output, complaints

    def set_up(self, scope: str = "unit", more: str = "", **environment: str) -> tuple[int, str, str]:
        return self.run(self.script(scope, more), **environment)

    def script(self, scope: str = "unit", more: str = "") -> str:
        own = f"UNITS='{self.folder.parent}/units' POLICY='{self.policy}'"
        return f"set -euo pipefail; source {SETUP}; {QUICK_VENV} {own}; {more}\nset_up {scope}"

    @property
    def policy(self) -> Path:
        """What stands in the place of /usr/sbin/policy-rc.d."""
        return self.folder.parent / "policy-rc.d"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_every_step_is_named_and_a_second_call_says_and_does_nothing(tree: Tree) -> None:
    status, output, complaints = tree.set_up()
    assert (status, complaints) == (0, "")
    assert re.fullmatch(
        r"\[1/4\] system packages \.\.\. there\n\[2/4\] Python packages \.\.\. \d+ s\n"
        r"\[4/4\] compiled functions \.\.\. \d+ s\n",
        output,
    )
    assert "compiling everything" in (tree.folder / "results/setup.log").read_text()
    assert tree.set_up() == (0, "", "")
    assert tree.builds == 1


@pytest.mark.parametrize("changed", ["requirements.txt", "datastore/table.py", ".venv/bin/python"])
def test_what_changed_is_made_again_and_nothing_else(tree: Tree, changed: str) -> None:
    tree.set_up()
    if changed == ".venv/bin/python":
        (tree.folder / changed).unlink()
    else:
        with (tree.folder / changed).open("a") as file:
            file.write("# changed\n")
    _, output, _ = tree.set_up()
    assert tree.builds == (1 if changed == "datastore/table.py" else 2)
    assert re.search(r"compiled functions \.\.\. \d+ s", output)


@pytest.mark.parametrize("how", ["KILL", "TERM", "INT"])
def test_an_interrupted_build_is_not_believed(tree: Tree, how: str) -> None:
    process = tree.start(tree.script(), BUILD_THEN="sleep 77")
    deadline = time.monotonic() + 20
    while tree.builds == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(getattr(signal, f"SIG{how}"))
    _, complaints = process.communicate(timeout=20) if how != "KILL" else (process.wait(), "")
    if how == "KILL":  # the orphaned step keeps the lock until it ends; here it is ended
        os.killpg(int(child), signal.SIGKILL)
    else:
        assert process.returncode == 130
        assert 'interrupted at "Python packages"; call again to go on' in complaints
    assert tree.set_up()[0] == 0
    assert tree.builds == 2


def test_of_two_set_ups_at_once_one_builds_and_the_other_waits(tree: Tree) -> None:
    processes = [tree.start(tree.script(), BUILD_THEN="sleep 0.5") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert tree.builds == 1
    assert sum("waiting for another set-up of this folder to end" in output for output in outputs) == 1


def test_settings_of_other_pythons_do_not_reach_the_build(tree: Tree) -> None:
    names = ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "PYENV_VERSION", "PIP_TARGET")
    tree.set_up(BUILD_THEN="eval env >seen", **dict.fromkeys(names, "/nonsense"))
    seen = (tree.folder / "seen").read_text()
    assert "/nonsense" not in seen
    assert "PIP_USER=0" in seen


def test_a_library_under_ubuntus_new_name_is_there(tree: Tree) -> None:
    """Ubuntu 24.04 renamed libraries whose time_t has 64 bits."""
    tree.installed(*(f"{name}t64" if name == "libpcap0.8" else name for name in PACKAGES))
    status, output, _ = tree.set_up()
    assert (status, "[1/4] system packages ... there" in output) == (0, True)
    assert "apt-get" not in tree.calls


def test_missing_packages_are_installed_by_root_and_named_to_others(tree: Tree, tmp_path: Path) -> None:
    tree.installed("python3", "python3-venv", "libxdp1", "libpcap0.8", "etcd-server")
    tree.program("apt-get", f"env >'{tmp_path}/apt'; echo 'mininet installed' >>'{tmp_path}/installed'")
    status, output, complaints = tree.set_up()
    if os.geteuid() != 0:
        assert status == 1
        assert complaints.endswith("packages are missing and only root may install them: sudo apt-get install mininet\n")
        return
    assert (status, complaints) == (0, "")
    assert re.search(r"\[1/4\] system packages \.\.\. \d+ s\n", output)
    update, install = re.findall("apt-get .*", tree.calls)
    assert update == "apt-get update"
    assert install.split()[-1] == "mininet"
    assert "--no-install-recommends" in install
    environment = (tmp_path / "apt").read_text()
    assert "DEBIAN_FRONTEND=noninteractive" in environment
    assert "NEEDRESTART_SUSPEND=1" in environment
    assert tree.set_up() == (0, "", "")


SERVICES = {"redis-server": "redis-server", "nginx": "nginx", "openssh-server": "ssh", "conntrackd": "conntrackd",
            "etcd-server": "etcd"}  # fmt: skip


def tree_without_services(tree: Tree, then: str) -> None:
    """Have the packages of services be missing. `apt-get install` installs them, asks the policy about each, and does `then`."""
    tree.installed(*(name for name in PACKAGES if name not in SERVICES))
    asked = "; ".join(f"{tree.policy} {service}.service start || echo {service} refused $?" for service in SERVICES.values())
    asked += f"; {tree.policy} --quiet openvswitch-switch start && echo openvswitch-switch allowed"
    listed = "\\n".join(f"{package} installed" for package in SERVICES)
    home = tree.folder.parent
    tree.program(
        "apt-get", f"[[ $1 == update ]] || {{ printf '{listed}\\n' >>'{home}/installed'; ({asked}) >'{home}/asked'; {then}; }}"
    )
    for name in ("systemctl", "service", "update-rc.d"):
        tree.program(name, "exit 0")


@as_root
@pytest.mark.parametrize("how", ["exit 100", "kill -9 0"])
def test_no_service_is_started_or_left_on_also_when_set_up_was_interrupted(tree: Tree, tmp_path: Path, how: str) -> None:
    tree_without_services(tree, how)
    assert tree.set_up("emulation")[0] == 1
    assert tree.policy.exists() == how.startswith("kill")
    said = (tmp_path / "asked").read_text()
    refused = "".join(f"{service} refused 101\n" for service in SERVICES.values())
    assert said == f"{refused}openvswitch-switch allowed\n"
    assert not re.search("disable", tree.calls)
    assert tree.set_up("emulation")[0] == 0
    for service in SERVICES.values():
        assert re.search(f"systemctl disable --now {service}|update-rc.d {service} disable", tree.calls)
    assert not tree.policy.exists()
    assert tree.set_up("emulation") == (0, "", "")


@as_root
def test_services_and_policies_that_were_there_are_left_alone(tree: Tree, tmp_path: Path) -> None:
    tree_without_services(tree, "exit 0")
    (tmp_path / "units").mkdir()
    for service in SERVICES.values():
        (tmp_path / "units" / f"{service}.service").touch()
    tree.program("../policy-rc.d", "exit 0")
    policy = tree.policy.read_text()
    assert tree.set_up("emulation")[0] == 0
    assert not re.search("systemctl|update-rc.d", tree.calls)
    assert "refused" not in (tmp_path / "asked").read_text()
    assert tree.policy.read_text() == policy


@as_root
def test_the_switch_is_started_when_it_does_not_run_and_left_alone_when_it_does(tree: Tree, tmp_path: Path) -> None:
    start = f"touch '{tmp_path}/switch'"
    tree.program("systemctl", start)
    tree.program("control", start)
    own = f"OVS_CTL='{tree.programs}/control'"
    assert tree.set_up("emulation", own)[0] == 0
    assert not re.search("systemctl|control", tree.calls)
    tree.switch(runs=False)  # as after a reboot
    _, output, _ = tree.set_up("emulation", own)
    assert re.search(r"\[2/4\] Python packages \.\.\. there\n\[3/4\] Open vSwitch \.\.\. \d+ s\n", output)
    assert re.search("systemctl start openvswitch-switch|control start --system-id=random", tree.calls)


@as_root
def test_a_kernel_without_the_switch_module_gets_the_userspace_switch(tree: Tree, tmp_path: Path) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd starts the switch here")
    tree.switch(runs=False)
    tree.program("control", "[[ $* == *--no-ovs-vswitchd* ]]")  # modprobe openvswitch fails in ovs-ctl
    tree.program("pgrep", "exit 1")
    tree.program("ovs-vswitchd", f"touch '{tmp_path}/switch'")
    assert tree.set_up("emulation", f"OVS_CTL='{tree.programs}/control'")[0] == 0
    assert "--detach --monitor" in tree.calls


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("Temporary failure in name resolution\nERROR: No matching distribution found for x", "check the network"),
        ("ERROR: No matching distribution found for numba==0.68.1", "check pip's settings"),
        ("E: Unable to locate package mininet", "add-apt-repository universe"),
        ("E: Could not get lock /var/lib/dpkg/lock-frontend", "wait for it to end"),
        ("The virtual environment was not created because ensurepip is not available.", "apt-get install --reinstall"),
        ("Segmentation fault", "see results/setup.log for the cause"),
    ],
)
def test_a_failing_step_shows_its_last_lines_and_one_line_with_the_fix(tree: Tree, said: str, fix: str) -> None:
    (tree.folder / "said").write_text(said + "\n")
    status, output, complaints = tree.set_up(BUILD_THEN="eval cat said; false")
    assert status == 1
    assert "failed after" in output
    assert said.splitlines()[0] in output
    assert complaints.count("\n") == 1
    assert complaints.startswith("bash: Python packages: ")
    assert fix in complaints
    assert not (tree.folder / ".venv/complete").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="only a user who is not root is refused")
def test_emulation_without_root_is_refused_with_the_command_to_give(tree: Tree) -> None:
    status, output, complaints = tree.run("./run_all.sh")
    assert (status, output) == (1, "")
    assert "needs root" in complaints
    assert "sudo ./run_all.sh" in complaints


def test_another_distribution_is_refused(tree: Tree) -> None:
    status, _, complaints = tree.set_up(more="command() { false; }")
    assert (status, complaints.count("\n")) == (1, 1)
    assert "needs Debian 12 or Ubuntu" in complaints


@pytest.mark.parametrize("script", ["run_all.sh", "run_tests.sh"])
def test_help_needs_no_set_up_and_shows_an_example(tree: Tree, script: str) -> None:
    status, output, complaints = tree.run(f"cd / && '{tree.folder}/{script}' --help")
    assert (status, complaints) == (0, "")
    assert output.startswith("usage: ")
    assert "example" in output
    assert not (tree.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--fast", "unknown option --fast"),
        ("-x smoke", "unknown option -x"),
        ("--profile", "--profile needs a value: smoke, quick or paper"),
        ("--profile long", "unknown profile 'long': valid are smoke, quick and paper"),
        ("throughput --profile=", "unknown profile ''"),
        ("throughput packet_latensy", "unknown experiment 'packet_latensy': valid are packet_latency throughput;"),
        ("_shared", "unknown experiment '_shared'"),
        ("'throughput packet_latency'", "unknown experiment 'throughput packet_latency'"),
    ],
)
def test_a_wrong_argument_is_refused_before_set_up(tree: Tree, arguments: str, complaint: str) -> None:
    status, output, complaints = tree.run(f"./run_all.sh {arguments}")
    assert (status, output, complaints.count("\n")) == (2, "", 1)
    assert complaint in complaints
    assert not (tree.folder / ".venv").exists()


def without_set_up(tree: Tree, python: str) -> None:
    """Leave the scripts what follows set-up: `.venv/bin/python`, here a recording one."""
    (tree.folder / SETUP).write_text("set_up() { echo set up for $1; }\n")
    (tree.folder / ".venv/bin").mkdir(parents=True)
    path = tree.folder / ".venv/bin/python"
    path.write_text(f"#!/bin/bash\n{python}\n")
    path.chmod(0o755)


def test_run_all_hands_profile_and_experiments_on(tree: Tree) -> None:
    without_set_up(tree, 'printf "<%s>" "$@"; exit 7')
    status, output, _ = tree.run("./run_all.sh throughput --profile paper packet_latency")
    assert status == 7
    assert output == "set up for emulation\n<-m><experiments><run><--profile><paper><throughput><packet_latency>"
    assert tree.run("./run_all.sh")[1].endswith("<run><--profile><quick>")
    assert tree.run("./run_all.sh --pcap throughput")[1].endswith("<run><--profile><quick><--pcap><throughput>")


def test_run_tests_runs_every_check_and_fails_when_an_early_one_fails(tree: Tree) -> None:
    without_set_up(tree, 'echo "jit=${NUMBA_DISABLE_JIT:-} bounds=${NUMBA_BOUNDSCHECK:-} $*"; [[ $* != *"$BREAK"* ]]')
    status, output, complaints = tree.run("./run_tests.sh unit -k steering", BREAK="nothing")
    assert (status, complaints) == (0, "")
    assert [line for line in output.splitlines() if line.startswith("jit")] == [
        "jit= bounds= -m ruff check .",
        "jit= bounds= -m ruff format --check --quiet .",
        "jit= bounds= -m mypy",
        "jit= bounds= -m pytest tests/unit --numprocesses logical --maxprocesses 4 --dist loadfile -k steering",
        "jit= bounds=1 -m pytest tests/unit -m bounds -o cache_dir=.pytest_cache/bounds -k steering",  # beside the others, as
        "jit=1 bounds= -m pytest tests/unit -m python_mode -o cache_dir=.pytest_cache/uncompiled -k steering",  # is this one
    ]
    assert output.endswith("-k steering\n")  # so pytest's closing line is the last
    for broken, name in (("mypy", "types"), ("-m bounds", "unit tests, bounds checked"), ("-m not alone", "emulation tests")):
        status, output, _ = tree.run("./run_tests.sh", BREAK=broken)
        assert status == 1
        assert output.endswith(f"run_tests.sh: failed: {name}\n")


def test_arguments_may_choose_no_test_of_a_part_but_a_part_without_tests_fails(tree: Tree) -> None:
    without_set_up(tree, "[[ $* != *pytest* ]] || exit 5  # as pytest does when no test was collected")
    assert tree.run("./run_tests.sh unit -k nothing")[0] == 0
    status, output, _ = tree.run("./run_tests.sh unit")
    assert status == 1
    assert output.endswith("failed: unit tests; unit tests, bounds checked; unit tests, uncompiled\n")


def test_an_end_of_the_tests_ends_those_beside_them(tree: Tree) -> None:
    without_set_up(
        tree,
        "[[ $* == *bounds* ]] && echo $$ >beside && exec sleep 60; [[ $* == *mypy* ]] && echo $$ >types && exec sleep 60; exit 0",
    )
    script = subprocess.Popen(["./run_tests.sh", "unit"], cwd=tree.folder, stdout=subprocess.DEVNULL, start_new_session=True)
    beside, types = tree.folder / "beside", tree.folder / "types"
    deadline = time.monotonic() + 20
    # Both run: bash acts on a signal that comes just before it starts a command only when that command has ended.
    while not all(one.exists() and one.read_text() for one in (beside, types)) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(script.pid, signal.SIGTERM)
    assert script.wait(20) == 130
    stat = Path(f"/proc/{int(beside.read_text())}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("broken", ["run_tests.sh", "run_all.sh", ""])
def test_ci_runs_both_and_fails_when_either_fails(tree: Tree, broken: str) -> None:
    for name in ("run_tests.sh", "run_all.sh"):
        (tree.folder / name).write_text(f"#!/bin/bash\necho {name} $*\n[[ {name} != '{broken}' ]]\n")
    status, output, _ = tree.run("cd / && '../a checkout/.ci/run'".replace("..", str(tree.folder.parent)))
    assert output.startswith("run_tests.sh\nrun_all.sh --profile smoke\n")
    assert (status == 0) == (broken == "")
    assert output.count("FAILED (status 1)") == (0 if broken == "" else 1)


def test_every_requirement_is_pinned_and_says_what_it_is_for() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    wrong = [line for line in lines if not re.fullmatch(r"[a-z0-9.-]+==[0-9.]+( ; [^#]+)?  +# \S.*|[^#]+[0-9\"]  # \S.*", line)]
    assert wrong == []
    names = [line.split("==")[0] for line in lines]
    assert len(names) == len(set(names))
    assert {"os-ken", "scapy", "matplotlib", "pandas"} <= set(names)
