"""Where images come from: what IMAGES is, and the name, place and label of every image in it, in a fixed order.

Class folders, one flat directory, ILSVRC's tars as downloaded, webdataset tars, parquet files as on Hugging Face. What
lies in tars and parquet files is addressed there (file, offset, length; file, row group, row), never unpacked to disk.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mae_dist.errors import UserError
from mae_dist.shards.tars import SUFFIXES, Piece, find_ranges, is_image, scan_tar

# In the names of files; a folder has to be called exactly so.
SPLITS = [re.compile(word, re.IGNORECASE) for word in (r"train", r"validation|(?<![a-z])val(?:id)?(?![a-z])", r"test")]
OPEN_FILES = 256  # tars kept open by a process; a shard may draw from all of them
Mapper = Callable[[Callable[[Any], Piece], Sequence[Any]], Iterable[Piece]]


@dataclass(frozen=True)
class Input:
    kind: str
    root: str
    """What the origins of single files are relative to."""
    containers: list[str]
    """Tars or parquet files; empty when each image is a file."""
    classes: list[str]
    scan: Callable[[Any], Piece]
    jobs: Sequence[Any]
    """`scan(job)` for each job, in this order, gives all the images. Jobs may run in any process."""

    def pieces(self, mapper: Mapper = map) -> Iterator[Piece]:
        yield from mapper(self.scan, self.jobs)


def recognise(images: str, has_labels: bool = False) -> Input:
    """What `images` is: a directory, a tar, a parquet file, or a glob pattern of tars or parquet files.

    Raises UserError when there are no images, when layouts are mixed, or when a directory holds several splits.
    """
    path = Path(images)
    if path.is_dir():
        found = _directory(path)
    else:
        files = [path] if path.is_file() else sorted(map(Path, glob.glob(images)))  # noqa: PTH207
        if not files:
            raise UserError(f"{images}: no such directory or file; write the directory that holds the images")
        kinds = {file.suffix for file in files}
        if kinds == {".tar"}:
            found = _tars(files)
        elif kinds == {".parquet"}:
            found = _parquet(files)
        else:
            raise UserError(f"{images}: not a directory, not .tar and not .parquet; compressed tars must be unpacked")
    if has_labels and (found.kind != "flat" or len(found.containers) > 1):
        raise UserError(f"--labels is for one flat directory or one tar of images, and {images} is neither")
    return found


def _directory(path: Path) -> Input:
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.name)
    flat, tars = sorted(filter(is_image, files)), [path / name for name in sorted(files) if name.endswith(".tar")]
    folders.sort()
    parquet = [path / name for name in sorted(files) if name.endswith(".parquet")]
    if not flat and not tars and not parquet and "data" in folders:
        parquet = sorted((path / "data").glob("*.parquet"))  # how Hugging Face lays out a repository
        folders = [] if parquet else folders
    if parquet or tars:
        if flat or folders or (parquet and tars):
            raise UserError(
                f"{path}: images, folders, tars or parquet files side by side; write a pattern such as '{path}/*.tar'"
            )
        one_split(path, parquet or tars)
        return _parquet(parquet) if parquet else _tars(tars)
    if flat and folders:
        raise UserError(
            f"{path}: {len(flat)} images beside {len(folders)} folders (such as {folders[0]}/); "
            "use class folders only, or one flat directory"
        )
    if flat:
        return Input("flat", str(path), [], [], scan_flat, [flat])
    if folders:
        no_splits(path, folders)
        jobs = [(str(path), name, label) for label, name in enumerate(folders)]
        return Input("class folders", str(path), [], folders, scan_folder, jobs)
    raise UserError(f"{path}: no images here; looked for {', '.join(sorted(SUFFIXES))}, class folders, .tar, .parquet")


def one_split(path: Path, files: Sequence[Path]) -> None:
    """Raises UserError for a directory that holds training and held-out files: mixing them would be silent."""
    found = [next(filter(None, (split.search(file.name) for file in files)), None) for split in SPLITS]
    words = [match[0] for match in found if match]
    if len(words) > 1:
        pattern = f"{files[0].parent}/*{words[0]}*{files[0].suffix}"
        raise UserError(f"{path}: holds the splits {', '.join(words)}; shard one at a time, for example '{pattern}'")


def no_splits(path: Path, folders: Sequence[str]) -> None:
    """Raises UserError when all folders with images are splits: they would become classes. A class may be called so."""
    splits = [name for name in folders if any(split.fullmatch(name) for split in SPLITS)]
    if splits and not any(has_images(path / name) for name in folders if name not in splits):
        raise UserError(
            f"{path}: holds the {'splits' if len(splits) > 1 else 'split'} {', '.join(splits)}, not class folders; "
            f"shard one at a time, for example '{path / splits[0]}'"
        )


def has_images(folder: Path) -> bool:
    return any(is_image(name) for _, _, files in os.walk(folder, followlinks=True) for name in files)


def _tars(files: Sequence[Path]) -> Input:
    ranges, classes = find_ranges(files)
    kind = "class tars" if classes else "flat" if len(files) == 1 else "tars"
    classes = classes or _classes_beside(files[0].parent)
    return Input(kind, "", [str(path.absolute()) for path in files], classes, scan_tar, ranges)


def _classes_beside(directory: Path) -> list[str]:
    """Class names of shards that mae-dist wrote."""
    try:
        return list(json.loads((directory / "manifest.json").read_text())["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _parquet(files: Sequence[Path]) -> Input:
    from mae_dist.shards.parquet import class_names, scan_parquet  # pyarrow takes a second to import

    jobs = list(enumerate(map(str, files)))
    return Input("parquet", "", [str(f.absolute()) for f in files], class_names(files[0]), scan_parquet, jobs)


def scan_flat(names: list[str]) -> Piece:
    return _files(names, -1)


def scan_folder(job: tuple[str, str, int]) -> Piece:
    """All images under a class folder, however deep. Raises UserError when there are none."""
    root, folder, label = job
    names = []
    for where, below, files in os.walk(Path(root, folder), followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        names += [Path(where, name) for name in files if is_image(name)]
    if not names:
        raise UserError(f"{root}/{folder}: a class folder without images; remove the folder or add its images")
    return _files([str(path.relative_to(root)) for path in sorted(names)], label)


def _files(names: list[str], label: int) -> Piece:
    n = len(names)
    return Piece(-1, names, np.tile(np.array([0, -1]), (n, 1)), np.full(n, label))


class Reader:
    """The bytes of images by (container, place). Keeps files open; each process makes its own."""

    def __init__(self, root: str, containers: Sequence[str]):
        self.root, self.containers = root, containers
        self._open = lru_cache(maxsize=OPEN_FILES)(partial(open, mode="rb", buffering=0))

    def read(self, container: int, origin: str, first: int, second: int) -> bytes:
        """Raises OSError when a file has vanished or became shorter, ValueError when a parquet row has no bytes."""
        if container < 0:
            return Path(self.root, origin).read_bytes()
        path = self.containers[container]
        if path.endswith(".parquet"):
            from mae_dist.shards.parquet import read_cell

            return read_cell(path, first, second)
        data = os.pread(self._open(path).fileno(), second, first)
        if len(data) < second:
            raise OSError(f"cut short: {len(data)} of {second} bytes")
        return data

    def where(self, container: int, origin: str) -> str:
        """Where an image lies, for a message about it."""
        return str(Path(self.root, origin)) if container < 0 else f"{self.containers[container]}: {origin}"
