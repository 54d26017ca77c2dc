"""Which capture files are recordings of this testbed? Those that the mark beside them names.

The recorder writes the mark before it records. Addresses tell nothing: other networks use 10.0.0.0/8 too. A recording that is
copied without its mark is a capture like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from datastore.base.errors import NearstateError

MARK = "recording.json"
BY = "nearstate"


def mark(folder: Path, files: Iterable[str]) -> None:
    """Write down that these files of a folder are, or will be, recordings of this testbed."""
    (folder / MARK).write_text(json.dumps({"recorded_by": BY, "files": sorted(files)}) + "\n")


def is_ours(path: Path) -> bool:
    """Tell whether a capture file is a recording of this testbed. Raises NearstateError for a mark that cannot be read."""
    beside = path.parent / MARK
    try:
        told = json.loads(beside.read_text())
        return bool(told["recorded_by"] == BY and path.name.removesuffix(".gz") in told["files"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NearstateError(f"{beside} does not say which files beside it are recordings ({error}): remove it, and give the "
                             'replay of one inside=("10.0.0.0/10",)') from error  # fmt: skip
