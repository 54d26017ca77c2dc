"""What does a process hold to prove its role and name?

A deployment has one secret of 256 bits. Every key is derived from it by HMAC-SHA256 over a label and names (RFC 2104; the
expansion of RFC 5869 with one block), so that no key serves two purposes:

    secret --"credential", role, name, number--> key of one speaker        all that a network function's process is given
           --"datagram", sender--------------->  key of a store's datagrams
           --"table"-------------------------->  hash secrets of the replicated tables
           --"cluster"------------------------>  the cluster's number

Stores and the coordinator hold the secret, since they must know everybody's key. A process gets what it holds in a file without
a name (memfd_create(2)), by its descriptor: never in arguments, environment or a configuration, which are logged.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from datastore.base.errors import NearstateError

KEY_BYTES = 32
CLIENT, STORE, ADMINISTRATOR, COORDINATOR = range(1, 5)
ROLES = {CLIENT: "client", STORE: "store", ADMINISTRATOR: "administrator", COORDINATOR: "coordinator"}
NAME_BYTES = 64
"""Longest name of a speaker or listener, in UTF-8."""
HOUSEKEEPING = 1 << 31
"""A client has two numbers, its own and the one with this bit, for its housekeeping; one key proves both."""


@dataclass(frozen=True)
class Credential:
    """What a speaker proves to be: `number` is a client's id, 0 of others."""

    role: int
    name: str
    number: int
    key: bytes = field(repr=False)

    @classmethod
    def received(cls, descriptor: int, role: int, name: str, number: int = 0) -> Credential:
        """Return the credential whose key is in the file behind a descriptor."""
        return cls(role, name, number, _received(descriptor))

    def for_housekeeping(self) -> Credential:
        """Return the same client's credential for a connection beside its own."""
        return Credential(self.role, self.name, self.number | HOUSEKEEPING, self.key)


class Secret:
    """256 bits that the processes of a deployment share."""

    def __init__(self, key: bytes) -> None:
        """Raises NearstateError for a key of another length."""
        if len(key) != KEY_BYTES:
            raise NearstateError(f"secret of {len(key)} bytes: it has {KEY_BYTES}")
        self._key = key

    @classmethod
    def fresh(cls) -> Secret:
        """Return a new one."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def received(cls, descriptor: int) -> Secret:
        """Return the secret in the file behind a descriptor, at its beginning. The descriptor stays open."""
        return cls(_received(descriptor))

    @classmethod
    def read(cls, path: Path) -> Secret:
        """Read a file that `write` made. Raises NearstateError when it cannot be read, is none, or others may read it."""
        try:
            with path.open("rb") as file:
                mode, text = os.fstat(file.fileno()).st_mode, file.read(2 * KEY_BYTES + 2)
        except OSError as error:
            raise NearstateError(f"secret {path} cannot be read: {error.strerror}; name the deployment's file") from None
        if stat.S_IMODE(mode) & 0o077:
            raise NearstateError(f"secret {path} has mode {stat.S_IMODE(mode):04o}, so others may read it: chmod 600 {path}")
        try:
            return cls(bytes.fromhex(text.decode("ascii")))
        except (ValueError, NearstateError):
            raise NearstateError(f"{path} is no secret: a file of {2 * KEY_BYTES} hexadecimal digits is") from None

    def write(self, path: Path) -> None:
        """Make a file of mode 0600 with the secret. Raises NearstateError when that is impossible, or there is one."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NearstateError(f"secret cannot be written to {path}: {error.strerror}; choose a new file") from None
        with os.fdopen(descriptor, "w") as file:
            file.write(self._key.hex() + "\n")

    def derive(self, label: str, *names: str) -> bytes:
        """Return the key for a purpose. Labels and names go in with their lengths, so that no two lists read alike."""
        parts = [part.encode() for part in (label, *names)]
        return hmac.digest(self._key, b"".join(len(part).to_bytes(2, "big") + part for part in parts), "sha256")

    def credential(self, role: int, name: str, number: int = 0) -> Credential:
        """Return the proof of a speaker's role, name and number. Raises NearstateError for a name that is too long."""
        if len(name.encode()) > NAME_BYTES:
            raise NearstateError(f"name {name!r} has {len(name.encode())} bytes: at most {NAME_BYTES} are possible")
        key = self.derive("credential", ROLES[role], name, str(number & ~HOUSEKEEPING))
        return Credential(role, name, number, key)

    def administrator(self) -> Credential:
        """Return the credential of the deployment's owner."""
        return self.credential(ADMINISTRATOR, "")

    @property
    def cluster(self) -> int:
        """The cluster's number, 1 to 2^31: as random as the secret, and known to nobody without it."""
        return int.from_bytes(self.derive("cluster"), "big") % (1 << 31) + 1

    @property
    def table_secret(self) -> int:
        """What the hash secrets of the replicated tables are made of."""
        return int.from_bytes(self.derive("table"), "big")

    @property
    def key(self) -> bytes:
        """The secret itself, for `key_file`."""
        return self._key


def key_file(key: bytes) -> int:
    """Return a descriptor, not inherited, of a file without a name that holds a key."""
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    os.write(descriptor, key)
    return descriptor


def forget_key(descriptor: int) -> None:
    """Close the descriptor of a key that was read."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _received(descriptor: int) -> bytes:
    try:
        key = os.pread(descriptor, KEY_BYTES + 1, 0)
    except OSError as error:
        raise NearstateError(f"no key behind descriptor {descriptor}: {error.strerror}") from None
    if len(key) != KEY_BYTES:
        raise NearstateError(f"key of {len(key)} bytes behind descriptor {descriptor}: it has {KEY_BYTES}")
    return key
