"""Everything that a manifest says, read again: sizes, checksums, counts, keys, places, and every image decoded."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mae_dist.errors import UserError
from mae_dist.local import regular
from mae_dist.shards import remote
from mae_dist.shards.encoded import MAX_PIXELS, decode_all, open_image
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.processes import in_order
from mae_dist.shards.progress import Progress
from mae_dist.shards.samples import samples
from mae_dist.shards.tar import BadTar, Digested, members
from mae_dist.urls import masked

Row = tuple[int, int, int]


@dataclass(frozen=True)
class Problem:
    """Something wrong in a shard; `key` is empty when it is the whole shard."""

    place: str
    key: str
    what: str

    def __str__(self) -> str:
        return masked(f"{self.place}: {self.key + ': ' if self.key else ''}{self.what}")


@dataclass(frozen=True)
class Checked:
    problems: list[Problem]
    keys: NDArray[np.int64]
    """A hash of every key found, in order."""


def verify(manifest: Manifest, workers: int = 1, max_pixels: int = MAX_PIXELS) -> Iterator[Problem]:
    """Every problem, shard by shard as they are read by `workers` processes; keys of several shards at the end.

    `max_pixels`: of an image, as `data.max_pixels` will be in training.
    """
    hashes, count = [], len(manifest.shards)
    with Progress("verify", manifest.num_samples) as bar:
        found = in_order(partial(check_shard, manifest, max_pixels), range(count), workers)
        for shard, checked in zip(manifest.shards, found, strict=True):
            bar.update(shard.count)
            hashes.append(checked.keys)
            yield from checked.problems
    everything = np.concatenate(hashes)
    owners = np.repeat(np.arange(count), [len(keys) for keys in hashes])
    order = np.argsort(everything, kind="stable")
    same = np.flatnonzero(everything[order][1:] == everything[order][:-1])
    pairs = np.unique(np.stack([owners[order][same], owners[order][same + 1]], axis=1), axis=0)
    for first, second in pairs.tolist():
        if first != second:  # a shard's own keys are unique: the same hash twice there is chance
            yield from _shared_keys(manifest, first, second)


def check_shard(manifest: Manifest, max_pixels: int, i: int) -> Checked:
    """Read one shard from front to back against its manifest entry and its table."""
    shard, place = manifest.shards[i], manifest.place(i)
    problems: list[Problem] = []
    keys: list[str] = []
    say = lambda key, what: problems.append(Problem(place, key, what))  # noqa: E731
    table = rows_of(manifest.index_path(i))
    try:
        manifest.table(i)
    except UserError as error:
        say("", f"its table cannot be used: {error}")
    rows: list[Row] = []
    try:
        with remote.open_stream(place) as stream:
            digested = Digested(stream)
            for sample in samples(members(digested)):
                keys.append(sample.key)
                if not sample.image or not sample.image.size:  # left out of the table
                    continue
                row = (sample.image.offset, sample.image.size, sample.label)
                if len(rows) < len(table) and table[len(rows)] != row:
                    say(sample.key, f"lies at (offset, length, label) {row}, its table says {table[len(rows)]}")
                rows.append(row)
                if sample.image.data is not None and (what := undecodable(sample.image.data, max_pixels)):
                    say(sample.key, what)
    except BadTar as error:
        say("", str(error))
    except MemoryError:
        raise
    except Exception as error:  # file systems raise what they like
        say("", f"cannot be read: {type(error).__name__}: {' '.join(str(error).split())}")
    else:
        if digested.num_bytes != shard.num_bytes:
            say("", f"{digested.num_bytes} bytes where the manifest says {shard.num_bytes}")
        if digested.sha256.hexdigest() != shard.sha256:
            say("", f"sha256 {digested.sha256.hexdigest()[:12]}..., the manifest says {shard.sha256[:12]}...")
    if len(rows) != shard.count:
        say("", f"{len(rows)} images where the manifest says {shard.count}")
    if table and len(table) != shard.count:
        say("", f"its table has {len(table)} rows where the manifest says {shard.count}")
    return Checked(problems, np.array([hash_of(key) for key in keys], dtype=np.int64))


def rows_of(index: Path) -> list[Row]:
    """What a table says, whether it is the right one or not; nothing when it is none."""
    with contextlib.suppress(Exception):  # np.load raises what it likes for bad bytes
        table = np.load(regular(index), allow_pickle=False)
        if table.dtype == np.int64 and table.shape[1:] == (3,):
            return [tuple(row) for row in table.tolist()]
    return []


def undecodable(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """What is wrong with an image, after decoding all of it; empty when nothing is."""
    try:
        with open_image(data, max_pixels) as image:
            decode_all(image, data)
    except MemoryError:  # says nothing of the image
        raise
    except Exception as error:  # decoders raise what they like for bad bytes
        return f"unreadable image: {' '.join(str(error).split())}"
    return ""


def hash_of(key: str) -> int:
    """64 bits: an epoch's worth of keys fits in memory, and a chance collision is looked at again."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def keys_of(place: str) -> set[str]:
    """The keys of a shard, as far as it can be read."""
    keys = set()
    with contextlib.suppress(BadTar, OSError), remote.open_stream(place) as stream:
        for sample in samples(members(Digested(stream))):
            keys.add(sample.key)
    return keys


def _shared_keys(manifest: Manifest, first: int, second: int) -> Iterator[Problem]:
    places = manifest.place(first), manifest.place(second)
    for key in sorted(keys_of(places[0]) & keys_of(places[1])):
        yield Problem(places[1], key, f"the key is in {places[0]} too")
