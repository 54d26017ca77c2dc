"""Is a results folder read alike by a report and by a resumed run, and what cannot be read told in one line with its file?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.compare import compare
from analysis.folder import read_run
from analysis.outcome import outcome
from analysis.redraw import draw_figures
from analysis.report import write_report
from analysis.summary import write_summary
from datastore.base import ROOT
from datastore.base.errors import NearstateError
from experiments.__main__ import main
from experiments.harness import runner
from experiments.harness.record import Record

SPEC = {"profile": "smoke", "experiments": {"packet_latency": {"question": "Why?"}}, "run_id": "one"}
WHOLE: dict[str, Any] = {
    "trial": "packet_latency/rack/local/nat/r1/0",
    "experiment": "packet_latency",
    "topology": "rack",
    "placement": "local",
    "nf": "nat",
    "valid": True,
    "points": [{"sweep": {}, "metrics": {"p50_us": 1.5}, "valid": True}],
}
NO_TRIALS: list[bytes] = [
    b"null", b"5", b'"text"', b"[]", b"{}", b"{", b"\xff\xfe{}", b"[" * 100_000, b"\x00" * 10, b'{"trial": 5}',
    *(json.dumps({**WHOLE, name: value}).encode() for name, value in (
        ("points", None), ("points", [None]), ("points", [{"metrics": None}]), ("points", [{"sweep": [1]}]), ("placement", None),
        ("nf", 5), ("sweep", "x"), ("fidelity", []), ("invalid_reasons", None), ("calibration", None), ("replicas", "2"))),
]  # fmt: skip


def folder(path: Path, trials: bytes | None, spec: bytes | None = json.dumps(SPEC).encode()) -> Path:
    """Write a results folder; None: the file is not there."""
    run = path / "one"
    run.mkdir()
    for name, content in (("spec.json", spec), ("trials.jsonl", trials), ("host.json", b"{}")):
        if content is not None:
            (run / name).write_bytes(content)
    return run


def line(**changes: Any) -> bytes:
    return json.dumps({**WHOLE, **changes}).encode() + b"\n"


def read_all(run: Path) -> None:
    """Do with a folder all that reads one."""
    write_summary(run)
    write_report(run)
    draw_figures(run)
    compare(run)
    outcome(run)


@pytest.mark.parametrize("wrong", NO_TRIALS, ids=lambda wrong: wrong[:20].decode(errors="replace"))
def test_a_line_that_is_no_trial_is_left_out_and_noted_by_all_readers(tmp_path: Path, wrong: bytes) -> None:
    run = folder(tmp_path, line() + wrong + b"\n" + line(trial="second"))
    read = read_run(run)
    assert [trial["trial"] for trial in read.trials] == [WHOLE["trial"], "second"]
    assert read.notes == ("trials.jsonl line 2 is no whole trial (a run killed while writing?): left out",)
    record = Record(run)
    assert record.validity() == {WHOLE["trial"]: True, "second": True}
    assert record.notes == list(read.notes)


def test_reports_are_made_whatever_lines_are_among_the_trials(tmp_path: Path) -> None:
    run = folder(tmp_path, line() + b"\n".join(NO_TRIALS) + b"\n" + line(trial="second"), b"null")
    read_all(run)
    assert len(read_run(run).notes) == len(NO_TRIALS) + 1


@pytest.mark.parametrize("spec", [b"", b"null", b"[]", b"{", b"\xff\xfe", None], ids=repr)
def test_a_report_goes_on_without_a_spec_and_a_resumed_run_says_which_file(tmp_path: Path, spec: bytes | None) -> None:
    run = folder(tmp_path, line(), spec)
    (note,) = read_run(run).notes
    assert str(run / "spec.json") in note
    with pytest.raises(NearstateError) as raised:
        Record(run).spec  # noqa: B018
    assert str(raised.value).startswith(str(run / "spec.json"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("spec", [b"{}", b'{"profile": 5, "experiments": {}}', b'{"profile": "smoke", "experiments": null}'])
def test_a_spec_that_says_too_little_cannot_be_resumed(tmp_path: Path, spec: bytes) -> None:
    run = folder(tmp_path, line(), spec)
    with pytest.raises(NearstateError, match=r"spec.json does not say profile and experiments"):
        Record(run).spec  # noqa: B018
    assert len(read_run(run).trials) == 1


def test_without_trials_both_readers_name_the_file(tmp_path: Path) -> None:
    run = folder(tmp_path, None)
    for read in (lambda: read_run(run), lambda: Record(run).validity()):
        with pytest.raises(NearstateError, match=r"trials\.jsonl") as raised:
            read()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "said"), [(b"", "spec.json cannot be read: it is empty"), (b"null", "is no JSON object but 'None'")]
)
def test_resume_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: bytes, said: str) -> None:
    folder(tmp_path, line(), spec)
    monkeypatch.setattr(runner.Record, "open", lambda run: Record(tmp_path / run))
    with pytest.raises(NearstateError, match=said):
        runner.run([], resume="one")


def test_the_last_half_of_a_line_is_cut_off_before_the_next_one(tmp_path: Path) -> None:
    run = folder(tmp_path, line() + line(trial="half")[:30])
    record = Record(run)
    assert list(record.validity()) == [WHOLE["trial"]]
    record.append({**WHOLE, "trial": "next"})
    assert list(record.validity()) == [WHOLE["trial"], "next"]
    assert record.notes == []


def test_a_run_tells_what_it_lacks(tmp_path: Path) -> None:
    late = {"valid": False, "points": [], "invalid_reasons": ["late"]}
    spec = {**SPEC, "experiments": {name: {} for name in ("packet_latency", "failover", "scaling")}}
    counted = {"fidelity": {"false_failovers": 2}}
    run = folder(tmp_path, b"".join([
        line(), line(trial="b", placement="centralized", **late), line(trial="b/again1", placement="centralized", **late),
        line(trial="c", experiment="failover", **late, fidelity={"false_failovers": 0}),
        line(trial="d", placement="integrated", replicas=2, points=[{**WHOLE["points"][0], **counted}], **counted),
    ]), json.dumps(spec).encode())  # fmt: skip
    found = outcome(run)
    assert found.unanswered == ("failover", "scaling")
    assert "no valid trial of packet_latency, centralized, nat, rack: 2 invalid" in found.lines
    assert "hosts replaced while alive: 2, in 1 of 2 coordinated trials" in found.lines
    assert len(found.lines) == 3  # and the one of failover
    summary = write_summary(run).read_text()
    assert "packet_latency,rack,integrated,nat,2,{},false_failovers,count,2,,,1,0" in summary
    page = write_report(run).read_text()
    assert "hosts replaced while alive" in page
    assert "2 in 1 trial" in page
    (tmp_path / "other").mkdir()
    valid = folder(tmp_path / "other", line())
    assert outcome(valid).lines == outcome(valid).unanswered == ()
    assert "replaced while alive" not in write_report(valid).read_text()


AMBIENT = """
import sys
from pathlib import Path
from experiments.__main__ import main
from experiments.harness import record
record.Record.open.__func__.__defaults__ = (Path(sys.argv[1]),)
sys.exit(main(["figures", "one"]))
"""


@pytest.mark.parametrize(("valid", "status"), [(True, 0), (False, 1)])
def test_a_run_without_a_valid_trial_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], valid: bool, status: int
) -> None:
    run = folder(tmp_path, line(valid=valid))
    monkeypatch.setattr(runner, "run", lambda *_: Record(run))
    assert main(["run", "packet_latency"]) == status
    output, complaints = capsys.readouterr()
    said = "error: no trial was valid of packet_latency: nothing is known of it; the report says why\n"
    assert complaints == ("" if valid else said)
    assert ("no valid trial of packet_latency, local, nat, rack: 1 invalid" in output) == (not valid)


MEASURED = {"state_ns": 5.0, "packet_ns": 9.0, "passthrough_ns": 4.0, "dependent_access_ns": 3.0, "independent_access_ns": 1.0,
            "first_packet_ns": 20.0}  # fmt: skip
RC = "text.usetex: True\npdf.use14corefonts: True\npdf.fonttype: 3\nbackend: qtagg\nsavefig.dpi: 7\nfont.size: 30\n"


def test_figures_are_the_same_whatever_matplotlib_is_set_to(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text(RC)
    points = [{"sweep": {"flows": flows}, "metrics": MEASURED} for flows in (1000, 100_000)]
    drawn = {}
    for name, ambient in (("own", {}), ("other", {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://no_such_backend"})):
        (tmp_path / name).mkdir()
        run = folder(tmp_path / name, line(experiment="table_size", topology="back_to_back", nf="firewall", points=points))
        done = subprocess.run([sys.executable, "-c", AMBIENT, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True,
                              check=False, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **ambient})  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        drawn[name] = (run / "figures/table_size.pdf").read_bytes(), (run / "figures/table_size.png").read_bytes()
    assert drawn["own"] == drawn["other"]
    assert b"/FontFile2" in drawn["own"][0]
