"""Imported by the launcher of `tests/cluster.py` before its first fork: stores and coordinators inherit what is compiled."""

from datastore.coordination import process as coordination  # noqa: F401
from datastore.process import server

server.warm()
