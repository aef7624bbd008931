"""How long a file takes to arrive: from the disk, from the system's page cache, or mapped.

The system keeps what it has read in memory that nobody else needs, the page cache. A second read is
therefore no test of the disk, unless the file is put out of the cache first.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

BLOCK = 1 << 20  # bytes read at a time
PAGE = 4096  # bytes; touching one byte of each brings a mapped file in


def evict(path: str | Path) -> bool:
    """Ask the system to drop a file from its page cache; False where there is no way to ask.

    Only pages that are safe on the disk are dropped, so they are written out first.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    return True


def read_all(path: str | Path) -> int:
    """Read a file from end to end; the bytes that came."""
    total = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            total += len(block)
    return total


def touch_all(path: str | Path) -> int:
    """Map a file into memory and look at one byte of each page, copying nothing; the pages seen."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        return len(view[::PAGE])
