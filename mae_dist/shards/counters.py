"""Counts that the processes of a trainer add to together: it, its workers and its prefetcher."""

import fcntl
import mmap
import os
import tempfile
import threading
from contextlib import suppress

import numpy as np

NAMES = ("hits", "misses", "ranges", "downloads", "retries", "bytes")
"""Samples read from the cache, samples whose shard was not there yet, those of them read by a range request; shards
downloaded, requests tried again, bytes fetched."""


class Counters:
    """Shared with forked children as it is, with other processes through the number of its inherited file."""

    def __init__(self, inherited: int | None = None):
        self.file = tempfile.TemporaryFile() if inherited is None else os.fdopen(inherited, "r+b")  # noqa: SIM115
        if inherited is None:
            self.file.truncate(8 * len(NAMES))
        self.values = np.frombuffer(mmap.mmap(self.file.fileno(), 8 * len(NAMES)), dtype=np.int64)
        self.threads = threading.Lock()

    def add(self, **counts: int) -> None:
        """`add(hits=1)`: none is lost, whoever else counts."""
        with self.threads:  # a lock of the file keeps out processes, not threads of this one
            fcntl.lockf(self.file, fcntl.LOCK_EX)
            for name, count in counts.items():
                self.values[NAMES.index(name)] += count
            fcntl.lockf(self.file, fcntl.LOCK_UN)

    def totals(self) -> dict[str, int]:
        return dict(zip(NAMES, self.values.tolist(), strict=True))

    def __del__(self) -> None:
        with suppress(AttributeError):
            self.file.close()
