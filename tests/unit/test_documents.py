"""Do the examples of the documents do what the text says? They are taken from the text, not copied."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.base import ROOT
from nfs.dataplane import FORWARD, NetworkFunction
from tests.packets import Instance, tcp, udp
from tests.rig import Rig

LONGEST_EXAMPLE_LINES = 40


def example(document: str, path: str) -> str:
    """Return the Python block that follows the words `path` in a document."""
    text = (ROOT / document).read_text()
    found = re.search(rf"`{re.escape(path)}`.*?```python\n(.*?)```", text, re.S)
    assert found, f"{document} has no example {path}"
    return found[1]


@pytest.fixture
def syn_counter(tmp_path: Path) -> Iterator[NetworkFunction]:
    """The README's network function, from a file as a user would have it."""
    source = example("README.md", "nfs/syn_counter.py")
    assert source.count("\n") <= LONGEST_EXAMPLE_LINES
    path = tmp_path / "syn_counter.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("nfs.syn_counter", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nfs.syn_counter"] = module
    spec.loader.exec_module(module)
    yield module.syn_counter
    del sys.modules["nfs.syn_counter"]


@pytest.mark.python_mode
def test_the_readmes_network_function_counts_what_it_says(syn_counter: NetworkFunction) -> None:
    instance = Instance(syn_counter, syn_counter.make_env())
    for flags in ("S", "A", "S", "PA"):
        assert instance(tcp(flags)) == FORWARD
    assert instance.record()["count"] == 2
    assert instance.idle_timeout_s == 0, "the last packet was no SYN"


def test_the_readmes_network_function_runs_in_the_packet_loop(syn_counter: NetworkFunction) -> None:
    rig = Rig([syn_counter])
    frames = [tcp("S", client_port=40000 + 2 * n) for n in range(5)] + [udp()]
    assert [frame for _, frame in rig.burst(frames)] == frames
    assert [int(words[0]) for words in rig.records().values()] == [5]
