"""Images into tar shards: a plan, then many processes that carry it out, then one rename.

The plan (which file goes into which shard, at which place) depends only on the files and the seed, so the bytes written
do not depend on the number of processes. Everything is written into `OUT.partial`, which becomes OUT when it is whole.
"""

import hashlib
import io
import multiprocessing
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mae_dist import rng
from mae_dist.errors import UserError
from mae_dist.shards.manifest import Manifest, Shard

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
KEPT_AS_IS = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # what timm, webdataset and open_clip read; others become PNG
PLAN_STREAM = 0x706C616E
MAX_KEY = 90  # a tar header holds names of 100 characters


@dataclass(frozen=True)
class Source:
    """One image to be sharded."""

    path: Path
    key: str
    """Unique, without dots or slashes: webdataset cuts keys at the first dot."""
    label: int
    """-1: none."""
    class_name: str


@dataclass(frozen=True)
class Written:
    """What one process wrote: the shard (None when no image was readable) and the files it could not read."""

    shard: Shard | None
    bad: tuple[str, ...]


def find_images(images: Path) -> tuple[list[Source], list[str]]:
    """The images under a directory and the class names.

    Class folders (`images/CLASS/**/x.jpg`, labels in sorted order of the names) or one flat directory without labels.
    Raises UserError when there are none, when a class folder has none, or when the two layouts are mixed.
    """
    if not images.is_dir():
        raise UserError(f"{images}: not a directory; write the one that holds the images or the class folders")
    is_image = lambda path: path.suffix.lower() in SUFFIXES and not path.name.startswith(".")  # noqa: E731
    flat = sorted(path for path in images.iterdir() if path.is_file() and is_image(path))
    folders = sorted(path for path in images.iterdir() if path.is_dir() and not path.name.startswith("."))
    if flat and folders:
        raise UserError(
            f"{images}: {len(flat)} images beside {len(folders)} folders (such as {folders[0].name}/); "
            "use class folders only, or one flat directory"
        )
    if not flat and not folders:
        raise UserError(f"{images}: no images here; looked for {', '.join(sorted(SUFFIXES))} and class folders")
    found: list[tuple[Path, int, str]] = [(path, -1, "") for path in flat]
    for label, folder in enumerate(folders):
        members = sorted(path for path in folder.rglob("*") if path.is_file() and is_image(path))
        if not members:
            raise UserError(f"{folder}: a class folder without images; remove the folder or add its images")
        found += [(path, label, folder.name) for path in members]
    keys = unique_keys([path.relative_to(images) for path, _, _ in found])
    sources = [Source(path, key, label, name) for (path, label, name), key in zip(found, keys, strict=True)]
    return sources, [folder.name for folder in folders]


def unique_keys(paths: Sequence[Path]) -> list[str]:
    """A key for each path: its parts without the suffix, dots and slashes as `_`, a hash added where not unique."""
    plain = [
        "_".join(path.with_suffix("").parts).replace(".", "_").encode("ascii", "replace").decode().replace("?", "_")
        for path in paths
    ]
    times = Counter(plain)
    return [
        key if times[key] == 1 and len(key) <= MAX_KEY
        else f"{key[: MAX_KEY - 17]}-{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        for key, path in zip(plain, paths, strict=True)
    ]  # fmt: skip


def encoded(path: Path) -> tuple[bytes, str]:
    """The bytes to store and their suffix: the file's own when its format is one that readers know, else a PNG of it.

    The whole image is decoded, so what raises here (OSError, ValueError, SyntaxError) would have raised in training.
    """
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if image.format in KEPT_AS_IS:
            return data, KEPT_AS_IS[image.format]
        out = io.BytesIO()
        image.convert("L" if image.mode in ("1", "L") else "RGB").save(out, "PNG")
        return out.getvalue(), "png"


def write_shard(directory: Path, job: tuple[str, Sequence[Source]]) -> Written:
    """Write one tar and its index: aside, fsync, rename."""
    name, sources = job
    rows, bad = [], []
    aside = directory / f"{name}.tmp"
    with aside.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for source in sources:
                try:
                    data, suffix = encoded(source.path)
                except Exception as error:  # decoders raise what they like for bad bytes
                    bad.append(f"{source.path}: {error}")
                    continue
                rows.append((tar.offset + tarfile.BLOCKSIZE, len(data), source.label))
                add(tar, f"{source.key}.{suffix}", data)
                if source.label >= 0:
                    add(tar, f"{source.key}.cls", str(source.label).encode())
                    add(tar, f"{source.key}.txt", source.class_name.encode())
        file.flush()
        os.fsync(file.fileno())
    if not rows:
        aside.unlink()
        return Written(None, tuple(bad))
    np.save((directory / name).with_suffix(".idx.npy"), np.array(rows, dtype=np.int64))
    entry = Shard.of(aside, name, len(rows))
    aside.rename(directory / name)
    return Written(entry, tuple(bad))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time 0, owner 0: the same bytes from the same images
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def plan(sources: Sequence[Source], shard_size: int, seed: int) -> list[tuple[str, list[Source]]]:
    """Shuffle all images by the seed and deal them into shards of `shard_size` (the last may be shorter)."""
    order = np.argsort(rng.fold(seed ^ PLAN_STREAM, np.arange(len(sources))), kind="stable")
    pieces = range(0, len(sources), shard_size)
    digits = max(5, len(str(len(pieces))))
    return [
        (f"train-{n:0{digits}d}.tar", [sources[i] for i in order[start : start + shard_size]])
        for n, start in enumerate(pieces)
    ]


def carry_out(directory: Path, jobs: Sequence[tuple[str, list[Source]]], workers: int) -> Iterator[Written]:
    """Each shard as it is done, in order, from `workers` processes."""
    work = partial(write_shard, directory)
    if workers <= 1:
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("forkserver").Pool(workers) as pool:
        yield from pool.imap(work, jobs)


def shard(
    images: Path, out: Path, shard_size: int = 1000, workers: int = 1, seed: int = 0, max_bad: int = 0
) -> Manifest:
    """Turn a directory of images into shards; see `find_images` for the layouts.

    `max_bad`: how many unreadable images to leave out before giving up. Raises UserError for any mistake in the input,
    with nothing left behind.
    """
    if shard_size < 1 or workers < 1:
        raise UserError(f"--shard-size and --workers must be at least 1, not {shard_size} and {workers}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists and is not empty; write a new directory or remove this one")
    sources, classes = find_images(images)
    jobs = plan(sources, shard_size, seed)
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir(parents=True)
    shards, bad = [], []
    try:
        with tqdm(total=len(sources), unit="img", desc=f"shard {out}", dynamic_ncols=True) as bar:
            for (_, members), written in zip(jobs, carry_out(partial_out, jobs, workers), strict=True):
                shards += [written.shard] if written.shard else []
                bad += written.bad
                bar.update(len(members))
                if len(bad) > max_bad:
                    raise UserError(
                        f"unreadable image {bad[0]}" + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
                        + "; remove it, or leave such images out with --max-bad N"
                    )  # fmt: skip
        if not shards:
            raise UserError(f"{images}: none of the {len(sources)} images is readable")
        if bad:
            (partial_out / "bad_images.txt").write_text("\n".join(bad) + "\n")
        manifest = Manifest(partial_out, shards, classes)
        manifest.save()
    except BaseException:
        shutil.rmtree(partial_out, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    partial_out.rename(out)
    return Manifest(out, shards, classes)
