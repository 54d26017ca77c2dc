"""Where the state is that an engine on rings works with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from datastore.base.partitioning import PARTITIONS
from datastore.store.client import Client
from nfs.dataplane.engine import HERE
from tests.rig import VALUE_BYTES
from tests.secrets_of_tests import client as credential
from tests.unit.test_store_server import CLUSTER, Store


@pytest.fixture(params=["here", "there", "half"])
def where(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """All state in the private table; all in a store process; or half of the partitions each, so that claims cross over."""
    if request.param == "here":
        yield {}
        return
    store = Store(value_bytes=VALUE_BYTES)
    client = Client([("127.0.0.1", store.port)], 1, VALUE_BYTES, CLUSTER, credential=credential(1))
    client.connect()
    primary = np.zeros(PARTITIONS, np.int64)
    if request.param == "half":
        primary[::2] = HERE
    yield {"client": client, "primary": primary}
    client.close()
    store.close()
