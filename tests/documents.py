"""The examples of the documents, as printed."""

from __future__ import annotations

import re

from datastore.base import ROOT

README_FILES = (
    "nfs/syn_counter.py",
    "datastore/placements/halves.py",
    "topologies/far_store.py",
    "experiments/counter_cost.py",
    "analysis/figures/counter_cost.py",
)


def example(path: str, document: str = "README.md") -> str:
    """Return the first block of Python after the place where a document names the file `path`."""
    block = re.search(rf"`{re.escape(path)}`.*?```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert block, f"{document} has no example {path}"
    return block[1]
