"""Do the examples of README.md work together, put into files as printed?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from datastore.base import ROOT
from tests.documents import README_FILES, example

DOCUMENTED_FIGURE = "analysis/figures/<name>.py"

PACKAGES = ("analysis", "datastore", "experiments", "nfs", "topologies")
ASK = """
from analysis.figures import definitions
from experiments.harness import spec
from topologies.emulation.topology import plan
from datastore import placements
experiment = spec.load("counter_cost")
print(experiment.question)
print(*[trial.name for trial in spec.trials("counter_cost", experiment)])
print({cable[2]["delay_us"] for cable in plan("far_store", {}).graph.links(withInfo=True)} == {0, 1000.0})
print(placements.load("halves").store_role)
print(definitions()["counter_cost"].question)
"""


def copied(folder: Path) -> Path:
    """Return a copy of the packages with the examples in their files."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path in README_FILES:
        (folder / path).write_text(example(path))
    return folder


def test_every_example_is_found_by_its_name(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ASK], cwd=copied(tmp_path), capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "How much later does a packet arrive when it is counted?",
        "counter_cost/rack/integrated/passthrough/r1/0 counter_cost/rack/halves/passthrough/r1/0 "
        "counter_cost/rack/integrated/syn_counter/r1/0 counter_cost/rack/halves/syn_counter/r1/0",
        "True",
        "nf",
        "How much later does a packet arrive when it is counted?",
    ]


def test_the_examples_pass_the_checks_of_the_repository(tmp_path: Path) -> None:
    """What a newcomer copies must not turn ./run_tests.sh red."""
    folder = copied(tmp_path)
    for check in (["ruff", "check"], ["ruff", "format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", *check, *README_FILES], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "analysis/figures/reordering.py").write_text(example(DOCUMENTED_FIGURE, "docs/results.md"))
    chosen = ["tests/unit/test_analysis.py", "-k", "figure_definition or fonts or named or one_topology"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    untyped = [line for path in README_FILES[1:] for line in example(path).splitlines() if line.lstrip().startswith("def ")
               and "->" not in line]  # fmt: skip
    assert untyped == []  # mypy wants annotations everywhere but in the function of an NF
