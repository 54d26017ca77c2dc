"""How far a run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Counts trials. `done` of `total` were finished before, by the run that is resumed."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self.console = Console(stderr=False)
        self.bar: Bar | None = None
        self.invalid = 0
        self.started = time.monotonic()

    def __enter__(self) -> Progress:
        resumed = f", {self.done} finished before" if self.done else ""
        print(f"{self.title}: {_trials(self.total)}{resumed}", flush=True)
        if sys.stdout.isatty():
            columns = (SpinnerColumn(), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
                       TextColumn("{task.description}"))  # fmt: skip
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, completed=self.done)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
        if error is None:
            spent = time.monotonic() - self.started
            print(f"{_trials(self.total)}, {self.invalid} invalid, {spent:.0f} s", flush=True)

    def start(self, name: str) -> None:
        """A trial starts."""
        if self.bar:
            self.bar.update(self.task, description=name)

    def end(self, name: str, seconds: float, invalid_reasons: list[str], again: bool = False) -> None:
        """A trial has ended and is on disk; `again`: it will be tried once more."""
        self.done += 1
        self.total += again
        self.invalid += bool(invalid_reasons)
        verdict = f"  INVALID: {invalid_reasons[0]}" if invalid_reasons else ""
        text = f"[{self.done}/{self.total}] {name} {seconds:.1f} s{verdict}"
        if self.bar:
            self.bar.update(self.task, completed=self.done, total=self.total)
            if verdict:
                self.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"
