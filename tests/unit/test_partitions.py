"""Partitions: the same for both directions, the header bits the switches match, and maps that are refused when wrong."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS, PORT_MASK
from datastore.compiled import jit
from datastore.store.partitions import FlowKey, PartitionMap, flow_partition, hashed_partition, key_high, key_low

ports = st.integers(0, 65535)
addresses = st.integers(0, 2**32 - 1)


@jit
def words_of_key(client: int, server: int, client_port: int, server_port: int, protocol: int, partition: int):
    return key_low(client_port, server_port, protocol, 3, partition), key_high(client, server)


@given(addresses, ports)
def test_partition_is_the_masked_port_bits(address, port):
    assert flow_partition(address, port, True) == (port & PORT_MASK) >> 1
    assert flow_partition(address, port, False) == address & 0xFF


def test_even_ports_use_every_partition_alike():
    counts = Counter(flow_partition(0x0A000001, port, True) for port in range(32768, 60999, 2))
    assert len(counts) == PARTITIONS
    assert max(counts.values()) - min(counts.values()) <= 1


def test_keys_that_are_no_flows_spread_evenly_and_ignore_their_partition_bits():
    counts = Counter(hashed_partition(np.uint64(7), np.uint64(n << 16)) for n in range(25600))
    assert len(counts) == PARTITIONS
    assert max(counts.values()) < 160  # mean 100, standard deviation 10
    assert hashed_partition(np.uint64(7), np.uint64(0x10000)) == hashed_partition(np.uint64(7), np.uint64(0x1ABCD))


@given(addresses, addresses, ports, ports, st.integers(0, 255), st.integers(0, PARTITIONS - 1))
def test_a_key_is_its_five_tuple(client, server, client_port, server_port, protocol, partition):
    low, high = words_of_key(client, server, client_port, server_port, protocol, partition)
    key = FlowKey.of_words(low, high)
    assert (int(key.client), int(key.server), key.client_port, key.server_port) == (client, server, client_port, server_port)
    assert (key.protocol, key.kind, key.partition) == (protocol, 3, partition)


def test_a_key_reads_like_a_flow():
    low, high = words_of_key(0x0A000001, 0x0A000102, 40000, 443, 6, 0)
    assert str(FlowKey.of_words(low, high)) == "tcp 10.0.0.1:40000 -> 10.0.1.2:443"


def test_a_map_survives_json_and_names_its_primaries():
    placement = PartitionMap(3, tuple(("a", "b") if n % 2 else ("b",) for n in range(PARTITIONS)))
    assert PartitionMap.from_json(json.dumps(placement.to_json())) == placement
    assert PartitionMap.from_json(placement.to_json()) == placement
    primaries = placement.primaries(["a", "b"])
    assert primaries.dtype == np.int32
    assert list(primaries[:4]) == [1, 0, 1, 0]
    assert placement.kept_by("a") == list(range(1, PARTITIONS, 2))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"epoch": 0, "replicas": [["a"]] * 256}, "epoch 0"),
        ({"epoch": 1, "replicas": [["a"]] * 255}, "255 partitions"),
        ({"epoch": 1, "replicas": [["a"]] * 255 + [[]]}, "partition 255 is kept by \\[\\]"),
        ({"epoch": 1, "replicas": [["a", "a"]] + [["a"]] * 255}, "partition 0 .* each once"),
        ({"replicas": []}, "epoch"),
        ("nonsense", "not a partition map"),
        (None, "not a partition map"),
    ],
)
def test_a_wrong_map_is_refused(document, message):
    with pytest.raises(NearstateError, match=message):
        PartitionMap.from_json(document)


def test_an_unknown_primary_is_refused_by_name():
    with pytest.raises(NearstateError, match=r"unknown store host 'nf3'.*nf1"):
        PartitionMap(1, (("nf3",),) * PARTITIONS).primaries(["nf1", "nf2"])
