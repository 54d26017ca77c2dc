"""Memory of one process alone, in huge pages where the kernel gives them.

A packet touches its frame, its record and its partition's lock, each on a page of its own: with pages of 4 KiB most of these
accesses miss the translation buffer, and on a virtual machine a miss walks two page tables. Shared memory (files, also unnamed
ones) gets huge pages only where the administrator said so in /sys/kernel/mm/transparent_hugepage/shmem_enabled.
"""

from __future__ import annotations

import contextlib
import mmap

MADV_POPULATE_WRITE = 23
PAGE_BYTES = mmap.PAGESIZE


def private_memory(size_bytes: int) -> mmap.mmap:
    """Return `size_bytes` of zeros, page-aligned and all there: no later access waits for a page.

    A forked child does not have it. Raises OSError (ENOMEM) when there is not so much memory.
    """
    memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    try:
        memory.madvise(MADV_POPULATE_WRITE)
    except OSError:  # before Linux 5.14
        for at in range(0, size_bytes, PAGE_BYTES):
            memory[at] = 0
    return memory
