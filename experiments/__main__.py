"""The command line: python -m experiments {list,run,compare,figures,doctor,clean,shell}."""

from __future__ import annotations

from datastore.base import surroundings

if __name__ == "__main__":
    surroundings.start_anew()  # before a library is imported

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from datastore.base.errors import NearstateError

EXAMPLES = """examples:
  python -m experiments list
  python -m experiments run --profile smoke packet_latency
  python -m experiments run --resume latest
  python -m experiments run --pcap --profile smoke packet_latency
  python -m experiments compare centralized integrated --run latest
  python -m experiments figures latest
  python -m experiments shell --placement centralized --nf firewall
"""


def list_experiments(arguments: argparse.Namespace) -> None:
    """Print each experiment with its question and how many trials each profile has; one that cannot be loaded, with why."""
    from experiments.harness import spec

    broken = []
    for name in spec.experiment_names():
        try:
            experiment = spec.load(name)
        except NearstateError as error:
            broken.append(name)
            print(f"{name}\n    cannot be loaded: {error}")
            continue
        counts = [f"{profile} {len(list(spec.trials(name, experiment.for_profile(profile))))}" for profile in spec.PROFILES]
        lines = dict.fromkeys(line for profile in spec.PROFILES for line in spec.replays(experiment.for_profile(profile)))
        print("\n    ".join([name, experiment.question, f"trials: {', '.join(counts)}", *lines]))
    if broken:
        raise NearstateError(f"cannot be loaded: {', '.join(broken)}; see the list above")


def run(arguments: argparse.Namespace) -> None:
    """Run experiments, draw figures and report, print the comparison; exit status 1 where no trial was valid."""
    from experiments.harness import runner

    try:
        record = runner.run(arguments.experiment, arguments.profile, arguments.resume, arguments.pcap)
    except KeyboardInterrupt:
        raise NearstateError(
            "interrupted; what has ended is safe: go on with `python -m experiments run --resume latest`"
        ) from None
    report(record.folder, arguments.baseline, arguments.other)
    from analysis.outcome import outcome

    found = outcome(record.folder)
    for line in found.lines:
        print(line)
    if found.unanswered:
        told = f"no trial was valid of {', '.join(found.unanswered)}: nothing is known of it; the report says why"
        if not found.is_answered:
            raise NearstateError(told)
        print(told)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Tell in one line that a run's folder cannot be written."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NearstateError(f"{error.filename or folder} cannot be written: {error.strerror}; free some space, mend its "
                             "permissions or mount it writable") from error  # fmt: skip


def report(folder: Path, baseline: str, other: str) -> None:
    """Write summary, figures and report of a run and print the table of two placements."""
    from analysis.compare import compare as compare_placements
    from analysis.compare import print_comparison
    from analysis.redraw import draw_figures
    from analysis.report import write_report
    from analysis.summary import write_summary

    with writing(folder):
        write_summary(folder)
        draw_figures(folder)
        page = write_report(folder)
    print_comparison(compare_placements([folder], baseline, other), baseline, other)
    print(f"report: {page}")


def compare(arguments: argparse.Namespace) -> None:
    """Print the table of two placements from any runs."""
    from analysis.compare import compare as compare_placements
    from analysis.compare import print_comparison
    from experiments.harness.record import Record

    folders = [Record.open(run).folder for run in arguments.run]
    rows = compare_placements(folders, arguments.baseline, arguments.other, arguments.experiment or None)
    print_comparison(rows, arguments.baseline, arguments.other)


def figures(arguments: argparse.Namespace) -> None:
    """Redraw a run's figures and its report, without running anything."""
    from analysis.redraw import draw_figures
    from analysis.report import write_report
    from analysis.summary import write_summary
    from experiments.harness.record import Record

    folder = Record.open(arguments.run).folder
    with writing(folder):
        write_summary(folder)
        for path in draw_figures(folder, arguments.figure or None):
            print(path)
        print(write_report(folder))


def doctor(arguments: argparse.Namespace) -> None:
    """Print what this box has, and how to mend what it lacks."""
    from experiments.harness import doctor as box

    facts = box.examine()
    print(box.render(facts))
    if any(fact.lacking for fact in facts):
        raise SystemExit(1)


def clean(arguments: argparse.Namespace) -> None:
    """Remove what runs that were killed left behind, and nothing else."""
    from experiments.harness.record import Record
    from topologies.emulation import journal

    killed = arguments.run is None or arguments.run in journal.runs()
    removed = journal.clean(arguments.run if killed else Record.open(arguments.run).run_id)  # refuses a run that never was
    for item in removed:
        print(f"removed {item}")
    print(f"{len(removed)} leftovers removed")


def shell(arguments: argparse.Namespace) -> None:
    """Bring a topology up with a placement running and open Mininet's prompt in it."""
    from experiments.harness.shell import open_shell

    open_shell(arguments.topology, arguments.placement, arguments.nf, arguments.nf_hosts)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="python -m experiments", description="Where should the state of a network function live?",
                                  epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], None], example: str) -> argparse.ArgumentParser:
        text = (function.__doc__ or "").strip()
        added = commands.add_parser(name, help=text, description=text, epilog=f"example: python -m experiments {example}")
        added.set_defaults(function=function)
        return added

    command("list", list_experiments, "list")
    added = command("run", run, "run --profile quick throughput")
    added.add_argument("experiment", nargs="*", help="experiments to run; all when none is named")
    added.add_argument("--profile", default="quick", help="smoke (CI, seconds), quick (default), paper (repeats, full sweeps)")
    added.add_argument("--resume", metavar="RUN", help="go on with an interrupted run (its id, or `latest`)")
    added.add_argument("--pcap", action="store_true", help="record each trial at each host interface, into results/<run>/pcap/; "
                       "e.g. run --pcap --profile smoke packet_latency")  # fmt: skip
    _placements(added)
    added = command("compare", compare, "compare centralized integrated --run latest")
    added.add_argument("baseline", nargs="?", default="centralized", help="placement compared against (default centralized)")
    added.add_argument("other", nargs="?", default="integrated", help="placement compared with it (default integrated)")
    added.add_argument("--run", action="append", default=[], metavar="RUN", help="run to read, may be repeated (default latest)")
    added.add_argument("--experiment", action="append", default=[], help="only this experiment, may be repeated")
    added = command("figures", figures, "figures latest")
    added.add_argument("run", nargs="?", default="latest", help="run to redraw (default latest)")
    added.add_argument("figure", nargs="*", help="figures to redraw; all when none is named")
    command("doctor", doctor, "doctor")
    command("clean", clean, "clean").add_argument("run", nargs="?", help="only this run's leftovers")
    added = command("shell", shell, "shell --placement centralized --nf firewall")
    added.add_argument("--topology", default="rack", help="topology (default rack)")
    added.add_argument("--placement", default="integrated", help="placement of the state (default integrated)")
    added.add_argument("--nf", default="firewall", help="network function (default firewall)")
    added.add_argument("--nf-hosts", type=int, default=2, help="number of NF hosts (default 2)")
    return top


def _placements(added: argparse.ArgumentParser) -> None:
    added.add_argument("--baseline", default="centralized", help="placement of the printed table compared against")
    added.add_argument("--other", default="integrated", help="placement of the printed table compared with it")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an error the user can mend is one line on standard error and exit code 1."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's is none to other processes; matplotlib reads it when it is imported
    parsed = parser().parse_args(arguments)
    if parsed.command == "compare" and not parsed.run:
        parsed.run = ["latest"]
    try:
        parsed.function(parsed)
    except NearstateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
