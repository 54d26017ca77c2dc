"""What is a host to a partition, and how far has the partition changed? Words of the table, read by everybody who maps it."""

from __future__ import annotations

from typing import Any

import numpy as np

from datastore.compiled import inline
from datastore.store.layout import CHANGES_AT, COMMITTED_AT, PRIMARY, RETIRING, ROLE, ROLE_BITS, ROLE_MASK, partition_at, word


@inline
def changes(words: np.ndarray, partition: int) -> Any:
    """Return how often a partition has changed."""
    return word(words, word(words, CHANGES_AT) + partition)


@inline
def committed(words: np.ndarray, partition: int) -> Any:
    """Return how many of a partition's changes every counted peer has."""
    return word(words, word(words, COMMITTED_AT) + partition)


@inline
def reign(words: np.ndarray, partition: int) -> Any:
    """Return since which epoch the partition's primary is primary, as far as this host knows."""
    return word(words, partition_at(words, partition) + ROLE) >> ROLE_BITS


@inline
def role(words: np.ndarray, partition: int) -> Any:
    """Return what this host is to a partition."""
    return word(words, partition_at(words, partition) + ROLE) & ROLE_MASK


@inline
def rules(role: int) -> Any:
    """Tell whether a role ships: a retiring primary does until all it has changed is committed."""
    return role in (PRIMARY, RETIRING)
