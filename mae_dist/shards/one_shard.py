"""One shard of a plan: read its images, convert them, write tar, index and record, each whole or not at all."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from mae_dist.errors import OF_THE_FILE
from mae_dist.local import fsync, staging, write_file
from mae_dist.shards.convert import convert
from mae_dist.shards.encoded import has_frames
from mae_dist.shards.inputs import Reader
from mae_dist.shards.manifest import ROW_BYTES, TABLE_HEADER, Shard, index_name, table_bytes
from mae_dist.shards.notes import FRAMES, Notes
from mae_dist.shards.plan import Item, Plan
from mae_dist.shards.publish import sizes_in, upload
from mae_dist.shards.remote import is_remote
from mae_dist.shards.tar import Digested


@dataclass(frozen=True)
class Done:
    """What became of one shard of the plan."""

    shard: Shard | None
    """None when none of its images was readable."""
    images: int
    """As planned, readable or not."""
    bad: list[str]
    notes: Notes = field(default_factory=Notes)

    def save(self, path: Path) -> None:
        shard = vars(self.shard) if self.shard else None
        write_file(path, json.dumps({"shard": shard, "images": self.images, "bad": self.bad, "notes": self.notes}))

    @staticmethod
    def load(path: Path) -> "Done":
        """Raises ValueError, TypeError, KeyError or RecursionError where it is damaged."""
        record = json.loads(path.read_text())
        shard = Shard(**record["shard"]) if record["shard"] else None
        return Done(shard, record["images"], record["bad"], Notes(record.get("notes", {})))


@lru_cache(maxsize=1)
def _opened(plan_directory: Path, identity: tuple[int, int]) -> tuple[Plan, Reader]:
    """The plan and its reader: once a process, not once a shard. `identity`: that of the plan, as another may come."""
    plan = Plan.load(plan_directory)
    assert plan, plan_directory
    return plan, Reader(plan.root, plan.containers, plan.recipe.image_column)


def write_shard(aside: Path, publish_to: str, shard: int) -> Done:
    """Write one tar and its index into `aside`/shards, whole or not at all, and its record into `aside`/plan.

    `publish_to`: a remote OUT to upload both to, which keeps the index only here; empty for a local OUT.
    """
    status = (aside / "plan" / "plan.json").stat()
    plan, reader = _opened(aside / "plan", (status.st_ino, status.st_mtime_ns))
    name = plan.shard_name(shard)
    tar_path, index_path = aside / "shards" / f"{name}.tar", aside / "shards" / f"{name}.idx.npy"
    # Two starts may write the same shard at once, from two machines: the same bytes under names of their own.
    unfinished = staging(aside / "plan" / tar_path.name)
    items = plan.items(shard)
    done_path(aside, plan, shard).unlink(
        missing_ok=True
    )  # made again, its images mended: the record would be of others
    try:
        with unfinished.open("wb") as file:
            rows, bad, notes = fill(file, plan, reader, items)
        done = Done(None, len(items), bad, notes)
        if rows:
            table = table_bytes(rows)
            with unfinished.open("rb") as file:
                done = Done(Shard.of(Digested(file), tar_path.name, table), len(items), bad, notes)
            write_file(index_path, table)
            fsync(unfinished)
            unfinished.replace(tar_path)
            fsync(tar_path.parent)
            if publish_to:
                upload(tar_path, publish_to)
                upload(index_path, publish_to)
                tar_path.unlink()
    finally:
        unfinished.unlink(missing_ok=True)
    done.save(done_path(aside, plan, shard))
    return done


def fill(
    file: BinaryIO, plan: Plan, reader: Reader, items: Sequence[Item]
) -> tuple[list[tuple[int, int, int]], list[str], Notes]:
    """Write the tar. Returns the index's rows (offset, length, label), what was unreadable, and what is not used.

    Raises StorageFailed.
    """
    rows, bad, notes = [], [], Notes()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for item in items:
            try:
                given = read(reader, item)
                data, suffix = convert(given, plan.recipe.conversion)
                if suffix != "jpg" and has_frames(given):  # of an MPO it is the same picture
                    notes.add(FRAMES, reader.where(item.container, item.origin))
            except (MemoryError, StorageFailed):
                raise
            except Exception as error:  # decoders raise what they like for bad bytes
                bad.append(f"{reader.where(item.container, item.origin)}: {' '.join(str(error).split())}")
                continue
            rows.append((tar.offset + tarfile.BLOCKSIZE, len(data), item.label))  # type: ignore[attr-defined]
            add(tar, f"{item.key}.{suffix}", data)
            if item.label >= 0:
                add(tar, f"{item.key}.cls", str(item.label).encode())
                add(tar, f"{item.key}.txt", os.fsencode(plan.class_name(item.label)))
            tar.members = []  # type: ignore[attr-defined]  # tarfile would remember them all
    return rows, bad, notes


class StorageFailed(OSError):
    """No fault of an image: it may be whole, and readable once the storage is well again."""


def read(reader: Reader, item: Item) -> bytes:
    """The bytes of an image.

    Raises StorageFailed for what the system says of a disk or a server (EIO, ESTALE, ...). A file that is not there or
    may not be read (a broken link, say), and one with something wrong in it (cut short, a row without bytes), is a bad
    image: that raises what `Reader.read` does. One that is gone with all that lay beside it is not: no disk is mounted.
    """
    try:
        return reader.read(item.container, item.origin, *item.place)
    except OSError as error:
        where = reader.where(item.container, item.origin)
        if error.errno not in OF_THE_FILE:
            raise StorageFailed(error.errno, error.strerror, where) from error
        if error.errno and not reader.has_neighbours(item.container, item.origin):
            raise StorageFailed(
                errno.ESTALE, "gone, with all that lay beside it; is its disk mounted?", where
            ) from error
        raise


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time 0, owner 0: the same bytes from the same images
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def done_path(aside: Path, plan: Plan, shard: int) -> Path:
    return aside / "plan" / f"{plan.shard_name(shard)}.done"


def already_done(aside: Path, plan: Plan, out: str) -> dict[int, Done]:
    """The shards that earlier starts, or other parts, have finished: a record, tar and index of their sizes."""
    recorded = {entry.name for entry in os.scandir(aside / "plan") if entry.name.endswith(".done")}
    here = {} if is_remote(out) or not recorded else sizes_in(str(aside / "shards"))  # first: it may become OUT
    there = sizes_in(out) | here if recorded else {}
    found = {}
    for shard in range(plan.num_shards):
        path = done_path(aside, plan, shard)
        if path.name not in recorded:
            continue
        try:
            done = Done.load(path)
        except (ValueError, TypeError, KeyError, RecursionError):  # damaged: the shard is made again
            continue
        tar = done.shard
        files = {tar.name: tar.num_bytes, index_name(tar.name): TABLE_HEADER + ROW_BYTES * tar.count} if tar else {}
        if files.items() <= there.items():
            found[shard] = done
    return found
