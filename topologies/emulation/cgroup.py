"""How much CPU may an emulated host use? Groups of the cpu controller, cgroup version 1 or 2, whichever is mounted."""

from __future__ import annotations

from pathlib import Path

from datastore.base.errors import NearstateError
from topologies.emulation.journal import Journal

PERIOD_US = 10_000
"""Shorter than the kernel's default of 100 ms: a host over its share is stopped for milliseconds, not for a tenth of a second."""


def version() -> int | None:
    """Return 2 or 1 for the hierarchy that has the cpu controller; None where there is none to write to."""
    root = Path("/sys/fs/cgroup")
    controllers = root / "cgroup.controllers"
    if controllers.exists() and "cpu" in controllers.read_text().split():
        return 2
    return 1 if (root / "cpu" / "cpu.cfs_quota_us").exists() or (root / "cpu" / "cgroup.procs").exists() else None


class CpuLimits:
    """The cgroups of one network: one parent folder named by the run, one child per limited host."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.version = journal, version()
        base = Path("/sys/fs/cgroup") if self.version == 2 else Path("/sys/fs/cgroup/cpu")
        self.parent = base / f"nearstate-{journal.short}"
        self._made: list[Path] = []

    def limit(self, host: str, cores: float) -> Path:
        """Make the group of a host that may use `cores` processors (0.5: half of one); return its folder.

        A process joins by writing its id to `cgroup.procs` there. Raises NearstateError without a cpu controller.
        """
        if self.version is None:
            raise NearstateError(f"CPU limit {cores} for {host}: no cgroup cpu controller here; leave the limit out")
        try:
            return self._limit(host, cores)
        except OSError as error:
            raise NearstateError(
                f"CPU limit {cores} for {host}: {error}; give this container a writable cgroup, or leave the limit out"
            ) from None

    def _limit(self, host: str, cores: float) -> Path:
        if not self._made:
            if self.version == 2:
                self._delegate(self.parent.parent)
            self._make(self.parent)
            if self.version == 2:
                (self.parent / "cgroup.subtree_control").write_text("+cpu")
        group = self.parent / host
        self._make(group)
        quota_us = int(cores * PERIOD_US)
        if self.version == 2:
            (group / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        return group

    def remove(self) -> None:
        """Remove the groups, which must have no members left."""
        for path in reversed(self._made):
            path.rmdir()
            self.journal.forget("cgroup", path)
        self._made.clear()

    def _make(self, path: Path) -> None:
        self.journal.cgroup(path)
        path.mkdir()
        self._made.append(path)

    def _delegate(self, root: Path) -> None:
        control = root / "cgroup.subtree_control"
        if "cpu" not in control.read_text().split():
            self.journal.setting(control, "-cpu")
            control.write_text("+cpu")
