"""Imported by the launcher of `tests/cluster.py` before its first fork: stores and coordinators inherit what is compiled."""

from datastore.replication import coordination  # noqa: F401
from datastore.store import server

server.warm()
