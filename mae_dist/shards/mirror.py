"""A manifest that lies elsewhere: it and its indexes are copied into the cache, once a node; the shards stay there."""

import hashlib
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mae_dist.errors import UserError
from mae_dist.launched import rank_and_size
from mae_dist.local import write_file
from mae_dist.shards import remote
from mae_dist.shards.cache import Cache, locked
from mae_dist.shards.download import persist
from mae_dist.shards.manifest import FILE_NAME, Manifest, index_name
from mae_dist.shards.trust import check_names
from mae_dist.urls import masked

THREADS = 32  # small files: what takes time is the way


def load_manifest(
    directory: str, cache: Cache | None = None, check: bool = True, allow_commands: bool = False
) -> Manifest:
    """`Manifest.load` of a local directory or of an fsspec URL, and this rank's share of the tables is looked at.

    `cache`: for what lies elsewhere; None for the default one. `allow_commands`: whatever a manifest names is run or
    read; else UserError for what `check_names` refuses. Says once what has no checksums. Raises UserError.
    """
    rank, world_size = rank_and_size()
    manifest = _local(directory, cache, check, allow_commands)
    if not manifest.is_sealed and rank == 0:
        index = f"; mae-dist index {directory} adds them" if not remote.is_remote(directory) else ""
        said = masked(f"note: {directory} was made before manifests had checksums{index}")
        print(said, file=sys.stderr, flush=True)
    for shard in range(rank, len(manifest.shards), world_size) if check else ():
        manifest.table(shard)
    return manifest


def _local(directory: str, cache: Cache | None, check: bool, allow_commands: bool) -> Manifest:
    if directory.startswith(remote.PIPE):
        raise UserError(f"{directory}: a command gives no directory; write the one that mae-dist index made of it")
    if not remote.is_remote(directory):
        manifest = Manifest.load(directory, check)
        if not allow_commands:
            check_names((shard.name for shard in manifest.shards), str(directory))
        return manifest
    cache = cache or Cache()
    cache.prepare()
    place = remote.join(directory, FILE_NAME)
    text = persist(lambda: _whole(place), place, cache.counters)
    names = [shard.name for shard in Manifest.parse(text, cache.directory, place).shards]
    if not allow_commands:
        check_names(names, directory, fetched=True)
    name = hashlib.sha256(directory.encode() + b"\n" + text).hexdigest()  # another content is another copy
    copy = cache.directory / "manifests" / name
    copy.parent.mkdir(exist_ok=True)
    with locked(copy.with_suffix(".lock")):
        if not copy.exists():
            aside = copy.with_suffix(".partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            _copy(directory, place, text, aside, cache)
            here = Manifest.load(aside, check=False)
            for shard in range(len(here.shards)):
                here.table(shard)
            aside.rename(copy)
    manifest = Manifest.load(copy, check=False)
    pairs = zip(manifest.shards, names, strict=True)
    there = [replace(s, name=remote.join(directory, name)) for s, name in pairs]
    manifest = replace(manifest, shards=there)  # here only: an address may hold a password
    manifest.check_files()
    return manifest


def _copy(directory: str, place: str, text: bytes, into: Path, cache: Cache) -> None:
    manifest = Manifest.parse(text, into, place)
    shards = manifest.shards
    names = [Path(shard.index or index_name(shard.name)).name for shard in shards]

    def fetch(name: str) -> None:
        there = remote.join(directory, name)
        write_file(into / name, persist(lambda: _whole(there), there, cache.counters))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, names))
    here = [replace(shard, index=name) for shard, name in zip(shards, names, strict=True)]
    write_file(into / FILE_NAME, replace(manifest, shards=here).text())


def _whole(place: str) -> bytes:
    with remote.open_stream(place) as stream:
        return stream.read()
