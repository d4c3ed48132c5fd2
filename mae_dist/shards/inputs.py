"""Where images come from: what IMAGES is, and the name, place and label of every image in it, in a fixed order.

Class folders, one flat directory, ILSVRC's tars as downloaded, webdataset tars, parquet files as on Hugging Face. What
lies in tars and parquet files is addressed there (file, offset, length; file, row group, row), never unpacked to disk.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mae_dist.errors import UserError, unreadable
from mae_dist.local import regular
from mae_dist.shards.folders import (
    follow,
    has_images,
    list_directory,
    only_files,
    only_once,
    scan_flat,
    scan_folder,
    takes,
)
from mae_dist.shards.manifest import FILE_NAME, check_listing
from mae_dist.shards.notes import Notes, other_files
from mae_dist.shards.patterns import local_files
from mae_dist.shards.samples import SUFFIXES, is_image
from mae_dist.shards.splits import all_parts, holds_splits, one_split, splits_among
from mae_dist.shards.tars import Piece, find_ranges, scan_tar

OPEN_FILES = 256  # tars kept open by a process; a shard may draw from all of them
BESIDE_DATA = "folders beside data/"
COMPRESSED_TAR = re.compile(r".*\.(tar\.\w+|tgz|tbz2?|txz|tzst)", re.IGNORECASE)
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
    notes: Notes = field(default_factory=Notes)
    """What is left out already."""

    def pieces(self, mapper: Mapper = map) -> Iterator[Piece]:
        """All images. Raises UserError as the jobs do, and for a directory that two of them lead to."""
        seen: dict[tuple[int, int], str] = {}
        for piece in mapper(self.scan, self.jobs):
            for identity, folder in piece.folders.items():
                if first := seen.get(identity):
                    raise UserError(
                        f"{self.root}: {first} and {folder} are one directory (a link leads there), and its images "
                        "would be taken twice; remove the link"
                    )
            seen |= piece.folders
            yield piece


def recognise(
    images: str,
    has_labels: bool = False,
    all_suffixes: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Input:
    """What `images` is: a directory, a tar, a parquet file, or a glob pattern of tars or parquet files.

    `all_suffixes`: files that begin as an image does are images, whatever they are called. `image_column`,
    `label_column`: of parquet files; None: `image` and `label`. Raises UserError when there are no images, when layouts
    are mixed, or when a directory holds several splits.
    """
    path = Path(images)
    try:
        found = _directory(path, all_suffixes) if path.is_dir() else _files_of(images, all_suffixes)
    except OSError as error:
        raise unreadable(error, f"{error.filename or images}: cannot be read: {error.strerror}") from error
    if has_labels and (found.kind != "flat" or len(found.containers) > 1):
        raise UserError(f"--labels is for one flat directory or one tar of images, and {images} is neither")
    if found.kind != "parquet" and (image_column or label_column):
        raise UserError(f"--image-column and --label-column are for parquet files, and {images} is {found.kind}")
    return found if found.kind != "parquet" else _with_columns(found, image_column, label_column)


def _files_of(images: str, all_suffixes: bool) -> Input:
    files = [Path(name) for name in local_files(images)]
    only_files(files)
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"}:
        return _tars(files, Notes(), all_suffixes)
    if kinds == {".parquet"}:
        return _parquet(files, Notes())
    raise UserError(f"{images}: not a directory, not .tar and not .parquet; compressed tars must be unpacked")


def _directory(path: Path, all_suffixes: bool) -> Input:
    notes = Notes()
    files, folders = list_directory(path, notes)
    follow(path, folders)
    tars = [name for name in files if name.lower().endswith(".tar")]
    described = {Path(name).stem for name in tars} | set(folders)  # img2dataset writes a parquet of notes for each
    parquet = [name for name in files if name.lower().endswith(".parquet") and Path(name).stem not in described]
    held = {*tars, *parquet}
    rest = [name for name in files if name not in held]
    if packed := next((name for name in rest if tars and COMPRESSED_TAR.fullmatch(name)), None):
        raise UserError(
            f"{path / packed}: compressed (or renamed), and cannot be read in place; unpack it, or move it away"
        )
    flat = [name for name in rest if takes(path / name, all_suffixes)]
    for name in sorted({*rest} - {*flat}):
        notes.add(other_files(Path(name).suffix[1:]), str(path / name))
    if not flat and not held and "data" in folders and holds_parquet(path / "data"):
        below = _directory(path / "data", all_suffixes)  # how Hugging Face lays out a repository
        for name in folders:
            if name != "data":
                notes.add(BESIDE_DATA, str(path / name))
        below.notes.update_from(notes)
        return below
    if parquet or tars:
        if flat or folders or (parquet and tars):
            raise UserError(
                f"{path}: images, folders, tars or parquet files side by side; write a pattern such as '{path}/*.tar'"
            )
        found = [path / name for name in parquet or tars]
        only_files(found)
        one_split(path, found)
        all_parts(path, found)
        return _parquet(found, notes) if parquet else _tars(found, notes, all_suffixes)
    if flat and folders:
        raise UserError(
            f"{path}: {len(flat)} images beside {len(folders)} folders (such as {folders[0]}/); "
            "use class folders only, or one flat directory"
        )
    if flat:
        return Input("flat", str(path), [], [], scan_flat, [flat], notes)
    if folders:
        splits, kinds = splits_among(folders)  # which would become classes, and one alone may be one
        if kinds > 1 or (kinds and not any(has_images(path / name) for name in folders if name not in splits)):
            raise holds_splits(path, splits)
        numbered = of_img2dataset(path, folders, files)
        kind, classes = ("img2dataset's folders", []) if numbered else ("class folders", folders)
        jobs = [(str(path), name, -1 if numbered else label) for label, name in enumerate(folders)]
        return Input(kind, str(path), [], classes, partial(scan_folder, all_suffixes=all_suffixes), jobs, notes)
    seen = f" ({'; '.join(notes.lines())})" if notes else ""
    looked = f"looked for {', '.join(f'.{suffix}' for suffix in SUFFIXES)}, class folders, .tar, .parquet"
    raise UserError(f"{path}: no images here{seen}; {looked}")


def holds_parquet(folder: Path) -> bool:
    return any(name.lower().endswith(".parquet") for name in list_directory(folder, Notes())[0])


def of_img2dataset(path: Path, folders: Sequence[str], files: Sequence[str]) -> bool:
    """Whether the folders are img2dataset's, which are numbered as they come and no classes.

    Beside them, or beside each image, lie its notes. Raises UserError when only some of the folders are.
    """
    notes = {name.removesuffix("_stats.json").removesuffix(".parquet") for name in files}
    numbered = [name for name in folders if re.fullmatch(r"\d{5,}", name)]
    if not numbered or not (numbered[0] in notes or has_notes(path / numbered[0])):
        return False
    if others := sorted(set(folders) - set(numbered)):
        raise UserError(f"{path}: {numbered[0]}/ is img2dataset's, and {others[0]}/ beside it is not; move one of them")
    return True


def has_notes(folder: Path) -> bool:
    """Whether an image in it has a `.json` beside it."""
    names = set(list_directory(folder, Notes())[0])
    return any(f"{Path(name).stem}.json" in names for name in names if is_image(name))


def _tars(files: Sequence[Path], notes: Notes, all_suffixes: bool) -> Input:
    only_once(files, notes)
    ranges, classes, inside = find_ranges(files)
    notes.update_from(inside)
    kind = "class tars" if classes else "flat" if len(files) == 1 else "tars"
    if not classes and files:
        named = [(folder, _classes_beside(folder)) for folder in dict.fromkeys(file.parent for file in files)]
        classes = named[0][1]
        if other := next((folder for folder, names in named if names != classes), None):
            raise UserError(f"{named[0][0]} and {other}: their classes are numbered differently; shard one at a time")
    containers = [str(path.absolute()) for path in files]
    return Input(kind, "", containers, classes, partial(scan_tar, all_suffixes=all_suffixes), ranges, notes)


def _classes_beside(directory: Path) -> list[str]:
    """Class names of shards that mae-dist wrote; none in a manifest.json of somebody else."""
    try:
        listing = json.loads((directory / FILE_NAME).read_text())
        check_listing(listing)
        return listing["classes"]
    except (OSError, ValueError, RecursionError):
        return []


def _parquet(files: Sequence[Path], notes: Notes) -> Input:
    from mae_dist.shards.parquet import scan_parquet  # pyarrow takes a second to import

    only_once(files, notes)
    jobs = list(enumerate(map(str, files)))
    return Input("parquet", "", [str(file.absolute()) for file in files], [], scan_parquet, jobs, notes)


def _with_columns(found: Input, image: str | None, label: str | None) -> Input:
    """Raises UserError where it is in doubt which columns are meant."""
    from mae_dist.shards.parquet import find_columns, scan_parquet

    columns = find_columns(found.containers, image, label, found.notes)
    return replace(found, classes=columns.classes, scan=partial(scan_parquet, columns=columns))


class Reader:
    """The bytes of images by (container, place). Keeps files open; each process makes its own."""

    def __init__(self, root: str, containers: Sequence[str], image_column: str | None = None):
        self.root, self.containers, self.image_column = root, containers, image_column
        self._open = lru_cache(maxsize=OPEN_FILES)(partial(open, mode="rb", buffering=0))

    def read(self, container: int, origin: str, first: int, second: int) -> bytes:
        """Raises OSError when a file has vanished or became shorter, ValueError for a FIFO, socket or device, and when
        a parquet row has no bytes.
        """
        if container < 0:
            return regular(Path(self.root, origin)).read_bytes()
        path = self.containers[container]
        if path.lower().endswith(".parquet"):
            from mae_dist.shards.parquet import read_cell

            return read_cell(path, first, second, self.image_column)
        data = os.pread(self._open(path).fileno(), second, first)
        if len(data) < second:
            raise OSError(f"cut short: {len(data)} of {second} bytes")
        return data

    def has_neighbours(self, container: int, origin: str) -> bool:
        """Whether anything is left where an image that cannot be opened lay: its tar, or files in its directory."""
        try:
            if container >= 0:
                return bool(os.stat(self.containers[container]))  # noqa: PTH116
            with os.scandir(Path(self.root, origin).parent) as entries:
                return any(entries)
        except OSError:
            return False

    def where(self, container: int, origin: str) -> str:
        """Where an image lies, for a message about it."""
        return str(Path(self.root, origin)) if container < 0 else f"{self.containers[container]}: {origin}"
