"""Does analysis report exactly what a run measured? Runs here are synthetic: written by `synthetic_run` from known numbers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hdrh.histogram import HdrHistogram
from PIL import Image

from analysis import style
from analysis.compare import compare, print_comparison
from analysis.figures import definitions
from analysis.metrics import unit
from analysis.redraw import draw_figures
from analysis.report import write_report
from analysis.results import decode, measurements, merge, read_run
from analysis.sheet import PNG_DPI
from analysis.summary import COLUMNS, confidence_interval, summarize, write_summary
from datastore.base.errors import NearstateError

# Medians a synthetic run is built around: one-way packet latency (us), lossless rate (kpps), CPU per packet (us).
ANSWERED = {"asymmetric_paths", "connection_rate", "network_functions", "packet_latency", "real_clients", "state_access_latency",
            "store_memory", "table_size", "throughput"}  # fmt: skip
"""The experiments of the repository: a figure of each says its answer. A user's own need not."""
PACKET_US = {"local": 41, "integrated": 43, "integrated:hashed": 95, "centralized": 130}
LOSSLESS_KPPS = {"local": 210, "integrated": 205, "integrated:hashed": 110, "centralized": 80, "nftables": 120}
CPU_US = {
    "local": (2.0, 0.0, 1.7),
    "integrated": (2.2, 0.1, 1.7),
    "integrated:hashed": (2.9, 1.1, 2.3),
    "centralized": (3.3, 2.4, 2.9),
    "nftables": (3.6, 0.0, 0.0),
}
ACCESS_US = {"integrated": 0.21, "centralized": 210.0, "redis": 260.0}
NETWORK = {
    "name": "rack",
    "datapath": "userspace",
    "delay_mechanism": "wire",
    "nodes": [
        {"name": "client", "role": "client", "processes": ["generator"]},
        {"name": "server", "role": "server", "processes": ["sink"]},
        {"name": "tor", "role": "switch", "processes": []},
        {"name": "nf1", "role": "nf", "processes": ["nf process", "store process"]},
        {"name": "nf2", "role": "nf", "processes": ["nf process", "store process"]},
        {"name": "control", "role": "control", "processes": ["coordinator"]},
    ],
    "links": [
        {"a": "client", "b": "tor", "label": "net", "delay_us": 25},
        {"a": "server", "b": "tor", "label": "net", "delay_us": 25},
        *(
            {"a": nf, "b": "tor", "label": label, "delay_us": 25}
            for nf in ("nf1", "nf2")
            for label in ("inside", "outside", "storage")
        ),
        {"a": "control", "b": "tor", "label": "storage", "delay_us": 25},
    ],
}
BACK_TO_BACK = {
    "name": "back_to_back",
    "datapath": "none",
    "delay_mechanism": "none",
    "nodes": [
        {"name": "client", "role": "client", "processes": ["generator"]},
        {"name": "nf1", "role": "nf", "processes": ["nf process"]},
        {"name": "server", "role": "server", "processes": ["sink"]},
        {"name": "store1", "role": "store", "processes": ["store process"]},
    ],
    "links": [
        {"a": "client", "b": "nf1", "label": "inside", "delay_us": 0},
        {"a": "nf1", "b": "server", "label": "outside", "delay_us": 0},
        {"a": "nf1", "b": "store1", "label": "storage", "delay_us": 0},
    ],
}


@cache
def histogram(median_us: float, seed: int, samples: int = 3000) -> str:
    """Return an encoded histogram of log-normal latencies in ns around a median."""
    recorded = HdrHistogram(1, 60_000_000_000, 3)
    for value in np.random.default_rng(seed).lognormal(np.log(median_us * 1000), 0.25, samples):
        recorded.record_value(int(value))
    return str(recorded.encode().decode())


def trial(
    experiment: str,
    placement: str,
    repeat: int,
    points: list[dict[str, Any]],
    nf: str = "",
    topology: str = "rack",
    **changes: Any,
) -> dict[str, Any]:
    """Return one line of trials.jsonl as the runner writes it."""
    return {
        "trial": f"{experiment}/{topology}/{placement}/{nf}/{repeat}",
        "experiment": experiment,
        "topology": topology,
        "placement": placement,
        "nf": nf,
        "replicas": 1,
        "sweep": {},
        "repeat": repeat,
        "seed": 17,
        "started": "2026-01-01T00:00:00Z",
        "seconds": 6.1,
        "valid": True,
        "invalid_reasons": [],
        "points": points,
        "fidelity": {"generator_lateness_p99_us": 3.0 + repeat, "cpu_saturation": 0.7},
        "calibration": {
            "valid": True,
            "reasons": [],
            "base_us": 20.0,
            "rtt_us": 122.0 + repeat,
            "loss": 0.0,
            "paths": [
                {
                    "path": "client.net - nf1.inside",
                    "spec_us": 100.0,
                    "rtt_us": 122.0 + repeat,
                    "excess_us": 2.0 + repeat,
                    "lost": 0,
                    "sent": 576,
                }
            ],
        },
        "ledger": {
            "sent": 100_000,
            "received": 99_990,
            "lost": 10,
            "nf": {"received": 100_000, "dropped_by_verdict": 8, "waiting_room_full": 2},
        },
        "network": NETWORK if topology == "rack" else BACK_TO_BACK,
        **changes,
    }


def point(
    sweep: dict[str, Any], metrics: dict[str, Any], latency_us: float | None = None, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    histograms = {"latency_ns": histogram(latency_us, seed)} if latency_us else {}
    return {"sweep": sweep, "metrics": metrics, "histograms": histograms, "valid": True, "invalid_reasons": [], **changes}


def state_access_trials(repeat: int) -> list[dict[str, Any]]:
    noise = 1 + 0.02 * repeat
    trials = []
    for placement, median_us in ACCESS_US.items():
        points = [
            point(
                {"operation": operation, "load": load},
                {"p50_us": median_us * slower * noise, "p99_us": median_us * slower * noise * 1.8},
                median_us * slower * noise * factor,
                repeat,
            )
            for operation, factor in (("read", 0.9), ("write", 1.0), ("read_modify_write", 1.1))
            for load, slower in (("alone", 1.0), ("loaded", 1.9))
        ]
        if placement != "integrated":
            points.append(
                point({"operation": "get", "pipeline": 64}, {"operations_kops": 2200.0 if placement == "centralized" else 900.0})
            )
            points.append(point({"operation": "get", "pipeline": 1}, {"p50_us": median_us}))
        trials.append(trial("state_access_latency", placement, repeat, points))
    return trials


def packet_latency_trials(repeat: int) -> list[dict[str, Any]]:
    noise = 1 + 0.03 * repeat
    weight = {"passthrough": 0.0, "firewall": 0.6, "traffic_counter": 1.0}
    medians = {
        (placement, nf): noise * (40 + (latency_us - 40) * share)
        for placement, latency_us in PACKET_US.items()
        for nf, share in weight.items()
    }
    return [
        trial(
            "packet_latency",
            placement,
            repeat,
            [
                point(
                    {"offered_kpps": 20},
                    {"p50_us": median_us, "p99_us": 1.8 * median_us, "delivered_kpps": 20.0, "lost": 0},
                    median_us,
                    repeat,
                )
            ],
            nf,
        )
        for (placement, nf), median_us in medians.items()
    ]


def throughput_trials(repeat: int) -> list[dict[str, Any]]:
    trials = []
    for topology in ("rack", "back_to_back"):
        for placement, lossless in LOSSLESS_KPPS.items():
            if topology == ("back_to_back" if placement == "integrated:hashed" else "rack" if placement == "nftables" else ""):
                continue
            for nf, share in (("passthrough", 1.0), ("firewall", 0.9), ("traffic_counter", 0.8)):
                if placement == "nftables" and nf != "firewall":
                    continue
                limit = lossless * share * (3.0 if topology == "back_to_back" else 1.0) * (1 + 0.02 * repeat)
                offers = (20, 50, 100, 200, 300) if topology == "rack" else (50, 150, 300, 600, 900)
                costs = dict(zip(("nf_cpu_us", "store_cpu_us", "switch_cpu_us"), CPU_US[placement]))
                if topology == "back_to_back":
                    del costs["switch_cpu_us"]
                points = [
                    point(
                        {"offered_kpps": offered},
                        {"delivered_kpps": min(offered, limit), "loss_ratio": max(0, 1 - limit / offered), **costs},
                    )
                    for offered in offers
                ]
                points.append(
                    point(
                        {"search": "rfc2544"}, {"lossless_kpps": 0.95 * limit, "nf_rss_mbytes": 210.0, "store_rss_mbytes": 120.0}
                    )
                )
                if topology == "back_to_back":
                    points.append(point({"load": "saturated"}, {"delivered_kpps": 1.1 * limit}))
                trials.append(trial("throughput", placement, repeat, points, nf, topology))
    return trials


def store_memory_trials(repeat: int) -> list[dict[str, Any]]:
    """Return stores of 10,000 to 1,000,000 records: 100 MB of process beside a table 1.4 times its 56 bytes per record."""
    trials = []
    for records in (10_000, 100_000, 1_000_000):
        table_mbytes = 1.4 * 56 * records / 1e6
        metrics = {
            "table_mbytes": table_mbytes,
            "table_payload_ratio": 1.4,
            "store_rss_mbytes": 100 + repeat + table_mbytes,
            "records": records,
        }
        name = f"store_memory/back_to_back/integrated/{records}/{repeat}"
        line = trial("store_memory", "integrated", repeat, [point({}, metrics)], topology="back_to_back")
        trials.append({**line, "trial": name, "sweep": {"records": records}})
    return trials


def real_clients_trials(repeat: int) -> list[dict[str, Any]]:
    """Return two network functions through which integrated state serves everything twice as well as centralized state does."""
    trials = []
    for nf in ("firewall", "traffic_counter"):
        for placement, factor in (("integrated", 2.0), ("centralized", 1.0)):
            better = factor * (1 + 0.02 * repeat)
            points = [point({"workload": name}, {"goodput_mbps": 400 * better}) for name in ("tcp", "download", "udp")]
            for name in ("requests", "many_connections", "new_connections", "handshakes"):
                metrics = {"requests_kops": 5 * better, "p50_us": 1200 / better, "p99_us": 3600 / better}
                points.append(point({"workload": name}, metrics, 1200 / better, repeat))
            trials.append(trial("real_clients", placement, repeat, points, nf))
    return trials


def synthetic_run(
    folder: Path, repeats: int = 3, trials: list[dict[str, Any]] | None = None, leave_out: tuple[str, ...] = ()
) -> Path:
    """Write a results folder as the runner does and return it; `leave_out` names placements that were not run."""
    folder.mkdir(parents=True)
    if trials is None:
        trials = [
            line
            for repeat in range(repeats)
            for make in (state_access_trials, packet_latency_trials, throughput_trials)
            for line in make(repeat)
        ]
    questions = {
        "state_access_latency": "How long does one access to state take?",
        "packet_latency": "How long is a packet delayed?",
        "throughput": "How much does each placement carry?",
    }
    (folder / "spec.json").write_text(
        json.dumps(
            {
                "run_id": folder.name,
                "profile": "synthetic",
                "seed": 17,
                "commit": "0" * 40,
                "experiments": {name: {"question": question} for name, question in questions.items()},
            }
        )
    )
    (folder / "host.json").write_text(
        json.dumps({"kernel": "6.1.0-synthetic", "cpus": 2, "versions": {"openvswitch": "3.1"}, "netem": False})
    )
    kept = [json.dumps(line) + "\n" for line in trials if line["placement"] not in leave_out]
    (folder / "trials.jsonl").write_text("".join(kept))
    return folder


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("results") / "synthetic-full")


def changed(line: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**line, **changes}


# Reading


def test_half_written_last_line_is_left_out_and_noted(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "interrupted", trials=packet_latency_trials(0))
    whole = read_run(run)
    with (run / "trials.jsonl").open("a") as file:
        file.write('{"trial": "throughput/rack/integ')
    read = read_run(run)
    assert read.trials == whole.trials
    assert [note for note in read.notes if f"line {len(whole.trials) + 1} is no whole trial" in note]
    assert "is no whole trial" in write_report(run).read_text()


@pytest.mark.parametrize("content", [None, "", "not a run\n"])
def test_what_is_no_run_gets_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "trials.jsonl").write_text(content)
    if content == "":
        assert read_run(tmp_path).trials == ()  # a run stopped before its first trial is one
        return
    with pytest.raises(NearstateError) as refused:
        read_run(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_trial_measured_twice_counts_once_but_every_invalid_attempt_counts(tmp_path: Path) -> None:
    (first, *_) = packet_latency_trials(0)
    again = changed(first, points=[point({"offered_kpps": 20}, {"p50_us": 7.0})])
    invalid = changed(first, valid=False, invalid_reasons=["generator late"])
    run = read_run(synthetic_run(tmp_path / "twice", trials=[first, invalid, invalid, again]))
    (row,) = summarize(measurements([run])).query("metric == 'p50_us'").to_dict("records")
    assert (row["median"], row["trials"], row["invalid_trials"]) == (7.0, 1, 2)
    assert any("again" in note for note in run.notes)


def test_frame_has_one_row_per_trial_point_and_metric(tmp_path: Path) -> None:
    line = trial(
        "packet_latency", "local", 0, [point({"offered_kpps": 20.0}, {"p50_us": 40, "note": "text", "p99_us": None})], "firewall"
    )
    line["sweep"] = {"flows": 100}
    frame = measurements([read_run(synthetic_run(tmp_path / "one", trials=[line]))])
    (row,) = frame.to_dict("records")
    assert row["metric"] == "p50_us"
    assert row["value"] == 40.0
    assert row["sweep"] == '{"flows": 100, "offered_kpps": 20}'
    assert (row["flows"], row["offered_kpps"]) == (100, 20)


def test_decoded_histogram_agrees_with_the_library() -> None:
    recorded = HdrHistogram(1, 60_000_000_000, 3)
    values = np.random.default_rng(5).lognormal(12, 3, 5000).astype(int)
    for value in values:
        recorded.record_value(int(value))
    ours = decode(recorded.encode().decode())
    assert ours.total == recorded.total_count
    fractions = [0.001, 0.25, 0.5, 0.9, 0.99, 0.9999, 1.0]
    assert list(ours.quantiles(fractions)) == [recorded.get_value_at_percentile(100 * at) for at in fractions]


def test_merged_histogram_is_that_of_all_values_together() -> None:
    parts = [np.array([1, 5, 900, 70_000]), np.array([5, 5, 2_000_000_000])]

    def encoded(values: np.ndarray) -> str:
        recorded = HdrHistogram(1, 60_000_000_000, 3)
        for value in values:
            recorded.record_value(int(value))
        return str(recorded.encode().decode())

    merged, together = merge(decode(encoded(part)) for part in parts), decode(encoded(np.concatenate(parts)))
    assert merged.upper.tolist() == together.upper.tolist()
    assert merged.counts.tolist() == together.counts.tolist()


def test_broken_histogram_is_refused() -> None:
    with pytest.raises(NearstateError, match="no HdrHistogram"):
        decode("HISTFAAABS5")


# Summary


def test_interval_of_six_repeats_is_their_range() -> None:
    assert confidence_interval([3, 1, 2, 6, 5, 4]) == (1, 6)


def test_interval_ranks_are_the_published_ones() -> None:
    # Le Boudec, appendix A, table A.1: n = 10 -> ranks 2 and 9; n = 20 -> 6 and 15; n = 30 -> 10 and 21
    for count, low, high in ((10, 2, 9), (20, 6, 15), (30, 10, 21)):
        assert confidence_interval(range(1, count + 1)) == (low, high)


def test_interval_of_few_repeats_is_students() -> None:
    low, high = confidence_interval([10.0, 12.0, 14.0])
    assert (low, high) == pytest.approx((12 - 4.303 * 2 / 3**0.5, 12 + 4.303 * 2 / 3**0.5))


def test_interval_holds_the_median_and_no_negative_time() -> None:
    low, high = confidence_interval([1.0, 1.0, 1.0, 1.0, 90.0])
    assert low == 0.0
    assert low <= 1.0 <= high


def test_one_repeat_has_no_interval(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "once", repeats=1)
    table = pd.read_csv(write_summary(run), keep_default_na=False)
    assert set(table["low"]) == set(table["high"]) == {""}
    assert set(table["trials"]) == {1}


def test_intervals_cover_the_true_median_as_often_as_promised() -> None:
    generator = np.random.default_rng(11)
    for repeats in (3, 5, 7, 12):
        intervals = [confidence_interval(sample) for sample in generator.normal(50, 5, (800, repeats))]
        covered = np.mean([low <= 50 <= high for low, high in intervals])
        assert covered > 0.93, f"{repeats} repeats: {covered:.3f}"  # 95 %, three standard errors of 800 draws below


def test_summary_file_has_exactly_the_agreed_columns(full_run: Path) -> None:
    table = pd.read_csv(write_summary(full_run), keep_default_na=False)
    header = "experiment,topology,placement,nf,replicas,sweep,metric,unit,median,low,high,trials,invalid_trials"
    assert ",".join(table.columns) == header == ",".join(COLUMNS)
    row = table[(table["metric"] == "p50_us") & (table["nf"] == "firewall") & (table["placement"] == "centralized")].iloc[0]
    medians = [(1 + 0.03 * repeat) * (40 + 90 * 0.6) for repeat in range(3)]
    assert float(row["median"]) == pytest.approx(np.median(medians), rel=1e-5)
    assert json.loads(row["sweep"]) == {"offered_kpps": 20}
    assert (row["unit"], row["trials"], row["invalid_trials"]) == ("us", 3, 0)


def test_units_come_from_the_suffix() -> None:
    names = ("p99_us", "delivered_kpps", "operations_kops", "nf_rss_mbytes", "loss_ratio", "lost", "flow_reordered")
    assert [unit(name) for name in names] == ["us", "kpps", "kops", "MB", "ratio", "count", "count"]


def test_invalid_trials_and_points_are_counted_but_not_measured(tmp_path: Path) -> None:
    points = [point({"offered_kpps": load}, {"delivered_kpps": load}) for load in (10, 20)]
    lines = [
        trial("throughput", "local", 0, points, "firewall"),
        trial("throughput", "local", 1, [points[0], {**points[1], "metrics": {"delivered_kpps": 3}, "valid": False}], "firewall"),
        trial("throughput", "local", 2, [], "firewall", valid=False, invalid_reasons=["RTT off by 300 us"]),
        trial("throughput", "centralized", 0, [], "firewall", valid=False, invalid_reasons=["RTT off by 300 us"]),
    ]
    run = synthetic_run(tmp_path / "invalid", trials=lines)
    summary = summarize(measurements([read_run(run)]))
    found = [(row["placement"], json.loads(row["sweep"]), row["trials"], row["invalid_trials"]) for _, row in summary.iterrows()]
    assert ("local", {"offered_kpps": 10}, 2, 1) in found
    assert ("local", {"offered_kpps": 20}, 1, 2) in found
    assert ("centralized", {}, 0, 1) in found
    assert summary.set_index("sweep").loc['{"offered_kpps": 20}', "median"] == 20
    report = write_report(run).read_text()
    assert report.count("RTT off by 300 us") == 2
    assert "2 of 3" in report


# Figures


def test_every_figure_definition_loads() -> None:
    figures = definitions()
    assert {"state_access_latency", "packet_latency", "throughput", "lossless_rate", "cpu_per_packet", "store_memory"} <= set(
        figures
    )
    for figure in figures.values():
        assert figure.question.endswith("?"), figure.name
    answered = {figure.experiment for figure in figures.values() if figure.answer}
    assert answered >= ANSWERED


def test_figures_are_written_with_fonts_a_publisher_accepts_and_their_points(full_run: Path) -> None:
    written = draw_figures(full_run)
    stems = {path.stem for path in written}
    assert stems >= {"state_access_latency", "packet_latency", "throughput", "lossless_rate", "cpu_per_packet"}
    measured = set(measurements([read_run(full_run)])["experiment"])
    assert stems <= {name for name, figure in definitions().items() if figure.experiment in measured}
    for stem in stems:
        pdf = (full_run / "figures" / f"{stem}.pdf").read_bytes()
        assert b"/CIDFontType2" in pdf  # TrueType, which matplotlib embeds as type 42
        assert b"/Type3" not in pdf
        assert (full_run / "figures" / f"{stem}.png").read_bytes()[:4] == b"\x89PNG"
    points = pd.read_csv(full_run / "figures" / "lossless_rate.csv")
    kernel = points[(points["series"] == "nftables") & (points["panel"] == "back_to_back, saturated")].iloc[0]
    assert (kernel["x"], kernel["repeats"]) == ("firewall", 3)
    assert kernel["y"] == pytest.approx(1.1 * 120 * 0.9 * 3 * 1.02, rel=1e-4)
    assert kernel["low"] < kernel["y"] < kernel["high"]


def test_figures_redraw_byte_for_byte(full_run: Path) -> None:
    first = [path.read_bytes() for path in draw_figures(full_run, ["lossless_rate"])]
    assert first == [path.read_bytes() for path in draw_figures(full_run, ["lossless_rate"])]


def test_cdf_points_are_the_quantiles_of_all_repeats(full_run: Path) -> None:
    draw_figures(full_run, ["packet_latency"])
    points = pd.read_csv(full_run / "figures" / "packet_latency.csv")
    curve = points[(points["series"] == "centralized") & (points["panel"] == "firewall, 20 kpps")]
    assert curve["x"].is_monotonic_increasing
    medians = [(1 + 0.03 * repeat) * (40 + 90 * 0.6) for repeat in range(3)]
    together = merge(decode(histogram(median_us, repeat)) for repeat, median_us in enumerate(medians))
    assert curve.loc[(curve["y"] - 0.5).abs().idxmin(), "x"] == pytest.approx(together.quantiles([0.5])[0] / 1000, rel=0.02)


def test_cost_not_spent_by_a_named_process_is_drawn_as_the_rest(tmp_path: Path) -> None:
    lines = [
        trial(
            "throughput",
            "local",
            0,
            [point({"offered_kpps": 20}, {"delivered_kpps": 20, "nf_cpu_us": 2.0, "system_cpu_us": 9.0})],
            "firewall",
        ),
        trial(
            "throughput", "nftables", 0, [point({"offered_kpps": 20}, {"delivered_kpps": 20, "system_cpu_us": 12.0})], "firewall"
        ),
    ]
    draw_figures(synthetic_run(tmp_path / "cost", trials=lines), ["cpu_per_packet"])
    points = pd.read_csv(tmp_path / "cost" / "figures" / "cpu_per_packet.csv")
    parts = {(row["series"], row["mark"]): row["y"] for _, row in points.iterrows()}
    assert parts == {("local", "nf_cpu_us"): 2.0, ("local", "other_cpu_us"): 7.0, ("nftables", "other_cpu_us"): 12.0}


def test_unknown_figure_is_refused_with_the_nearest_name(full_run: Path) -> None:
    with pytest.raises(NearstateError, match="packet_latency"):
        draw_figures(full_run, ["packet_latancy"])


def test_figure_without_measurements_is_left_out_unless_it_was_named(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "partial", trials=packet_latency_trials(0))
    assert {path.stem for path in draw_figures(run)} == {"packet_latency"}
    with pytest.raises(NearstateError, match="run experiment 'throughput' first"):
        draw_figures(run, ["throughput"])
    with pytest.raises(NearstateError, match="figure 'lossless_rate' cannot be drawn"):
        draw_figures(run, ["packet_latency", "lossless_rate"])


@pytest.mark.parametrize("absent", [("centralized",), ("integrated",), ("redis", "nftables", "local", "integrated:hashed")])
def test_missing_placements_are_drawn_around_and_said(tmp_path: Path, absent: tuple[str, ...]) -> None:
    run = synthetic_run(tmp_path / "gaps", repeats=1, leave_out=absent)
    assert draw_figures(run)
    frame = measurements([read_run(run)])
    figures = [figure for figure in definitions().values() if figure.answer and figure.experiment in set(frame["experiment"])]
    for figure in figures:
        assert figure.answer
        said = figure.answer(frame[frame["experiment"] == figure.experiment])
        assert said.startswith("Not answered") == (absent[0] in ("centralized", "integrated")), said
        assert "nan" not in said


def test_answers_say_what_the_numbers_say(full_run: Path) -> None:
    frame = measurements([read_run(full_run)])

    def answer(name: str) -> str:
        figure = definitions()[name]
        assert figure.answer
        return figure.answer(frame[frame["experiment"] == figure.experiment])

    assert "2.56x the packets of centralized" in answer("throughput")  # 205 / 80
    assert f"{636.2 / 363.5:.3g}x what nftables does" in answer("throughput")  # 210 against 120
    assert "1.03x to 1.05x the time of local state" in answer("packet_latency")
    assert "1,000x as long" in answer("state_access_latency")  # 210 us against 0.21 us


def answered(run: Path, name: str) -> str:
    frame = measurements([read_run(run)])
    figure = definitions()[name]
    assert figure.answer
    return figure.answer(frame[frame["experiment"] == figure.experiment])


def test_store_memory_is_drawn_and_answered_by_number_of_records(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "memory", trials=[line for repeat in range(3) for line in store_memory_trials(repeat)])
    draw_figures(run, ["store_memory"])
    points = pd.read_csv(run / "figures" / "store_memory.csv")
    drawn = {(row["y_name"], row["x"]): row["y"] for _, row in points.iterrows()}
    assert drawn["store_rss_mbytes", 1_000_000] == pytest.approx(179.4)
    assert drawn["table_mbytes", 10_000] == pytest.approx(0.784)
    assert drawn["table_payload_ratio", 100_000] == 1.4
    assert set(points["repeats"]) == {3}
    said = answered(run, "store_memory")
    assert said.startswith("With 1,000,000 records a store process takes 179 MB, with 10,000 it takes 102 MB")
    assert "78.4 MB, 1.4x the payload" in said
    page = write_report(run).read_text()
    assert "Headline metrics of every placement" in page
    assert "back to back, records 1,000,000" in page


def test_peers_are_answered_as_ratios(full_run: Path) -> None:
    assert "and 0.9x what passthrough does" in answered(full_run, "throughput")
    assert "a remote get takes 210 µs, 0.808x Redis's 260 µs" in answered(full_run, "state_access_latency")
    assert "2,200 kops, 2.44x Redis's 900" in answered(full_run, "state_access_latency")


def test_peers_are_answered_where_the_placements_are_missing(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "peers", repeats=1, leave_out=("integrated", "integrated:hashed"))
    for name, said in (("throughput", "x what nftables does and 0.9x"), ("state_access_latency", "Redis's 260")):
        answer = answered(run, name)
        assert answer.startswith("Not answered: ")
        assert said in answer
        assert answer.endswith(".")
        assert ".." not in answer


def test_network_functions_measured_on_one_topology_leave_no_gap_on_the_other(tmp_path: Path) -> None:
    kept = {("rack", "traffic_counter"), ("back_to_back", "firewall")}
    lines = [line for line in throughput_trials(0) if (line["topology"], line["nf"]) in kept]
    draw_figures(synthetic_run(tmp_path / "ragged", trials=lines), ["throughput", "cpu_per_packet"])
    panels = {
        name: set(pd.read_csv(tmp_path / "ragged" / "figures" / f"{name}.csv")["panel"])
        for name in ("throughput", "cpu_per_packet")
    }
    assert panels["throughput"] == {"rack, traffic_counter", "back_to_back, firewall"}
    assert panels["cpu_per_packet"] == {"rack, traffic_counter, 50 kpps", "back_to_back, firewall, 150 kpps"}
    with Image.open(tmp_path / "ragged" / "figures" / "throughput.png") as image:
        assert image.width <= style.ONE_COLUMN_IN * PNG_DPI + 1  # one panel wide, not three with two left blank


# Style


def test_placements_differ_in_colour_marker_and_dashes() -> None:
    for values in zip(*((look.label, look.colour, look.marker, look.dashes) for look in style.PLACEMENTS.values())):
        assert len(set(values)) == len(style.PLACEMENTS)


def test_unknown_placement_has_a_look_of_its_own() -> None:
    assert style.line("nearest_rack")["label"] == "nearest rack"
    assert style.order(["nearest", "centralized", "integrated"]) == ["integrated", "centralized", "nearest"]


# Comparison


def test_comparison_says_which_is_better_and_by_how_much(full_run: Path) -> None:
    rows = compare(full_run)
    found = {(row.experiment, row.topology, row.nf, row.metric): row for row in rows}
    latency = found["packet_latency", "rack", "traffic_counter", "p50_us"]
    assert latency.ratio == pytest.approx(43 / 130)
    assert (latency.winner, latency.clear) == ("integrated", True)
    rate = found["throughput", "rack", "firewall", "lossless_kpps"]
    assert rate.ratio == pytest.approx(205 / 80)
    assert rate.winner == "integrated"
    cost = found["throughput", "rack", "firewall", "nf_cpu_us"]
    assert cost.sweep == {"offered_kpps": 50}  # centralized carries 72 kpps: of 20, 50, 100 ... the highest both carry


def test_peer_without_network_function_compares_with_any(tmp_path: Path) -> None:
    sweep = {"operation": "get", "pipeline": 64}
    lines = [
        trial("state_access_latency", "redis", 0, [point(sweep, {"operations_kops": 300.0})]),
        trial("state_access_latency", "centralized", 0, [point(sweep, {"operations_kops": 600.0})], "traffic_counter"),
    ]
    (row,) = compare(synthetic_run(tmp_path / "peer", trials=lines), "redis", "centralized")
    assert (row.ratio, row.winner, row.clear) == (2.0, "centralized", False)


def test_several_runs_are_pooled(tmp_path: Path) -> None:
    runs = [
        synthetic_run(
            tmp_path / str(repeat), trials=[line for line in packet_latency_trials(0) if line["placement"] == placement]
        )
        for repeat, placement in enumerate(("integrated", "centralized"))
    ]
    assert len(compare(runs)) == 6


def test_wrong_names_are_refused_with_the_nearest(full_run: Path) -> None:
    with pytest.raises(NearstateError, match="did you mean integrated") as refused:
        compare(full_run, "centralized", "intergrated")
    assert "migrated" not in str(refused.value), "only what was measured is offered"
    with pytest.raises(NearstateError, match="packet_latency"):
        compare(full_run, experiments=["packet_latencies"])
    with pytest.raises(NearstateError, match="itself"):
        compare(full_run, "local", "local")


def test_known_placement_that_did_not_run_gives_no_rows(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(compare(full_run, "cached", "integrated"), "cached", "integrated")
    assert capsys.readouterr().out == "no point was measured validly under both cached and integrated\n"


def test_plain_table_is_aligned(full_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(compare(full_run, experiments=["packet_latency"]))
    header, *lines = capsys.readouterr().out.splitlines()
    at = header.index("better")
    assert any(line[at:].startswith("integrated 3.02x") for line in lines)
    assert not any("\x1b" in line for line in lines)


# Report


def test_report_is_small_whole_and_loads_nothing(full_run: Path) -> None:
    report = write_report(full_run)
    assert report.stat().st_size < 2_000_000
    page = report.read_text()
    for loading in (
        'src="http',
        "src='http",
        '<link rel="stylesheet"',
        "<script",
        "@import",
        "url(http",
        'xlink:href="http',
        "<!DOCTYPE svg",
    ):
        assert loading not in page
    for said in (
        "How much does each placement carry?",
        "2.56x the packets of centralized",
        "6.1.0-synthetic",
        "store process",
        "3 of 3",
    ):
        assert said in page
    assert page.count('src="data:image/png;base64,') == 5
    assert page.count("<svg") == page.count("</svg>") >= 4


def test_report_of_a_run_without_trials_says_so(tmp_path: Path) -> None:
    page = write_report(synthetic_run(tmp_path / "empty", trials=[])).read_text()
    assert page.count("No trial of this experiment has ended.") == 6  # three experiments, in the overview and in their place


def test_report_of_a_run_without_an_answer_says_why(tmp_path: Path) -> None:
    run = synthetic_run(tmp_path / "invalid")
    lines = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    unseen = [{**line, "experiment": "unseen"} for line in lines[:1]]
    (run / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unseen))
    assert "No figure of this experiment says its answer" in write_report(run).read_text()
    refused = [{**line, "valid": False, "invalid_reasons": ["late"]} for line in unseen]
    (run / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in refused))
    assert "No trial of this experiment was valid." in write_report(run).read_text()


def test_text_from_results_stays_text(tmp_path: Path) -> None:
    line = trial("packet_latency", "local", 0, [], "firewall", valid=False, invalid_reasons=["<script>alert(1)</script>"])
    line["network"] = {"name": "x", "nodes": [{"name": "<b>nf</b>", "role": "nf", "processes": []}], "links": []}
    page = write_report(synthetic_run(tmp_path / "text", trials=[line])).read_text()
    assert "<script>" not in page
    assert "<b>" not in page


def test_network_of_several_switches_is_drawn(tmp_path: Path) -> None:
    leaves: list[dict[str, Any]] = [{"name": name, "role": "switch", "processes": []} for name in ("s1", "s2", "s3")]
    hosts = [{"name": f"nf{n}", "role": "nf", "processes": ["nf process"]} for n in range(1, 5)]
    links = [{"a": f"nf{n}", "b": "s1" if n < 3 else "s2", "label": "storage", "delay_us": 5} for n in range(1, 5)]
    links += [{"a": leaf, "b": "s3", "label": "", "delay_us": 5} for leaf in ("s1", "s2")]
    line = trial("packet_latency", "local", 0, [], network={"name": "leaf_spine", "nodes": leaves + hosts, "links": links})
    page = write_report(synthetic_run(tmp_path / "spine", trials=[line])).read_text()
    assert all(f">{name}<" in page for name in ("s1", "s2", "s3", "nf1", "nf4"))


def test_real_clients_are_drawn_and_told_whatever_part_was_measured(tmp_path: Path) -> None:
    trials = [line for repeat in range(3) for line in real_clients_trials(repeat)]
    run = synthetic_run(tmp_path / "whole", trials=trials)
    assert [path.name for path in draw_figures(run)] == [f"real_clients.{kind}" for kind in ("pdf", "png", "csv")]
    points = pd.read_csv(run / "figures" / "real_clients.csv")
    assert set(points["mark"]) == {"bar", "cdf"}
    row = points[
        (points["panel"] == "firewall, goodput_mbps") & (points["series"] == "integrated") & (points["x"] == "TCP stream")
    ]
    assert row["y"].item() == pytest.approx(816)  # 400 * 2 * 1.02
    said = answered(run, "real_clients")
    assert "a TCP stream gets 816 Mbit/s against 408 Mbit/s" in said
    assert "connections opened per second are 10,200 against 5,100" in said
    for part in ("tcp", "handshakes"):
        few = [changed(line, points=[point for point in line["points"] if point["sweep"]["workload"] == part]) for line in trials]
        assert len(draw_figures(synthetic_run(tmp_path / part, trials=few))) == 3
    alone = synthetic_run(tmp_path / "alone", trials=trials, leave_out=("centralized",))
    assert "holds no valid measurement" in answered(alone, "real_clients")
