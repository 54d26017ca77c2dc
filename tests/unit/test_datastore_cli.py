"""python -m datastore: what it shows of a running store, and how it takes mistakes."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from datastore import __main__ as command_line
from datastore.security.secret import CLIENT, Credential, Secret
from datastore.store import layout
from datastore.store.client import Client
from datastore.store.table import Table

ROOT = Path(__file__).resolve().parents[2]
NAME = f"nearstate-test-{os.getpid()}-cli"
FLOW_HIGH = int(ipaddress.ip_address("10.0.0.1")) << 32 | int(ipaddress.ip_address("10.0.1.2"))
FLOW_LOW = 40000 << 48 | 443 << 32 | 6 << 24 | 2 << 16 | (40000 & 0x1FE) >> 1


@pytest.fixture(scope="module")
def served() -> Iterator[subprocess.Popen[str]]:
    """A store that `python -m datastore serve` runs, with 121 records."""
    process = subprocess.Popen(
        [sys.executable, "-m", "datastore", "serve", "--table", NAME, "--capacity", "5000", "--cluster", "3"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert NAME in line
        port = int(line.split(":")[1].split(";")[0])
        with Client([("127.0.0.1", port)], 1, 32, 3, credential=served_client(NAME)[0]) as client:
            client.connect()
            client.insert(FLOW_LOW, FLOW_HIGH, b"\x2a", expiry=(int(time.monotonic()) + 300) % (1 << 20))
            for n in range(120):
                client.insert(n << 32 | 17 << 24 | n + 100, n, bytes([n]))
        yield process
    finally:
        process.terminate()
        process.wait(10)
        (Path("/dev/shm") / NAME).unlink(missing_ok=True)


def served_client(table: str) -> tuple[Credential, int]:
    """Return the credential of client 1 of a table that `serve` serves, and its cluster's number."""
    secret = Secret.read(command_line.secret_file(table))
    return secret.credential(CLIENT, "test", 1), secret.cluster


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = command_line.main(arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_list_names_the_running_stores(served, capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    line = next(line for line in out.splitlines() if NAME in line)
    assert str(served.pid) in line
    assert "121" in line
    listed = json.loads(run(capsys, "list", "--json")[1])
    assert {"records": 121, "server_pid": served.pid}.items() <= next(t for t in listed if t["name"] == NAME).items()


def test_statistics_show_counters_and_owners(served, capsys):
    _, out, _ = run(capsys, "statistics", NAME)
    for text in ("fill_ratio", "lock_takeovers", "stale_epoch", f"pid {served.pid}"):
        assert text in out
    statistics = json.loads(run(capsys, "statistics", NAME, "--json")[1])
    assert statistics["counters"]["operations"] == 121
    assert list(statistics["owners"].values()) == [served.pid]


def test_records_are_decoded(served, capsys):
    _, out, _ = run(capsys, "records", NAME, "--partition", "32")
    assert "tcp 10.0.0.1:40000 -> 10.0.1.2:443" in out
    assert "2a00000000000000 0000000000000000" in out
    assert " in 2" in out or " in 300 s" in out
    (record,) = json.loads(run(capsys, "records", NAME, "--partition", "32", "--json")[1])
    assert (record["client"], record["version"], record["kind"]) == ("10.0.0.1:40000", 1, 2)
    assert 0 < record["expires_in_s"] <= 300
    assert bytes.fromhex(record["value"]) == b"\x2a".ljust(32, b"\0")
    _, out, _ = run(capsys, "records", NAME, "--limit", "5")
    assert "5 of 121 records; more with --limit" in out


def locks(table: Table) -> np.ndarray:
    """Return the lock words of all partitions; they count how often each lock was taken."""
    first, stride = int(table.words[layout.FIRST]), int(table.words[layout.STRIDE])
    return table.words[first + layout.LOCK : first + table.partitions * stride : stride]


def test_looking_takes_no_lock(served, capsys):
    table = Table.attach(NAME)
    before = locks(table).copy()
    run(capsys, "records", NAME)
    run(capsys, "statistics", NAME)
    after = locks(table)
    assert (after == before).all()
    table.verify()
    table.close()


def test_mistakes_get_one_line_and_a_failing_exit_code(served, capsys):
    for arguments, message in [
        (("statistics", NAME[:-1] + "j"), f"did you mean {NAME}"),
        (("records", NAME, "--partition", "256"), "it has 0 to 255"),
        (("serve", "--table", NAME), "exists already"),
        (("serve", "--table", NAME, "--attach"), "served already"),
        (("serve", "--table", "a/b"), "table name 'a/b'"),
        (("serve", "--table", NAME + "2", "--value-bytes", "9"), "multiple of 8"),
        (("serve", "--table", NAME + "2", "--address", "192.0.2.1"), "cannot listen on 192.0.2.1"),
    ]:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1
    assert not (Path("/dev/shm") / f"{NAME}2").exists()
    with pytest.raises(SystemExit):
        run(capsys, "records", "--limit", "0")
    with pytest.raises(SystemExit):
        run(capsys, "nonsense")


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        run(capsys, "--help")
    assert caught.value.code == 0
    assert "python -m datastore records" in capsys.readouterr().out


def test_a_kept_table_is_served_again_and_ctrl_c_ends_cleanly():
    name = f"{NAME}-kept"
    command = [sys.executable, "-m", "datastore", "serve", "--table", name, "--capacity", "500", "--keep"]
    try:
        for turn, extra in enumerate(([], ["--attach"])):
            process = subprocess.Popen([*command, *extra], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            try:
                assert process.stdout
                port = int(process.stdout.readline().split(":")[1].split(";")[0])
                credential, cluster = served_client(name)
                with Client([("127.0.0.1", port)], 1, 32, cluster, credential=credential) as client:
                    client.connect()
                    assert client.add(1, 1, 0, 1).value[0] == turn + 1
                process.send_signal(signal.SIGINT)
                assert process.wait(10) == 0
            finally:
                process.kill()
                process.wait()
        table = Table.attach(name)
        table.verify()
        table.close()
    finally:
        (Path("/dev/shm") / name).unlink(missing_ok=True)
        command_line.secret_file(name).unlink(missing_ok=True)
