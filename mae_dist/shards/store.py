"""The bytes of any sample, by (shard, index): one positioned read of a memory-mapped tar."""

import mmap
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mae_dist.shards.manifest import Manifest

OPEN_SHARDS = 1024  # mapped at once; the kernel allows about 65,000 mappings a process


class LocalStore:
    """Reads the shards of a manifest from a local or mounted disk. Safe to fork: maps are opened at first use."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __getstate__(self) -> dict:
        return {"manifest": self.manifest}  # open maps stay where they are

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["manifest"])

    def read(self, shard: int, index: int) -> tuple[bytes, int]:
        """The encoded image and its label (-1: none)."""
        data, table = self._open(shard)
        offset, length, label = table[index].tolist()
        return data[offset : offset + length], label

    def where(self, shard: int, index: int) -> str:
        """Where a sample lies, for a message about it."""
        offset, length, _ = self._open(shard)[1][index].tolist()
        return f"{self.manifest.tar_path(shard)}: sample {index} (bytes {offset} to {offset + length})"

    def _open_shard(self, shard: int) -> tuple[mmap.mmap, NDArray[np.int64]]:
        with self.manifest.tar_path(shard).open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data, np.load(self.manifest.index_path(shard), mmap_mode="r")
