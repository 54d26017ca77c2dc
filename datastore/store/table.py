"""The table of a host: made, joined and looked at by its processes, in shared memory (`records.py` has single records)."""

from __future__ import annotations

import contextlib
import errno as error_numbers
import hashlib
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datastore.base.errors import NearstateError
from datastore.base.partitioning import PARTITIONS
from datastore.compiled.pages import private_memory
from datastore.store import lives, locking
from datastore.store.bells import Bell
from datastore.store.inspection import FAULTS, Record, check_partition, copy_bucket
from datastore.store.layout import (
    ADDRESS,
    BUCKET_WORDS,
    BUCKETS,
    BUCKETS_OFFSET,
    CAPACITY,
    CHANGES_AT,
    CLIENT_HEADER_WORDS,
    CLIENT_STRIDE,
    CLIENTS,
    CLIENTS_AT,
    CLUSTER,
    COMMITTED_ALWAYS,
    COMMITTED_AT,
    COUNT,
    COUNTERS,
    DIRTY_OFFSET,
    DONE_VALUE,
    ENDED_AT,
    EPOCH,
    EXPIRY_BITS,
    EXPIRY_MASK,
    FIRST,
    FUNCTION,
    FUNCTION_LIFE,
    HASH_SECRETS,
    HEADER_WORDS,
    INCARNATION,
    LAYOUT,
    LAYOUT_VERSION,
    LEASE_LIFE,
    LEASE_NS,
    LONGEST_LIFE_S,
    MAGIC,
    MAGIC_NUMBER,
    NO_ROLE,
    OWNER_PIDS,
    PARTITION_COUNT,
    PORT,
    PRIMARY,
    PROMISE_NS,
    ROLE,
    ROLE_MASK,
    SECRETS,
    SERVER_LIFE,
    SLOT_WORDS,
    SLOTS,
    STAMP,
    STATUS_COUNTS,
    STRIDE,
    TOTAL_WORDS,
    UNDO_COPY,
    VALUE,
    VALUE_WORDS,
    WINDOW,
)
from datastore.store.locking import role_word
from datastore.store.statuses import NAMES, OK, STATUSES, status_message

LARGEST_VALUE_BYTES = 1024
CLIENT_SLOTS = 64
"""Remote clients whose answers a table remembers, so that none of their operations is done twice."""
SHARED_MEMORY = Path("/dev/shm")


def _hash_secrets(seed: int | None) -> np.ndarray:
    """Return uint64[HASH_SECRETS]: drawn by chance, or made of a cluster's number of up to 256 bits (SHAKE256, FIPS 202)."""
    size = 8 * HASH_SECRETS
    drawn = secrets.token_bytes(size) if seed is None else hashlib.shake_256(seed.to_bytes(32, "big")).digest(size)
    return np.frombuffer(drawn, np.uint64)


class Table:
    """A hash table in shared memory: made by `create` or `private`, joined by `attach`.

    words: uint64[n], what the compiled functions take. It stays valid after `close` for whoever still holds it.
    """

    def __init__(self, name: str, descriptor: int, memory: mmap.mmap) -> None:
        """descriptor: of the file whose bytes the owners lock; `memory` is that file too, unless the table is private."""
        self.name = name
        self._descriptor = descriptor
        self._owners: list[int] = []
        self._memory = memory
        self.words: np.ndarray = np.frombuffer(memory, np.uint64)

    @classmethod
    def create(
        cls, name: str, capacity: int, value_bytes: int, partitions: int = PARTITIONS, epoch: int = 1, cluster: int = 0,
        clients: int = CLIENT_SLOTS, window: int = 1024, replication_secret: int | None = None,
    ) -> Table:  # fmt: skip
        """Make /dev/shm/`name` for `capacity` records, this host being primary of nothing yet (`set_role`).

        The memory is reserved at once, so a full /dev/shm is an error here and never a crash later. clients, window: how
        many remote clients the completion records serve, and how many operations of each. replication_secret: the same number
        of up to 256 bits on all hosts of a cluster whose tables replicate; None: this one does not.
        """
        path = _path(name)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise NearstateError(f"table {name!r} exists already: attach to it, or remove {path}") from None
        try:
            reserve = partial(_reserved, descriptor)
            return cls._fill(
                name, descriptor, reserve, capacity, value_bytes, partitions, epoch, cluster, clients, window, replication_secret
            )
        except BaseException:
            os.close(descriptor)
            path.unlink()
            raise

    @classmethod
    def private(cls, capacity: int, value_bytes: int, partitions: int = PARTITIONS, epoch: int = 1) -> Table:
        """Make a table that ends with this process, which is primary of every partition (placement `local`)."""
        descriptor = os.memfd_create("nearstate-private")
        table = cls._fill("(private)", descriptor, private_memory, capacity, value_bytes, partitions, epoch, 0, 0, 1)
        for partition in range(partitions):
            table.set_role(partition, True, epoch)
        return table

    @classmethod
    def anonymous(cls, name: str, *sizes: int, **options: Any) -> Table:
        """Make a table as `create` does, of the same arguments, that has no file and ends with this process."""
        descriptor = os.memfd_create(name)
        return cls._fill(name, descriptor, partial(_reserved, descriptor), *sizes, **options)

    @classmethod
    def attach(cls, name: str) -> Table:
        """Join the table that another process made; raises NearstateError when there is none or it is none."""
        path = _path(name)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NearstateError(f"no table {name!r} here: `python -m datastore list` shows those that are") from None
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes >= HEADER_WORDS * 8:
            table = cls(name, descriptor, mmap.mmap(descriptor, size_bytes))
            header = [int(table.words[at]) for at in (MAGIC, LAYOUT, TOTAL_WORDS)]
            if header == [MAGIC_NUMBER, LAYOUT_VERSION, size_bytes // 8]:
                return table
        os.close(descriptor)
        raise NearstateError(f"{path} is no table of layout {LAYOUT_VERSION}: it was made by another version, or by others")

    @classmethod
    def _fill(
        cls, name: str, descriptor: int, reserve: Callable[[int], mmap.mmap], capacity: int, value_bytes: int,
        partitions: int = PARTITIONS, epoch: int = 1, cluster: int = 0, clients: int = CLIENT_SLOTS, window: int = 1024,
        replication_secret: int | None = None,
    ) -> Table:  # fmt: skip
        layout = _layout(capacity, value_bytes, partitions, clients, window, replication_secret is not None)
        size_bytes = layout[TOTAL_WORDS] * 8
        try:
            if size_bytes > _available_bytes():  # memory beyond that would be taken from processes that have it
                raise OSError(error_numbers.ENOMEM, "not enough memory")
            memory = reserve(size_bytes)
        except OSError as error:
            if error.errno not in (error_numbers.ENOSPC, error_numbers.ENOMEM):
                raise
            raise NearstateError(
                f"table {name!r} of {capacity} records needs {size_bytes / 1e6:.0f} MB of shared memory, which is not free: "
                "lower the capacity, or free memory or /dev/shm"
            ) from None
        table = cls(name, descriptor, memory)
        words = table.words
        for at, content in layout.items():
            words[at] = content
        words[SECRETS : SECRETS + HASH_SECRETS] = _hash_secrets(replication_secret)
        words[EPOCH], words[CLUSTER], words[LAYOUT] = epoch, cluster, LAYOUT_VERSION
        for partition in range(partitions):
            words[_base(words, partition) + ROLE] = role_word(epoch, NO_ROLE)
        if replication_secret is not None:
            words[layout[COMMITTED_AT] : layout[COMMITTED_AT] + partitions] = COMMITTED_ALWAYS
        words[MAGIC] = MAGIC_NUMBER  # last: whoever attaches earlier is told that this is no table
        return table

    def register_owner(self) -> int:
        """Make this process one that may lock partitions; returns the `owner` that compiled functions take.

        Once per process (or thread) that works on records. Number and locks are given back by `close`, or by the kernel when
        the process ends in whatever way. Raises NearstateError when all numbers are taken.
        """
        owner = locking.register(self.words, f"/proc/self/fd/{self._descriptor}")
        self._owners.append(owner)
        return owner

    def bell(self, owner: int) -> Bell:
        """Return the bell of an owner (from `register_owner`), or of the store process (STORE)."""
        return Bell(self.words, self._descriptor, owner)

    def claim_server(self) -> None:
        """Make this process the table's one store process; raises NearstateError when another one lives."""
        descriptor = locking.claim(f"/proc/self/fd/{self._descriptor}", 0)
        if descriptor is None:
            raise NearstateError(
                f"table {self.name!r} is served already by process {int(self.words[OWNER_PIDS])}: stop that one first"
            )
        self._owners.append(descriptor << 16)
        self.words[OWNER_PIDS] = os.getpid()
        self._live(SERVER_LIFE)

    def leave_server(self) -> None:
        """Be the table's store process no longer, as when that ends: for the simulator, whose processes are all this one."""
        claims = [owner for owner in self._owners if not owner & 0xFFFF]
        for claim in claims:
            self._owners.remove(claim)
            os.close(claim >> 16)
            for at in (SERVER_LIFE, LEASE_LIFE):
                lives.leave(self.words, at)

    def renews_lease(self) -> None:
        """Say that the calling thread renews the host's lease: that is not over before it has ended, too."""
        self._live(LEASE_LIFE)

    def begin_function(self, number: int) -> None:
        """Say that the calling thread works on this table as NF process `number`; a second one there is not watched."""
        if not lives.is_held(self.words, FUNCTION_LIFE):
            self._live(FUNCTION_LIFE)
            self.words[FUNCTION] = number

    def _live(self, at: int) -> None:
        with contextlib.suppress(OSError):  # then nobody can watch it, and its connection or the lease says that it is gone
            lives.hold(self.words, at)

    def function(self) -> int:
        """Return the number of the NF process that works on this table, or did last; 0: none."""
        return int(self.words[FUNCTION])

    def watch_server(self) -> int | None:
        """Return a descriptor that is readable once the table's store process has ended; None if it has, or cannot be watched.

        By then it changes nothing any more, and renews no lease. Raises OSError where it cannot be watched.
        """
        return lives.watch(self.words, (SERVER_LIFE, LEASE_LIFE))

    def watch_function(self) -> tuple[int, int] | None:
        """Return the number of the NF process on this table, and a descriptor that is readable once it has ended.

        None if there is none. Raises OSError where it cannot be watched.
        """
        number = self.function()
        descriptor = lives.watch(self.words, (FUNCTION_LIFE,))
        return None if descriptor is None else (number, descriptor)

    def end_lease(self) -> int | None:
        """Have nobody on this host answer any more, and return which store process (its incarnation) has ended.

        None: it has not, or nobody knows, and nothing is changed.
        """
        threads = (SERVER_LIFE, LEASE_LIFE)
        if not all(self.words[at] for at in threads) or any(lives.is_held(self.words, at) for at in threads):
            return None
        self.words[LEASE_NS] = self.words[PROMISE_NS] = 1
        return int(self.words[INCARNATION])

    def set_role(self, partition: int, role: int, epoch: int) -> None:
        """Say what this host is to the partition (NO_ROLE, PRIMARY, BACKUP), and since which epoch its primary is that.

        An open record of it is finished first.
        """
        owner = self._owner()
        status = locking.set_role(self.words, owner, partition, role, epoch)
        if status != OK:
            raise NearstateError(f"partition {partition} of table {self.name!r}: {NAMES[status]}, its role is unchanged")
        self.words[EPOCH] = max(int(self.words[EPOCH]), epoch)

    def _owner(self) -> int:
        return next((owner for owner in self._owners if owner & 0xFFFF), 0) or self.register_owner()

    @property
    def value_bytes(self) -> int:
        return int(self.words[VALUE_WORDS]) * 8

    @property
    def partitions(self) -> int:
        return int(self.words[PARTITION_COUNT])

    def count(self) -> int:
        """Return the number of records, expired ones that are not swept yet included."""
        first, stride = int(self.words[FIRST]), int(self.words[STRIDE])
        return int(self.words[first + COUNT : first + self.partitions * stride : stride].sum())

    def statistics(self) -> dict[str, Any]:
        """Return sizes, fill, counters and living owners (number: pid) as a JSON object; reads only. server_pid 0: none."""
        words = self.words
        records, slots = self.count(), self.partitions * int(words[BUCKETS]) * SLOTS
        owners = locking.living_owners(words, f"/proc/self/fd/{self._descriptor}")
        primary = [p for p in range(self.partitions) if int(words[_base(words, p) + ROLE]) & ROLE_MASK == PRIMARY]
        return {
            "name": self.name,
            "records": records,
            "capacity": int(words[CAPACITY]),
            "fill_ratio": records / slots,
            "value_bytes": self.value_bytes,
            "table_bytes": int(words[CLIENTS_AT]) * 8,
            "completion_bytes": (int(words[TOTAL_WORDS]) - int(words[CLIENTS_AT])) * 8,
            "partitions": self.partitions,
            "primary_partitions": len(primary),
            "epoch": int(words[EPOCH]),
            "cluster": int(words[CLUSTER]),
            "server_pid": owners.pop(0, 0),
            "address": ".".join(str(int(words[ADDRESS]) >> shift & 0xFF) for shift in (24, 16, 8, 0)),
            "port": int(words[PORT]),
            "owners": owners,
            "statuses": {NAMES[n]: int(words[STATUS_COUNTS + n]) for n in range(1, STATUSES)},
            "counters": {name: int(words[at]) for name, at in COUNTERS.items()},
        }

    def records(self, partition: int | None = None) -> Iterator[Record]:
        """Yield the records of one partition, or of all, each whole; nobody who works on them waits for this.

        Buckets are copied without the lock and again if someone was at work; only if that goes wrong for a while, or if a
        dead owner left the lock, is the lock taken for one bucket.
        """
        if partition is not None and not 0 <= partition < self.partitions:
            raise NearstateError(f"partition {partition} of table {self.name!r}: it has 0 to {self.partitions - 1}")
        copies = np.zeros((SLOTS, int(self.words[SLOT_WORDS])), np.uint64)
        for chosen in range(self.partitions) if partition is None else (partition,):
            base = _base(self.words, chosen)
            if self.words[base + COUNT] == 0:
                continue
            for bucket in range(int(self.words[BUCKETS])):
                for n in range(self._copy(base, bucket, copies)):
                    yield _record(copies[n])

    def _copy(self, base: int, bucket: int, copies: np.ndarray) -> int:
        for _ in range(100):
            count = int(copy_bucket(self.words, base, bucket, copies, False))
            if count >= 0:
                return count
            time.sleep(0.0001)
        status = locking.lock_now(self.words, self._owner(), base)
        if status != OK:
            raise NearstateError(f"records of table {self.name!r}: {status_message(status)}")
        count = int(copy_bucket(self.words, base, bucket, copies, True))
        locking.release_now(self.words, base)
        return count

    def verify(self) -> None:
        """Check a table at rest completely; raises NearstateError with the first fault and its partition."""
        for partition in range(self.partitions):
            fault = check_partition(self.words, partition, np.zeros(int(self.words[BUCKETS]), np.int64))
            if fault:
                raise NearstateError(f"table {self.name!r}, partition {partition}: {FAULTS[fault]}")

    def close(self) -> None:
        """Give back owner numbers and descriptor; the memory is unmapped when its last array is gone."""
        for owner in self._owners:
            os.close(owner >> 16)
        self._owners.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def is_named(self) -> bool:
        """Tell whether the table's name still stands for it: not after a store process that began anew made another one."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), _path(self.name).stat())
        except OSError:
            return False

    def unlink(self) -> None:
        """Remove the table's name; processes that have it go on until they end."""
        _path(self.name).unlink(missing_ok=True)


def _reserved(descriptor: int, size_bytes: int) -> mmap.mmap:
    """Return a file's memory, all of it there. Raises OSError (ENOSPC) when there is not so much."""
    os.posix_fallocate(descriptor, 0, size_bytes)
    return mmap.mmap(descriptor, size_bytes)


def _available_bytes() -> int:
    """Return how much memory the kernel says can be used without swapping."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _path(name: str) -> Path:
    if not name or "/" in name or name.startswith("."):
        raise NearstateError(f"table name {name!r}: use letters, digits, '-' and '_' (it becomes a file in {SHARED_MEMORY})")
    return SHARED_MEMORY / name


def _base(words: np.ndarray, partition: int) -> int:
    return int(words[FIRST]) + partition * int(words[STRIDE])


def _record(slot: np.ndarray) -> Record:
    stamp, now_s = int(slot[STAMP]), int(time.monotonic())
    field = stamp & int(EXPIRY_MASK)
    ahead = (field - now_s) % (1 << EXPIRY_BITS)
    left = None if field == 0 else ahead if ahead <= LONGEST_LIFE_S else ahead - (1 << EXPIRY_BITS)
    return Record(int(slot[0]), int(slot[1]), stamp >> EXPIRY_BITS, left, slot[VALUE:].tobytes())


def check_layout(capacity: int, value_bytes: int) -> None:
    """Raise NearstateError where no table could be of that size."""
    _layout(capacity, value_bytes, PARTITIONS, CLIENT_SLOTS, 1, True)


def _layout(
    capacity: int, value_bytes: int, partitions: int, clients: int, window: int, replicates: bool
) -> dict[int, int]:  # fmt: skip
    """Return the header words that say where everything is."""
    if capacity < 1:
        raise NearstateError(f"table for {capacity} records: the capacity must be at least 1")
    if value_bytes % 8 or not 8 <= value_bytes <= LARGEST_VALUE_BYTES:
        raise NearstateError(f"values of {value_bytes} bytes: use a multiple of 8 from 8 to {LARGEST_VALUE_BYTES}")
    if not 1 <= partitions <= 1 << 16:
        raise NearstateError(f"table of {partitions} partitions: use 1 to 65536")
    if not 0 <= clients <= 1024 or not 1 <= window <= 65536:
        raise NearstateError(f"{clients} clients with a window of {window}: use up to 1024 clients and 1 to 65536 operations")
    value_words = value_bytes // 8
    slot_words = VALUE + value_words
    bucket_words = 1 + SLOTS * slot_words
    buckets = -(-capacity // (partitions * SLOTS))
    dirty_offset = _lines(UNDO_COPY + 1 + value_words)
    header_words = dirty_offset + (_lines(-(-buckets // 8)) if replicates else 0)
    stride = _lines(header_words + buckets * bucket_words)
    progress_words = _lines(partitions) if replicates else 0
    first = HEADER_WORDS + 3 * progress_words
    clients_at = first + partitions * stride
    client_stride = _lines(CLIENT_HEADER_WORDS + window * (DONE_VALUE + value_words))
    return {
        VALUE_WORDS: value_words, BUCKETS: buckets, PARTITION_COUNT: partitions, FIRST: first, STRIDE: stride,
        BUCKETS_OFFSET: header_words, SLOT_WORDS: slot_words, BUCKET_WORDS: bucket_words, CLIENTS: clients, WINDOW: window,
        CLIENTS_AT: clients_at, CLIENT_STRIDE: client_stride, TOTAL_WORDS: clients_at + clients * client_stride,
        CAPACITY: capacity, DIRTY_OFFSET: dirty_offset if replicates else 0, CHANGES_AT: HEADER_WORDS,
        COMMITTED_AT: HEADER_WORDS + progress_words, ENDED_AT: HEADER_WORDS + 2 * progress_words,
    }  # fmt: skip


def _lines(words: int) -> int:
    """Return `words` rounded up to whole cache lines."""
    return (words + 7) // 8 * 8
