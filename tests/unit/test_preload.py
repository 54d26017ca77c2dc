"""Does a launcher that had to compile start anew, so that what it forks does not inherit the compiler's memory?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from datastore.base import ROOT

LAUNCHER = """
import os
from datastore.compiled import jit
from experiments.harness import warm

@jit
def double(number):
    return 2 * number

print("started", os.getpid(), flush=True)
warm.steps = lambda: [("mine", lambda: double(21))]
import experiments.harness.preload
print("loaded", double.stats.cache_hits and "from the cache", os.environ.get("NEARSTATE_PRELOADED"), flush=True)
"""


def test_a_launcher_that_compiled_starts_anew_once_and_loads(tmp_path: Path) -> None:
    script = tmp_path / "launcher.py"
    script.write_text(LAUNCHER)
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_DISABLE_JIT"}
    environment |= {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def said() -> list[str]:
        return subprocess.run(
            [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    first, again, loaded = said()
    assert first == again, "it is the same process: the same control socket, the same parent"
    assert first.startswith("started ")
    assert loaded == "loaded from the cache None"
    assert len(said()) == 2
