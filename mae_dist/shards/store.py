"""The bytes of any sample, by (shard, index): one positioned read, of a mapped local tar or of a cached remote one."""

import mmap
import resource
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mae_dist.shards import remote
from mae_dist.shards.cache import Cache, read_range
from mae_dist.shards.download import Wanted
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.tar import BLOCK, BadTar, check_header, own_name

OPEN_SHARDS = 1024  # mapped at once; the kernel allows about 65,000 mappings a process
PAGE = mmap.PAGESIZE
RANGES = 32  # samples of one shard that a process reads by ranges before it waits for the whole shard


class LocalStore:
    """Reads the shards of a manifest from a local or mounted disk. Safe to fork: maps are opened at first use."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        allow_open_files(2 * OPEN_SHARDS + 512)  # each map keeps its file open, tar and index

    def __getstate__(self) -> dict:
        return {"manifest": self.manifest}  # open maps stay where they are

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["manifest"])

    def read(self, shard: int, index: int) -> tuple[bytes, int]:
        """The encoded image and its label (-1: none)."""
        data, table = self._open(shard)
        offset, length, label = table[index].tolist()
        return data[offset : offset + length], label

    def will_need(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        """These samples are read next: the kernel may fetch what is not in memory, all side by side."""
        for shard, index in zip(shards, indices, strict=True):
            data, table = self._open(shard)
            offset, length, _ = table[index].tolist()
            start, end = offset // PAGE * PAGE, min(offset + length, len(data))
            if start < end:
                with suppress(OSError):  # only advice
                    data.madvise(mmap.MADV_WILLNEED, start, end - start)

    def where(self, shard: int, index: int) -> str:
        """Where a sample lies, for a message about it."""
        offset, length, _ = self._open(shard)[1][index].tolist()
        return f"{self.manifest.tar_path(shard)}: sample {index} (bytes {offset} to {offset + length})"

    def key(self, shard: int, index: int) -> str:
        """A sample's key; empty where the header before its bytes does not say it."""
        data, table = self._open(shard)
        offset = int(table[index, 0])
        return key_in(data[offset - BLOCK : offset])

    def _open_shard(self, shard: int) -> tuple[mmap.mmap, NDArray[np.int64]]:
        with self.manifest.tar_path(shard).open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return data, np.load(self.manifest.index_path(shard), mmap_mode="r")


class RemoteStore:
    """Reads a manifest whose shards lie elsewhere, all or some, through the cache of this node.

    A sample of a shard that has not arrived is read by a range request, up to `RANGES` times a shard and process: so
    training starts, or goes on after a resume, before any shard is here. After that, and where there are no ranges
    (`pipe:`, plain web servers), the reader waits for the shard, and fetches it if nobody does.
    """

    def __init__(self, manifest: Manifest, cache: Cache):
        cache.prepare()
        self.manifest, self.cache = manifest, cache
        self.local = LocalStore(manifest)
        self.shards = wanted(manifest)
        self.ranged: Counter[int] = Counter()
        self.has_ranges = True  # until a server shows that it has not
        self._table = lru_cache(maxsize=OPEN_SHARDS)(self._load_table)

    def __getstate__(self) -> dict:
        return {"manifest": self.manifest, "cache": self.cache}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def read(self, shard: int, index: int) -> tuple[bytes, int]:
        """The encoded image and its label (-1: none). Raises UserError, naming the place, when it cannot be had."""
        whole = self.shards[shard]
        if whole is None:
            return self.local.read(shard, index)
        offset, length, label = self._table(shard)[index].tolist()
        data = self.cache.read(whole, offset, length)
        self.cache.counters.add(**{"misses" if data is None else "hits": 1})
        if data is None and self._may_range(whole, shard):
            data = read_range(whole, offset, length, self.cache.counters)
            self.ranged[shard] += 1
            self.has_ranges = data is not None
        while data is None:  # once, unless it is evicted between these two
            self.cache.ensure(whole)
            data = self.cache.read(whole, offset, length)
        return data, label

    def where(self, shard: int, index: int) -> str:
        """Where a sample lies, for a message about it."""
        offset, length, _ = self._table(shard)[index].tolist()
        return f"{self.manifest.place(shard)}: sample {index} (bytes {offset} to {offset + length})"

    def key(self, shard: int, index: int) -> str:
        """A sample's key; empty where the header before its bytes does not say it. May raise what clients do."""
        whole = self.shards[shard]
        if whole is None:
            return self.local.key(shard, index)
        offset = int(self._table(shard)[index, 0])
        header = self.cache.read(whole, offset - BLOCK, BLOCK)
        if header is None and self._may_range(whole, shard):
            header = remote.read_range(whole.place, offset - BLOCK, offset)
        return key_in(header or b"")

    def _may_range(self, whole: Wanted, shard: int) -> bool:
        return self.has_ranges and self.ranged[shard] < RANGES and not whole.place.startswith(remote.PIPE)

    def _load_table(self, shard: int) -> NDArray[np.int64]:
        whole = self.shards[shard]
        assert whole
        self.cache.touch(whole)
        return np.load(self.manifest.index_path(shard), mmap_mode="r")


def key_in(header: bytes) -> str:
    """The key of the file that a tar header is of: up to the first dot of its name, as for webdataset."""
    if len(header) != BLOCK:  # a server without ranges sends the whole shard
        return ""
    try:
        check_header(header, 1)
    except BadTar:
        return ""
    folder, slash, name = own_name(header).rpartition("/")
    return folder + slash + name.partition(".")[0]


def wanted(manifest: Manifest) -> list[Wanted | None]:
    """What to fetch for each shard; None for a local one."""
    places = [manifest.place(i) for i in range(len(manifest.shards))]
    return [
        Wanted(place, shard.num_bytes, shard.sha256) if remote.is_remote(place) else None
        for place, shard in zip(places, manifest.shards, strict=True)
    ]


def open_store(manifest: Manifest, cache: Cache | None = None) -> LocalStore | RemoteStore:
    """The store of a manifest. `cache`: for remote shards; None for the default one."""
    if any(wanted(manifest)):
        return RemoteStore(manifest, cache or Cache())
    return LocalStore(manifest)


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files, 1024 on many systems, as far as needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
