"""The bytes of any sample, by (shard, index): one positioned read, of a local tar or of a cached remote one."""

import os
import resource
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from mae_dist.errors import UserError, unreadable
from mae_dist.shards import remote
from mae_dist.shards.cache import Cache, read_range
from mae_dist.shards.download import Wanted
from mae_dist.shards.manifest import TABLE_HEADER, Manifest
from mae_dist.shards.tar import BLOCK, LONG_NAME, PAX, BadTar, check_header, extension, number, own_name, text

OPEN_SHARDS = 1024  # at once
LEAST_FILES = 256
RESERVED = 512  # open files that are left for all else
HEADERS = 8 * BLOCK  # bytes before a file's own that are looked at for its name
RANGES = 32  # samples of one shard that a process reads by ranges before it waits for the whole shard
PAUSES = (0.5, 2, 8)  # seconds before a read that failed is tried again: file servers come back
ROW = struct.Struct("<3q")
SIZE_FIELD = slice(124, 136)  # of a tar header

T = TypeVar("T")


class Table:
    """The table of a shard, open. Read, not mapped: of a file that was cut short meanwhile a map is a fatal signal."""

    def __init__(self, path: Path):
        self.path, self.file = path, os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)

    def row(self, index: int) -> tuple[int, int, int]:
        """Offset, length and label of a sample. Raises OSError, and UserError where the table has no such row."""
        data = os.pread(self.file, ROW.size, TABLE_HEADER + ROW.size * index)
        if len(data) < ROW.size:
            raise UserError(f"{self.path}: was cut short while in use; copy it again, or index the shards again")
        return ROW.unpack(data)


class OpenShard:
    """A local tar and its table, open."""

    def __init__(self, tar: Path, table: Path, num_bytes: int):
        self.path, self.num_bytes, self.table = tar, num_bytes, Table(table)
        self.file = os.open(tar, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)

    def read(self, index: int) -> tuple[bytes, int]:
        """A sample's bytes and label. Raises OSError, and UserError when the tar is not as it was when indexed."""
        offset, length, label = self.table.row(index)
        header, data = os.pread(self.file, BLOCK, offset - BLOCK), os.pread(self.file, length, offset)
        found = os.fstat(self.file).st_size
        if found != self.num_bytes or len(data) < length:
            raise changed(self.path, f"has {found} bytes where the manifest says {self.num_bytes}")
        check_place(self.path, header, offset, length)
        return data, label

    def headers(self, index: int) -> bytes:
        """The blocks of the tar before a sample's bytes, `before` them."""
        start, end = before(self.table.row(index)[0])
        return os.pread(self.file, end - start, start)


def check_place(shard: str | Path, header: bytes, offset: int, length: int) -> None:
    """Raises UserError unless a block of a shard is the header of a file of this length, which begins at `offset`."""
    with suppress(BadTar):
        if len(header) == BLOCK and number(header[SIZE_FIELD]) == length:
            return
    raise changed(shard, f"has no image of {length} bytes at byte {offset}, as its table says")


def changed(shard: str | Path, how: str) -> UserError:
    return UserError(
        f"{shard}: {how}: it was changed after it was indexed; copy it again, or, if it is as it should be, "
        "index its shards again and train a new run"
    )


class LocalStore:
    """Reads the shards of a manifest from a local or mounted disk. Safe to fork: files are opened at first use.

    A read that fails is tried again for a while. Raises UserError, naming the file, when it goes on to fail, and when a
    shard has another size, or other files at the places of its samples, than when it was indexed.
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._shards: dict[int, OpenShard] = {}  # the least recently used first
        most = allow_open_files(2 * OPEN_SHARDS + RESERVED) - RESERVED
        self.most = min(OPEN_SHARDS, max(8, most // 2))  # tar and table

    def __getstate__(self) -> dict:
        return {"manifest": self.manifest}  # open files stay where they are

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["manifest"])

    def read(self, shard: int, index: int) -> tuple[bytes, int]:
        """The encoded image and its label (-1: none)."""
        return self._patiently(shard, lambda opened: opened.read(index))

    def will_need(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        """These samples are read next: the kernel may fetch what is not in memory, all side by side."""
        for shard, index in zip(shards, indices, strict=True):
            with suppress(OSError, UserError):  # only advice; whoever reads it says what is wrong
                opened = self._open(shard)
                offset, length, _ = opened.table.row(index)
                os.posix_fadvise(opened.file, offset, length, os.POSIX_FADV_WILLNEED)

    def where(self, shard: int, index: int) -> str:
        """Where a sample lies, for a message about it."""
        offset, length, _ = self._patiently(shard, lambda opened: opened.table.row(index))
        return f"{self.manifest.tar_path(shard)}: sample {index} (bytes {offset} to {offset + length})"

    def key(self, shard: int, index: int) -> str:
        """A sample's key; empty where the header before its bytes does not say it."""
        return key_in(self._patiently(shard, lambda opened: opened.headers(index)))

    def _patiently(self, shard: int, action: Callable[[OpenShard], T]) -> T:
        for pause in (*PAUSES, None):
            try:
                return action(self._open(shard))
            except OSError as error:
                self._shards.pop(shard, None)  # a stale handle is opened anew
                if pause is None:
                    raise unreadable(
                        error,
                        f"{error.filename or self.manifest.tar_path(shard)}: cannot be read, tried "
                        f"{len(PAUSES) + 1} times: {error.strerror}; when it can be, the same command goes on",
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _open(self, shard: int) -> OpenShard:
        opened = self._shards.pop(shard, None)
        if opened is None:
            self.manifest.look_at(shard)
            num_bytes = self.manifest.shards[shard].num_bytes
            opened = OpenShard(self.manifest.tar_path(shard), self.manifest.index_path(shard), num_bytes)
            if len(self._shards) == self.most:
                del self._shards[next(iter(self._shards))]
        self._shards[shard] = opened
        return opened


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
        offset, length, label = self._table(shard).row(index)
        place = offset - BLOCK, BLOCK + length  # with its header
        data = self.cache.read(whole, *place)
        self.cache.counters.add(**{"misses" if data is None else "hits": 1})
        if data is None and self._may_range(whole, shard):
            data = read_range(whole, *place, self.cache.counters)
            self.ranged[shard] += 1
            self.has_ranges = data is not None
        while data is None:  # once, unless it is evicted between these two
            self.cache.ensure(whole)
            data = self.cache.read(whole, *place)
        check_place(whole.place, data[:BLOCK], offset, length)
        return data[BLOCK:], label

    def where(self, shard: int, index: int) -> str:
        """Where a sample lies, for a message about it."""
        offset, length, _ = self._table(shard).row(index)
        return f"{self.manifest.place(shard)}: sample {index} (bytes {offset} to {offset + length})"

    def key(self, shard: int, index: int) -> str:
        """A sample's key; empty where the header before its bytes does not say it. May raise what clients do."""
        whole = self.shards[shard]
        if whole is None:
            return self.local.key(shard, index)
        start, end = before(self._table(shard).row(index)[0])
        headers = self.cache.read(whole, start, end - start)
        if headers is None and self._may_range(whole, shard):
            headers = remote.read_range(whole.place, start, end)
        return key_in(headers or b"")

    def _may_range(self, whole: Wanted, shard: int) -> bool:
        return self.has_ranges and self.ranged[shard] < RANGES and not whole.place.startswith(remote.PIPE)

    def _load_table(self, shard: int) -> Table:
        whole = self.shards[shard]
        assert whole
        self.cache.touch(whole)
        self.manifest.look_at(shard)
        return Table(self.manifest.index_path(shard))


def before(offset: int) -> tuple[int, int]:
    """Where the headers of the file at `offset` of a tar lie: its own, and one of its name when that is long."""
    return max(0, offset - HEADERS), offset


def key_in(headers: bytes) -> str:
    """The key of a file, up to the first dot of its name, as for webdataset. `headers`: the blocks before its bytes.

    Empty where they do not say it.
    """
    own = headers[-BLOCK:]
    if len(headers) > HEADERS or len(own) < BLOCK:  # a server without ranges sends the whole shard
        return ""
    try:
        check_header(own, 1)
    except BadTar:
        return ""
    folder, slash, name = (_long_name(headers[:-BLOCK]) or own_name(own)).rpartition("/")
    return folder + slash + name.partition(".")[0]


def _long_name(blocks: bytes) -> str:
    """What an extension header at the end of these blocks says the next file is called; empty when there is none."""
    for start in range(len(blocks) - 2 * BLOCK, -1, -BLOCK):
        header, data = blocks[start : start + BLOCK], blocks[start + BLOCK :]
        if header[156:157] in (LONG_NAME, *PAX):
            with suppress(BadTar):
                check_header(header, 1)
                size = number(header[124:136])
                if size + -size % BLOCK == len(data):
                    return text(extension(header[156:157], data[:size], 0).get(b"path", b""))
    return ""


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


def allow_open_files(count: int) -> int:
    """Raise the soft limit of open files, 1024 on many systems, as far as needed and allowed; returns what it is.

    Raises UserError where too few are allowed for a training or an evaluation.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft == resource.RLIM_INFINITY:
        return count
    if hard != resource.RLIM_INFINITY and hard < LEAST_FILES:
        raise UserError(
            f"at most {hard} open files are allowed here, {LEAST_FILES} are needed (shards, workers, sockets); "
            f"raise the hard limit: ulimit -n {LEAST_FILES}, in a container --ulimit nofile={LEAST_FILES}"
        )
    if soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    return max(soft, enough)
