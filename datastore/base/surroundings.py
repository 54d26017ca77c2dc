"""What must not depend on the shell that calls: where tools are found, what Numba and Python read from the environment.

`prepare` runs when anything of this repository is imported, so before Numba is, in every process and at every entry: experiments,
datastore, tests, set-up. `start_anew` is for entries alone: it mends what an interpreter reads only at its start.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ADMINISTRATORS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Folders of tools that `su`, cron and users' shells may leave out of the PATH; the folders that are there stay first."""
OURS = ("NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK", "NUMBA_CACHE_DIR", "NUMBA_CACHE_LOCATOR_CLASSES")
"""Numba's variables with a meaning here. Any other changes what is compiled, or prints the compiler's inner life."""
READ_AT_START = ("PYTHONIOENCODING", "PYTHONWARNINGS", "PYTHONOPTIMIZE")
"""Variables of the interpreter that are unset: text is UTF-8, a library's warning ends no process, assertions hold."""
ANEW = "NEARSTATE_STARTED_ANEW"


def prepare(root: Path, kind: str) -> None:
    """Set this process' environment, which its children inherit. root: the repository. kind: of compilation, a folder's name.

    Raises SystemExit when compiled functions could lie only in another user's folder.
    """
    there = os.environ.get("PATH", "").split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(dict.fromkeys([*filter(None, there), *ADMINISTRATORS]))
    os.environ["LC_ALL"] = "C.UTF-8"  # what tools say is read by programs
    for name in [name for name in os.environ if name.startswith("NUMBA_") and name not in OURS]:
        del os.environ[name]
    os.environ["NUMBA_CACHE_LOCATOR_CLASSES"] = "datastore.compiled.cache.ImportsLocator"
    if not os.environ.get("NUMBA_CACHE_DIR"):
        os.environ["NUMBA_CACHE_DIR"] = str(compiled_folder(root) / kind)


def compiled_folder(root: Path) -> Path:
    """Return where compiled functions lie: `.venv/compiled`, or a folder of the user's own where that cannot be written."""
    shared = root / ".venv" / "compiled"
    nearest = next(folder for folder in (shared, *shared.parents) if folder.exists())
    return shared if os.access(nearest, os.W_OK) else _own_folder()


def _own_folder() -> Path:
    """Return a folder that only this user writes, as code is loaded from it."""
    kept = os.environ.get("XDG_CACHE_HOME") or str(Path(os.environ.get("HOME") or "/nonexistent", ".cache"))
    for folder in (Path(kept, "nearstate"), Path(f"/tmp/nearstate-compiled-{os.geteuid()}")):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if not folder.is_symlink() and folder.stat().st_uid == os.geteuid():
            return folder
    raise SystemExit(f"error: compiled functions would lie in {folder}, which is another user's: remove it or set XDG_CACHE_HOME")


def start_anew() -> None:
    """Start this command again in UTF-8 mode, whatever the locale, and without READ_AT_START; return at once where that is so."""
    encodings = {sys.getfilesystemencoding(), *(stream.encoding for stream in (sys.stdout, sys.stderr) if stream)}
    right = sys.flags.utf8_mode or encodings == {"utf-8"}
    if os.environ.pop(ANEW, None) or (right and not any(name in os.environ for name in READ_AT_START)):
        return
    kept = {name: value for name, value in os.environ.items() if name not in READ_AT_START}
    os.execve(sys.executable, sys.orig_argv, {**kept, "PYTHONUTF8": "1", ANEW: "1"})
