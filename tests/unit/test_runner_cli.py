"""Does the command line answer bad input with one line that says what would be right, before anything starts?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from datastore.base.errors import NearstateError
from experiments.__main__ import main
from experiments.harness import spec, warm

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("list", "run", "compare", "figures", "doctor", "clean", "shell")


def call(*arguments: str) -> tuple[int, str, str]:
    """Return exit status, output and complaints of `python -m experiments`."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def runs() -> set[str]:
    return {path.name for path in (ROOT / "results").iterdir()} if (ROOT / "results").exists() else set()


def test_list_names_every_experiment_with_its_question() -> None:
    status, output, complaints = call("list")
    assert (status, complaints) == (0, "")
    for name in spec.experiment_names():
        assert name in output
        assert spec.load(name).question in output


def test_one_broken_file_is_named_and_the_rest_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a network function with a mistake breaks the experiment that measures all of them."""

    def load(name: str) -> spec.Experiment:
        if name == "network_functions":
            raise NearstateError("nfs/mine.py:3: SyntaxError: invalid syntax")
        return loaded(name)

    loaded = spec.load
    monkeypatch.setattr(spec, "load", load)
    assert main(["list"]) == 1
    output, complaints = capsys.readouterr()
    assert "network_functions\n    cannot be loaded: nfs/mine.py:3: SyntaxError: invalid syntax\n" in output
    assert all(
        f"{name}\n    {loaded(name).question}\n" in output for name in spec.experiment_names() if name != "network_functions"
    )
    assert complaints == "error: cannot be loaded: network_functions; see the list above\n"


def test_a_function_that_cannot_be_compiled_is_told_and_stops_nothing() -> None:
    def compile_it() -> None:
        raise NearstateError("nfs/mine.py:3: SyntaxError: invalid syntax")

    assert warm.compiled(compile_it) == "cannot be compiled: nfs/mine.py:3: SyntaxError: invalid syntax"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.harness.warm", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: python -m experiments.harness.warm")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "packet_latensy"), "unknown experiment 'packet_latensy': did you mean packet_latency"),
        (("run", "--profile", "quik"), "unknown profile 'quik': did you mean quick"),
        (("run", "--resume", "no-such-run"), "unknown run 'no-such-run'"),
        (("compare", "--run", "no-such-run"), "unknown run 'no-such-run'"),
        (("figures", "no-such-run"), "unknown run 'no-such-run'"),
        (("clean", "no-such-run"), "unknown run 'no-such-run'"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(arguments: tuple[str, ...], said: str) -> None:
    before = runs()
    status, output, complaints = call(*arguments)
    assert (status, output) == (1, "")
    assert complaints.startswith(f"error: {said}")
    assert complaints.count("\n") == 1
    assert runs() == before


def test_help_shows_every_command_and_examples() -> None:
    status, output, _ = call("--help")
    assert status == 0
    assert all(command in output for command in COMMANDS)
    assert "examples:" in output
    for command in COMMANDS:
        assert f"example: python -m experiments {command}" in call(command, "--help")[1]


def test_unknown_commands_and_options_are_usage_errors() -> None:
    for arguments in (("rum",), ("run", "--profil-e", "x"), ()):
        status, _, complaints = call(*arguments)
        assert status == 2
        assert "usage:" in complaints
