"""How can a state access end? One number each, the same in the table, on the wire and in the counters."""

from __future__ import annotations

OK = 0
ABSENT = 1
VERSION_MISMATCH = 2
EXISTS = 3
TABLE_FULL = 4
OVERSIZED = 5
UNKNOWN_PARTITION = 6
NOT_PRIMARY = 7
STALE_EPOCH = 8
BAD_FRAME = 9
BAD_OPERATION = 10
STALE_SEQUENCE = 11
WRONG_CLUSTER = 12
TOO_MANY_CLIENTS = 13
BUSY = 14
ALREADY_OPEN = 15
LEASE_LAPSED = 16
WRONG_CLIENT = 17

STATUSES = 18

NAMES = (
    "ok", "absent", "version_mismatch", "exists", "table_full", "oversized", "unknown_partition", "not_primary",
    "stale_epoch", "bad_frame", "bad_operation", "stale_sequence", "wrong_cluster", "too_many_clients", "busy",
    "already_open", "lease_lapsed", "wrong_client",
)  # fmt: skip

_MESSAGES = (
    "done",
    "no record has this key",
    "the record has another version by now; the answer holds the current one",
    "a record with this key exists; the answer holds it",
    "the key's partition has no free slot: create the table with a larger capacity, or let records expire sooner",
    "the value is larger than the table's values: declare a smaller record or create the table with a larger value size",
    "the key names a partition the table does not have",
    "this store is not the primary of the key's partition: ask the host the partition map names",
    "the request was made under another epoch of the partition map than the store's: fetch the newer map",
    "the frame does not parse; the connection is closed",
    "no such operation, or its fields are out of range (offsets and sizes are multiples of 8 inside the value)",
    "the sequence number is older than the client's window: the operation was answered long ago",
    "the client belongs to another cluster than this store: check which store the address names",
    "the store has no room for one more client: stop one, or wait until an unused one is dropped",
    "the partition's lock is held by a living process that does not go on (stopped or starved)",
    "this owner already holds the partition's lock: commit or abort the open record first",
    "this store's lease ran out, so another host may be primary by now: it waits for the coordinator, ask again",
    "the client id is not the one that this connection has proven to have: use the credential's number",
)


def status_message(status: int) -> str:
    """Return one line for people: the status' name, what it means and what to do."""
    if not 0 <= status < STATUSES:
        return f"unknown status {status}"
    return f"{NAMES[status]}: {_MESSAGES[status]}"
