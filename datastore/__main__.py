"""The command line: python -m datastore {list,statistics,records,serve,status,move,check,simulate}.

`statistics` and `records` look at the shared memory of a running store without making anybody wait: records are copied without
a lock and copied again when someone was at work on them (`Table.records`).
"""

from __future__ import annotations

from datastore.base import surroundings

if __name__ == "__main__":
    surroundings.start_anew()  # before a library is imported

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Sheet

from datastore.base.errors import NearstateError, unknown
from datastore.base.partitioning import PARTITIONS
from datastore.security.secret import Credential, Secret, forget_key, key_file
from datastore.store.inspection import Record
from datastore.store.partitions import PartitionMap
from datastore.store.table import SHARED_MEMORY, Table
from datastore.verification.history import read_history
from datastore.verification.linearizability import LINEARIZABLE, MAX_WIDTH, check_history

EXAMPLES = """examples:
  python -m datastore list
  python -m datastore statistics
  python -m datastore statistics my-table --json
  python -m datastore records --partition 7 --limit 20
  python -m datastore serve --table my-table --capacity 100000 --value-bytes 32 --port 7700
  python -m datastore status 10.9.255.1:7600
  python -m datastore move 10.9.255.1:7600 0-63 nf2
  python -m datastore check results/latest/histories
  python -m datastore simulate --seed 89 --only "nf2|coordinator"

NAME is a table's name as `list` shows it; it may be left out when there is one table only.
"""
HOST = "here"
"""What `serve` calls its host: it is primary of every partition."""


def tables() -> list[Table]:
    """Return the tables in this host's shared memory, by name; what is none, or not ours to open, is left out."""
    found = []
    for path in sorted(SHARED_MEMORY.iterdir()):
        if path.is_file() and os.access(path, os.R_OK | os.W_OK):
            try:
                found.append(Table.attach(path.name))
            except NearstateError:
                continue
    return found


def chosen(name: str | None) -> Table:
    """Return the table called `name`, or the only one. Raises NearstateError when that is none or not clear."""
    found = tables()
    names = [table.name for table in found]
    if name is None and len(found) == 1:
        return found[0]
    if name is None:
        raise NearstateError(f"which table? there are {len(found)} here: {', '.join(names) or 'none; is a store running?'}")
    if name not in names:
        raise unknown("table", name, names)
    return found[names.index(name)]


def list_stores(arguments: argparse.Namespace) -> None:
    """Print every table here, and who serves it."""
    found = [table.statistics() for table in tables()]
    if arguments.json:
        print(json.dumps(found))
        return
    if not found:
        print("no store runs here")
        return
    sheet = Sheet("table", "store process", "listens on", "records", "capacity", "fill", "value", "epoch", "primary of")
    for each in found:
        sheet.add_row(
            each["name"],
            str(each["server_pid"] or "none"),
            f"{each['address']}:{each['port']}" if each["port"] else "nobody",
            f"{each['records']:,}",
            f"{each['capacity']:,}",
            f"{each['fill_ratio']:.0%}",
            f"{each['value_bytes']} B",
            str(each["epoch"]),
            f"{each['primary_partitions']} of {each['partitions']}",
        )
    console().print(sheet)


def print_statistics(arguments: argparse.Namespace) -> None:
    """Print sizes, counters and owners of a table."""
    statistics = chosen(arguments.table).statistics()
    if arguments.json:
        print(json.dumps(statistics))
        return
    sheet = Sheet("statistic", "value", title=statistics["name"], title_justify="left")
    for name, value in statistics.items():
        if name in ("name", "owners", "statuses", "counters"):
            continue
        sheet.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    sheet.add_row("owners", ", ".join(f"{number}: pid {pid}" for number, pid in statistics["owners"].items()) or "none")
    for group in ("counters", "statuses"):
        sheet.add_section()
        for name, count in statistics[group].items():
            sheet.add_row(name, f"{count:,}")
    console().print(sheet)


def print_records(arguments: argparse.Namespace) -> None:
    """Print records, their keys taken apart into flows."""
    table = chosen(arguments.table)
    records = list(itertools.islice(table.records(arguments.partition), arguments.limit))
    if arguments.json:
        print(json.dumps([as_json(record) for record in records]))
        return
    sheet = Sheet("partition", "kind", "key", "version", "expires", "value")
    for record in records:
        left_s = record.expires_in_s
        expires = "never" if left_s is None else f"in {left_s} s" if left_s > 0 else "expired"
        key = record.key
        sheet.add_row(str(key.partition), str(key.kind), str(key), str(record.version), expires, record.value.hex(" ", 8))
    console().print(sheet)
    total = table.count() if arguments.partition is None else None
    if total is not None and total > len(records):
        print(f"{len(records):,} of {total:,} records; more with --limit")


def as_json(record: Record) -> dict[str, Any]:
    """Return a record as a JSON object; the value in hexadecimal."""
    key = record.key
    return {
        "partition": key.partition,
        "kind": key.kind,
        "protocol": key.protocol,
        "client": f"{key.client}:{key.client_port}",
        "server": f"{key.server}:{key.server_port}",
        "key": f"{record.high:016x}{record.low:016x}",
        "version": record.version,
        "expires_in_s": record.expires_in_s,
        "value": record.value.hex(),
    }


def serve(arguments: argparse.Namespace) -> None:
    """Run a store process in the foreground until SIGTERM or Ctrl-C."""
    from datastore.process.store import StoreProcess, stop_at_signals

    stopping = stop_at_signals()
    path = arguments.secret or secret_file(arguments.table)
    secret = Secret.read(path) if path.exists() else Secret.fresh()
    descriptor = key_file(secret.key)
    config = {
        "host": HOST, "table": arguments.table, "capacity": arguments.capacity, "value_bytes": arguments.value_bytes,
        "address": arguments.address, "port": arguments.port,
        "cluster": secret.cluster if arguments.cluster is None else arguments.cluster, "secret": descriptor,
        "map": PartitionMap(arguments.epoch, ((HOST,),) * PARTITIONS).to_json(), "create": not arguments.attach,
        "keep": arguments.keep,
    }  # fmt: skip
    store = StoreProcess(config)
    forget_key(descriptor)
    is_new = not path.exists()
    try:
        if is_new:
            secret.write(path)
        where = f"{arguments.address}:{store.port}"
        print(f"table {arguments.table} is served on {where}; clients need {path}; stop with Ctrl-C", flush=True)
        while not stopping:
            store.turn()
    finally:
        store.close()
        if is_new and not arguments.keep and not arguments.secret:
            path.unlink(missing_ok=True)


def secret_file(table: str) -> Path:
    """Return where `serve` keeps the secret of a table if it is not told."""
    return SHARED_MEMORY / f"{table}.secret"


def administrator(path: Path | None) -> Credential:
    """Return the credential of whoever may read the secret: at `path`, or the only one here. Raises NearstateError."""
    if path is None:
        found = [file for file in sorted(SHARED_MEMORY.glob("nearstate-*.secret")) if os.access(file, os.R_OK)]
        if len(found) != 1:
            names = ", ".join(map(str, found)) or "none; does the run go on, and is it yours?"
            raise NearstateError(f"which secret? there are {len(found)} here: {names}; choose one with --secret FILE")
        path = found[0]
    return Secret.read(path).administrator()


def check(arguments: argparse.Namespace) -> None:
    """Check that a recorded history is linearizable; tell the operations that cannot be put in order."""
    history = read_history(arguments.folder)
    result = check_history(history, arguments.width)
    unanswered = sum(key.unanswered for key in result.keys)
    if arguments.json:
        print(json.dumps({
            "verdict": result.verdict, "operations": result.operations, "unanswered": unanswered, "refused": result.refused,
            "keys": len(result.keys), "clients": len(history.files), "seconds": round(result.seconds, 3),
            "torn": {str(file.path): file.torn for file in history.files if file.torn}, "explanation": result.explanation,
        }))  # fmt: skip
    else:
        for file in history.files:
            if file.torn:
                print(f"{file.path}: {file.torn}")
        keys = f"{len(result.keys)} key{'s' * (len(result.keys) != 1)}"
        print(
            f"{result.verdict}: {result.operations:,} operations on {keys} by {len(history.files)} client processes, "
            f"{unanswered:,} without an answer; {result.refused:,} refused; {result.seconds:.1f} s"
        )
        print("\n".join(result.explanation), end="\n" * bool(result.explanation))
    if result.verdict != LINEARIZABLE:
        wrong = sum(key.verdict != LINEARIZABLE for key in result.keys)
        raise NearstateError(f"the history in {arguments.folder} is not shown to be linearizable: {wrong} of its keys, see above")


def simulate(arguments: argparse.Namespace) -> None:
    """Run the replication's decisions on an imagined network with faults, all of it from one seed; print what happened."""
    from datastore.verification.simulator import Violation, World

    kind: type[World] = World
    if arguments.packets:
        from nfs.verification.simulator import Rack as kind
    world = kind(arguments.seed, replicas=arguments.replicas)
    failure = ""
    try:
        world.play(arguments.seconds)
    except Violation as violation:
        failure = str(violation)
    for line in world.trace:
        if arguments.only and re.search(arguments.only, line):
            print(line)
    faults = ", ".join(f"{times} x {what}" for what, times in sorted(world.happened.items())) or "no faults"
    print(f"seed {arguments.seed}: {len(world.history):,} operations, {faults}; run {world.digest.hexdigest()[:16]}")
    if failure:
        raise NearstateError(failure)
    print("linearizable, and all replicas are alike")


def coordinator_address(text: str) -> tuple[str, int]:
    """Return ADDRESS:PORT as its parts."""
    address, _, port = text.rpartition(":")
    if not address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no ADDRESS:PORT, as 10.9.255.1:7600")
    return address, int(port)


def status(arguments: argparse.Namespace) -> None:
    """Print what a coordinator knows: the map, leases, who is missing, what is under way."""
    from datastore.coordination.report import host_sheet, troubles
    from datastore.coordination.routed import ask

    answer = ask(arguments.coordinator, {"status": True}, administrator(arguments.secret))["status"]
    if arguments.json:
        print(json.dumps(answer))
        return
    console().print(host_sheet(answer))
    for line in troubles(answer) or [f"all {len(answer['map']['groups'])} partitions have {answer['replicas']} copies"]:
        print(line)


def move(arguments: argparse.Namespace) -> None:
    """Make a host the primary of partitions, losing nothing; it goes on in the background, `status` shows how far."""
    from datastore.coordination.routed import ask

    first, _, last = arguments.partitions.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise NearstateError(f"partitions {arguments.partitions!r}: give one, as 7, or a range, as 0-63")
    message = {"partitions": list(range(int(first), int(last or first) + 1)), "target": arguments.host}
    answer = ask(arguments.coordinator, {"move": message}, administrator(arguments.secret))
    if "error" in answer:
        raise NearstateError(answer["error"])
    print(f"{len(message['partitions'])} partitions are on their way to {arguments.host}")


def console() -> Console:
    """Return where tables are printed: as wide as they are when the output is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def positive(text: str) -> int:
    """Return an argument as a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m datastore", epilog=EXAMPLES,
        description="Look into the stores that run on this host, run one, or check what one did.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Any, json_too: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=function.__doc__.splitlines()[0], description=function.__doc__)
        added.set_defaults(function=function)
        if json_too:
            added.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
        return added

    command("list", list_stores)
    command("statistics", print_statistics).add_argument("table", nargs="?", metavar="NAME")
    records = command("records", print_records)
    records.add_argument("table", nargs="?", metavar="NAME")
    records.add_argument("--limit", type=positive, default=50, help="print at most so many (default: %(default)s)")
    records.add_argument("--partition", type=int, help="only this partition (default: all)")
    server = command("serve", serve, json_too=False)
    server.add_argument("--table", required=True, metavar="NAME", help="name of the table in shared memory")
    server.add_argument("--capacity", type=positive, default=65536, help="records (default: %(default)s)")
    server.add_argument("--value-bytes", type=positive, default=32, help="bytes of a value (default: %(default)s)")
    server.add_argument("--address", default="127.0.0.1", help="IPv4 address to listen on (default: %(default)s)")
    server.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    server.add_argument("--cluster", type=int, help="cluster id its clients must name (default: the secret's)")
    server.add_argument(
        "--secret", type=Path, metavar="FILE", help="what clients must know, made if missing (default: /dev/shm/NAME.secret)"
    )
    server.add_argument("--epoch", type=positive, default=1, help="epoch of the partition map (default: %(default)s)")
    server.add_argument("--attach", action="store_true", help="serve a table that exists instead of making one")
    server.add_argument("--keep", action="store_true", help="leave the table in shared memory at the end")
    state = command("status", status)
    moving = command("move", move, json_too=False)
    for each in (state, moving):
        each.add_argument("--secret", type=Path, metavar="FILE", help="of the deployment (default: the only one in /dev/shm)")
        each.add_argument("coordinator", type=coordinator_address, metavar="ADDRESS:PORT", help="where the coordinator listens")
    moving.add_argument("partitions", metavar="PARTITIONS", help="one, or a range: 7, 0-63")
    moving.add_argument("host", metavar="HOST", help="the store host that is to be their primary")
    simulation = command("simulate", simulate, json_too=False)
    simulation.add_argument("--seed", type=int, required=True, help="which run; a failing test names it")
    simulation.add_argument(
        "--seconds", type=float, default=0.8, help="imagined seconds of faults (default: %(default)s, as tests)"
    )
    simulation.add_argument("--replicas", type=int, default=0, help="copies of each partition (default: 2 or 3, by seed)")
    simulation.add_argument("--packets", action="store_true", help="with NF processes, their packets, and a switch")
    simulation.add_argument("--only", default=".", metavar="REGEX", help="log lines to print (default: all; '': none)")
    checking = command("check", check)
    checking.add_argument("folder", type=Path, metavar="HISTORY_FOLDER", help="where the clients recorded, a file each")
    checking.add_argument(
        "--width", type=positive, default=MAX_WIDTH, help="pasts kept at once before a key is undecided (default: %(default)s)"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.function(parsed)
    except NearstateError as error:
        print(f"datastore: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
