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

from analysis import style
from analysis.compare import compare, print_comparison
from analysis.figures import definitions
from analysis.redraw import draw_figures
from analysis.report import write_report
from analysis.results import decode, measurements, merge, read_run
from analysis.summary import COLUMNS, confidence_interval, summarize, unit, write_summary
from datastore.native.errors import NearstateError

# Medians a synthetic run is built around: one-way packet latency (us), lossless rate (kpps), CPU per packet (us).
PACKET_US = {"local": 41, "integrated": 43, "integrated:hashed": 95, "centralized": 130}
LOSSLESS_KPPS = {"local": 210, "integrated": 205, "integrated:hashed": 110, "centralized": 80, "nftables": 120}
CPU_US = {"local": (2.0, 0.0, 1.7), "integrated": (2.2, 0.1, 1.7), "integrated:hashed": (2.9, 1.1, 2.3),
          "centralized": (3.3, 2.4, 2.9), "nftables": (3.6, 0.0, 0.0)}
ACCESS_US = {"integrated": 0.21, "centralized": 210.0, "redis": 260.0}
NETWORK = {
    "name": "rack", "datapath": "userspace", "delay_mechanism": "wire",
    "nodes": [{"name": "client", "role": "client", "processes": ["generator"]}, {"name": "server", "role": "server", "processes": ["sink"]},
              {"name": "tor", "role": "switch", "processes": []}, {"name": "nf1", "role": "nf", "processes": ["nf process", "store process"]},
              {"name": "nf2", "role": "nf", "processes": ["nf process", "store process"]},
              {"name": "control", "role": "control", "processes": ["coordinator"]}],
    "links": [{"a": "client", "b": "tor", "label": "net", "delay_us": 25}, {"a": "server", "b": "tor", "label": "net", "delay_us": 25},
              *({"a": nf, "b": "tor", "label": label, "delay_us": 25} for nf in ("nf1", "nf2") for label in ("inside", "outside", "storage")),
              {"a": "control", "b": "tor", "label": "storage", "delay_us": 25}],
}
BACK_TO_BACK = {
    "name": "back_to_back", "datapath": "none", "delay_mechanism": "none",
    "nodes": [{"name": "client", "role": "client", "processes": ["generator"]}, {"name": "nf1", "role": "nf", "processes": ["nf process"]},
              {"name": "server", "role": "server", "processes": ["sink"]}, {"name": "store1", "role": "store", "processes": ["store process"]}],
    "links": [{"a": "client", "b": "nf1", "label": "inside", "delay_us": 0}, {"a": "nf1", "b": "server", "label": "outside", "delay_us": 0},
              {"a": "nf1", "b": "store1", "label": "storage", "delay_us": 0}],
}


@cache
def histogram(median_us: float, seed: int, samples: int = 3000) -> str:
    """Return an encoded histogram of log-normal latencies in ns around a median."""
    recorded = HdrHistogram(1, 60_000_000_000, 3)
    for value in np.random.default_rng(seed).lognormal(np.log(median_us * 1000), 0.25, samples):
        recorded.record_value(int(value))
    return str(recorded.encode().decode())


def trial(experiment: str, placement: str, repeat: int, points: list[dict[str, Any]], nf: str = "", topology: str = "rack",
          **changes: Any) -> dict[str, Any]:
    """Return one line of trials.jsonl as the runner writes it."""
    return {"trial": f"{experiment}/{topology}/{placement}/{nf}/{repeat}", "experiment": experiment, "topology": topology,
            "placement": placement, "nf": nf, "replicas": 1, "sweep": {}, "repeat": repeat, "seed": 17,
            "started": "2026-01-01T00:00:00Z", "seconds": 6.1, "valid": True, "invalid_reasons": [], "points": points,
            "fidelity": {"generator_lateness_p99_us": 3.0 + repeat, "cpu_saturation": 0.7},
            "calibration": {"valid": True, "reasons": [], "base_us": 20.0, "rtt_us": 122.0 + repeat, "loss": 0.0, "paths": [
                {"path": "client.net - nf1.inside", "spec_us": 100.0, "rtt_us": 122.0 + repeat, "excess_us": 2.0 + repeat, "lost": 0, "sent": 576}]},
            "ledger": {"sent": 100_000, "received": 99_990, "lost": 10, "nf": {"received": 100_000, "dropped_by_verdict": 8, "waiting_room_full": 2}},
            "network": NETWORK if topology == "rack" else BACK_TO_BACK, **changes}


def point(sweep: dict[str, Any], metrics: dict[str, Any], latency_us: float | None = None, seed: int = 0, **changes: Any) -> dict[str, Any]:
    histograms = {"latency_ns": histogram(latency_us, seed)} if latency_us else {}
    return {"sweep": sweep, "metrics": metrics, "histograms": histograms, "valid": True, "invalid_reasons": [], **changes}


def state_access_trials(repeat: int) -> list[dict[str, Any]]:
    noise = 1 + 0.02 * repeat
    trials = []
    for placement, median_us in ACCESS_US.items():
        points = [point({"operation": operation, "load": load}, {"p50_us": median_us * slower * noise, "p99_us": median_us * slower * noise * 1.8},
                        median_us * slower * noise * factor, repeat)
                  for operation, factor in (("read", 0.9), ("write", 1.0), ("read_modify_write", 1.1))
                  for load, slower in (("alone", 1.0), ("loaded", 1.9))]
        if placement != "integrated":
            points.append(point({"operation": "get", "pipeline": 64}, {"operations_kops": 2200.0 if placement == "centralized" else 900.0}))
            points.append(point({"operation": "get", "pipeline": 1}, {"p50_us": median_us}))
        trials.append(trial("state_access_latency", placement, repeat, points))
    return trials


def packet_latency_trials(repeat: int) -> list[dict[str, Any]]:
    noise = 1 + 0.03 * repeat
    weight = {"passthrough": 0.0, "firewall": 0.6, "traffic_counter": 1.0}
    medians = {(placement, nf): noise * (40 + (latency_us - 40) * share) for placement, latency_us in PACKET_US.items() for nf, share in weight.items()}
    return [trial("packet_latency", placement, repeat, [point(
        {"offered_kpps": 20}, {"p50_us": median_us, "p99_us": 1.8 * median_us, "delivered_kpps": 20.0, "lost": 0}, median_us, repeat)], nf)
        for (placement, nf), median_us in medians.items()]


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
                points = [point({"offered_kpps": offered}, {"delivered_kpps": min(offered, limit), "loss_ratio": max(0, 1 - limit / offered), **costs})
                          for offered in offers]
                points.append(point({"search": "rfc2544"}, {"lossless_kpps": 0.95 * limit, "nf_rss_mbytes": 210.0, "store_rss_mbytes": 120.0}))
                if topology == "back_to_back":
                    points.append(point({"load": "saturated"}, {"delivered_kpps": 1.1 * limit}))
                trials.append(trial("throughput", placement, repeat, points, nf, topology))
    return trials


def synthetic_run(folder: Path, repeats: int = 3, trials: list[dict[str, Any]] | None = None, leave_out: tuple[str, ...] = ()) -> Path:
    """Write a results folder as the runner does and return it; `leave_out` names placements that were not run."""
    folder.mkdir(parents=True)
    if trials is None:
        trials = [line for repeat in range(repeats) for make in (state_access_trials, packet_latency_trials, throughput_trials)
                  for line in make(repeat)]
    questions = {"state_access_latency": "How long does one access to state take?", "packet_latency": "How long is a packet delayed?",
                 "throughput": "How much does each placement carry?"}
    (folder / "spec.json").write_text(json.dumps({
        "run_id": folder.name, "profile": "synthetic", "seed": 17, "commit": "0" * 40,
        "experiments": {name: {"question": question} for name, question in questions.items()}}))
    (folder / "host.json").write_text(json.dumps({"kernel": "6.1.0-synthetic", "cpus": 2, "versions": {"openvswitch": "3.1"}, "netem": False}))
    kept = [json.dumps(line) + "\n" for line in trials if line["placement"] not in leave_out]
    (folder / "trials.jsonl").write_text("".join(kept))
    return folder


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_run(tmp_path_factory.mktemp("results") / "synthetic-full")
