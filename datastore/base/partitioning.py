"""How many partitions are there, and by which bits do switches and stores tell them apart?"""

PARTITIONS = 256
PORT_MASK = 0x1FE
"""The bits of the client's port, in TCP and UDP, that are a flow's partition (`datastore/store/partitions.py`).

Bit 0 is left out: Linux hands out even ports first.
"""
