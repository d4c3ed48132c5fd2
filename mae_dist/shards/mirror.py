"""A manifest that lies elsewhere: it and its indexes are copied into the cache, once a node; the shards stay there."""

import dataclasses
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mae_dist.shards import remote
from mae_dist.shards.cache import Cache, locked
from mae_dist.shards.download import persist
from mae_dist.shards.manifest import FILE_NAME, Manifest, index_name

THREADS = 32  # small files: what takes time is the way


def load_manifest(directory: str, cache: Cache | None = None, check: bool = True) -> Manifest:
    """`Manifest.load` of a local directory or of an fsspec URL. Raises UserError as that does.

    `cache`: for what lies elsewhere; None for the default one.
    """
    if not remote.is_remote(directory):
        return Manifest.load(directory, check)
    cache = cache or Cache()
    cache.prepare()
    place = remote.join(directory, FILE_NAME)
    text = persist(lambda: _whole(place), place, cache.counters)
    name = hashlib.sha256(directory.encode() + b"\n" + text).hexdigest()  # another content is another copy
    copy = cache.directory / "manifests" / name
    copy.parent.mkdir(exist_ok=True)
    with locked(copy.with_suffix(".lock")):
        if not copy.exists():
            aside = copy.with_suffix(".partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            _copy(directory, place, text, aside, cache)
            aside.rename(copy)
    return Manifest.load(copy)


def _copy(directory: str, place: str, text: bytes, into: Path, cache: Cache) -> None:
    shards = Manifest.parse(text, into, place).shards
    names = [Path(shard.index or index_name(shard.name)).name for shard in shards]

    def fetch(name: str) -> None:
        there = remote.join(directory, name)
        with (into / name).open("wb") as file:
            file.write(persist(lambda: _whole(there), there, cache.counters))
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, names))
    listing = json.loads(text)
    listing["shards"] = [
        dataclasses.asdict(dataclasses.replace(shard, name=remote.join(directory, shard.name), index=name))
        for shard, name in zip(shards, names, strict=True)
    ]
    (into / FILE_NAME).write_text(json.dumps(listing, indent=1) + "\n")


def _whole(place: str) -> bytes:
    with remote.open_stream(place) as stream:
        return stream.read()
