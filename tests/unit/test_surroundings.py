"""Does the same run from any shell: su's PATH, a user without root, other locales, a copied checkout, Numba's own variables?"""

from __future__ import annotations

import http.server
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from numba.core.caching import IndexDataCacheFile

from datastore.base import ROOT, surroundings
from datastore.compiled.cache import ImportsLocator
from experiments.workloads import real_clients

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
NOBODY = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root, in a bare environment."""
    bare = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"} | environment
    return subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)


def experiments(
    *arguments: str, by: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run(*by, sys.executable, "-m", "experiments", *arguments, **(environment or {}))


@as_root
def test_a_user_without_root_can_look_and_is_told_that_a_run_needs_root() -> None:
    """Compiled functions cannot be kept beside root's: they are kept in a folder of the user's own."""
    looked = experiments("list", by=NOBODY)
    assert (looked.returncode, looked.stderr) == (0, "")
    assert "packet_latency" in looked.stdout
    asked = experiments("run", "packet_latency", by=NOBODY)
    assert asked.returncode == 1
    assert asked.stderr.startswith("error: experiments need root, for network namespaces and the switch (this is user id 65534)")
    assert asked.stderr.count("\n") == 1
    stores = run(*NOBODY, sys.executable, "-m", "datastore", "list")
    assert (stores.returncode, stores.stderr) == (0, "")


@as_root
def test_tools_are_found_without_the_folders_of_administrators_on_the_path() -> None:
    script = "import shutil; from experiments.harness import doctor; print(shutil.which('ip'), shutil.which('nft'))"
    there = run(sys.executable, "-c", script, PATH="/usr/bin")
    assert "None" not in there.stdout
    first = run(sys.executable, "-c", "import datastore.compiled, os; print(os.environ['PATH'])", PATH="/mine:/usr/bin")
    assert first.stdout.startswith("/mine:/usr/bin:/usr/local/sbin:")


def test_the_callers_settings_do_not_reach_what_is_said() -> None:
    plain = experiments("list")
    assert (plain.returncode, plain.stderr) == (0, "")
    for environment in (
        {
            "LC_ALL": "de_DE.ISO-8859-1",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONWARNINGS": "error",
            "NUMBA_OPT": "0",
            "NUMBA_DUMP_IR": "1",
        },
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONOPTIMIZE": "2", "COLUMNS": "1", "TZ": "nowhere", "PAGER": "false"},
    ):
        said = experiments("list", environment=environment)
        assert (said.returncode, said.stderr, said.stdout) == (0, "", plain.stdout)


def test_text_is_utf_8_and_tools_speak_english_in_any_locale() -> None:
    script = "import os, sys; sys.argv = ['x', 'list']; from datastore.base.surroundings import start_anew; start_anew(); " \
             "import datastore.compiled; print('µs', os.environ['LC_ALL'], os.environ.get('PYTHONWARNINGS'))"  # fmt: skip
    for environment in ({"LC_ALL": "de_DE.ISO-8859-1", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}):
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False,
                              env={"PATH": "/usr/bin:/bin", "PYTHONWARNINGS": "error", **environment})  # fmt: skip
        assert (done.stderr, done.stdout) == (b"", "µs C.UTF-8 None\n".encode())


def test_a_copied_checkout_finds_what_was_compiled(tmp_path: Path) -> None:
    """The folder of a source's compiled functions hangs on its place in the checkout, not on where that lies."""
    for name in ("datastore", "nfs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = "from datastore.compiled.cache import ImportsLocator, stamp, ROOT; path = ROOT / 'datastore/store/table.py'; " \
             "print(ROOT, ImportsLocator.get_suitable_cache_subpath(str(path)), stamp(path))"  # fmt: skip
    told = [subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True).stdout.split()
            for folder in (ROOT, tmp_path)]  # fmt: skip
    assert [Path(each[0]) for each in told] == [ROOT, tmp_path]
    assert told[0][1:] == told[1][1:]
    sources = (ROOT / "nfs/nat.py", ROOT / "nfs/dataplane/keys.py", ROOT / "datastore/store/table.py")
    elsewhere = (tmp_path / "one/x.py", tmp_path / "two/x.py")
    apart = {ImportsLocator.get_suitable_cache_subpath(str(path)) for path in (*sources, *elsewhere)}
    assert len(apart) == 5


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed: apt-get install curl")
def test_real_clients_ask_the_server_and_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the caller's is not to be reached from an emulated host."""
    (tmp_path / ".curlrc").write_text('proxy = "http://127.0.0.1:9"\n')
    for name, value in {"HOME": str(tmp_path), "http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = real_clients.connect(f"127.0.0.1:{server.server_port}", "README.md", 2)
        server.shutdown()
    assert answer["connections"] == 2


def test_a_cache_that_is_another_users_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert surroundings.compiled_folder(tmp_path) == tmp_path / "nearstate"
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    with pytest.raises(SystemExit, match=r"would lie in /tmp/nearstate-compiled-4000000, which is another user's"):
        surroundings.compiled_folder(tmp_path)
    Path("/tmp/nearstate-compiled-4000000").rmdir()


def test_what_was_compiled_for_modules_that_are_gone_is_compiled_anew(tmp_path: Path) -> None:
    file = IndexDataCacheFile(str(tmp_path), "index", "stamp")
    file._save_index({"signature": "data"})
    assert file._load_index() == {"signature": "data"}
    version = pickle.dumps(file._version)
    for data in (b"cdatastore.gone\nThing\n.", b"cdatastore.compiled\nGone\n.", b"", b"no pickle"):
        Path(file._index_path).write_bytes(version + data)
        assert file._load_index() == {}, data
