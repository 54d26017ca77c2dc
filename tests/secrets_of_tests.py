"""The secret of the tests' deployments, and what processes that tests start by hand need of it."""

from __future__ import annotations

from typing import Any

from datastore.security.secret import CLIENT, Credential, Secret, key_file

SECRET = Secret(bytes(range(32)))


def secret_file() -> int:
    """Return a descriptor of the secret, as a store or coordinator gets it; a forked process may read it, too."""
    return key_file(SECRET.key)


def client(number: int, name: str = "test") -> Credential:
    """Return the credential of a client."""
    return SECRET.credential(CLIENT, name, number)


def key_of(target: str, config: dict[str, Any]) -> bytes:
    """Return the key that a process of this target gets from `Launcher.spawn`; nothing for those that reach nobody."""
    if target == "nfs.dataplane.process:main":
        return SECRET.credential(CLIENT, config["host"], config["client_id"]).key
    return SECRET.key if target in ("datastore.process.store:main", "datastore.coordination.process:main") else b""
