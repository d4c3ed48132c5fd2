"""Image files in directories: every one found once, and nothing passed over without a count."""

import filecmp
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import numpy as np

from mae_dist.errors import OF_THE_FILE, UserError
from mae_dist.local import kind_of, naming
from mae_dist.shards.encoded import shows_image
from mae_dist.shards.notes import AGAIN, COPIES, DOTTED, HIDDEN, Notes, other_files
from mae_dist.shards.samples import hidden_part, is_image, split_name
from mae_dist.shards.splits import holds_splits, splits_among
from mae_dist.shards.tars import Piece

HEAD = 4096  # bytes
INDEX_RECORD = re.compile(r"\.index-[0-9a-f]{16}\.jsonl")  # what an `index` that did not end well goes on from


def list_directory(path: Path, notes: Notes) -> tuple[list[str], list[str]]:
    """Names of files and of directories in it, sorted; hidden ones are counted. Raises OSError."""
    files, folders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if INDEX_RECORD.fullmatch(entry.name):
                continue
            if hidden_part(entry.name):
                notes.add(HIDDEN, str(path / entry.name))
            else:
                (folders if is_directory(entry) else files).append(entry.name)
    return sorted(files), sorted(folders)


def is_directory(entry: os.DirEntry) -> bool:
    """Also a link that leads nowhere, in a circle, or where nobody may look, unless it is called as an image is."""
    with suppress(OSError):
        if not entry.is_symlink() or stat.S_ISDIR(entry.stat().st_mode):
            return entry.is_dir()
        return False
    return not is_image(entry.name)


def follow(path: Path, folders: Iterable[str]) -> None:
    """Raises UserError for a link among these class folders that leads nowhere: all behind it would be renumbered."""
    for name in folders:
        try:
            (path / name).stat()
        except OSError as error:
            said = f"a link to {(path / name).readlink()} that cannot be followed: {error.strerror}"
            raise UserError(f"{path / name}: {said}; mount what it leads to, or remove the link") from error


def only_files(files: Iterable[Path]) -> None:
    """Raises UserError for a name that leads to no file: a directory, a FIFO, nothing."""
    for file in files:
        if not os.path.lexists(file):
            raise UserError(f"{file}: no such directory or file; write the directory that holds the images")
        if not file.is_file():
            raise UserError(f"{file}: {kind_of(file)}, not a file")


def only_once(files: Iterable[Path], notes: Notes) -> None:
    """Raises UserError for a file that two of the names lead to: its images would be taken twice. Copies are noted."""
    seen: dict[tuple[int, int], Path] = {}
    alike: dict[tuple[int, bytes], list[Path]] = {}
    for file in files:
        with suppress(OSError):  # not there: others say it
            status = file.stat()
            if first := seen.get((status.st_dev, status.st_ino)):
                raise UserError(f"{first} and {file}: one and the same file; name each once")
            seen[status.st_dev, status.st_ino] = file
            head = begin_of(file) if stat.S_ISREG(status.st_mode) else b""
            if not head.strip(b"\0"):  # an empty tar
                continue
            others = alike.setdefault((status.st_size, head), [])
            if copy := next((other for other in others if filecmp.cmp(other, file, shallow=False)), None):
                notes.add(COPIES, f"{file}, as {copy}")
            others.append(file)


def begin_of(file: Path) -> bytes:
    """Its first bytes: those of a tar or parquet file are seldom another's. Raises OSError."""
    with file.open("rb") as opened:
        return opened.read(HEAD)


def takes(path: Path, all_suffixes: bool) -> bool:
    """Whether a file counts as an image: by its suffix, or (`all_suffixes`) by its first bytes.

    Raises OSError when the storage fails.
    """
    if is_image(path.name) or not all_suffixes:
        return is_image(path.name)
    try:
        with naming(path):
            return path.is_file() and shows_image(path.read_bytes())
    except OSError as error:
        if error.errno not in OF_THE_FILE:
            raise
        return False


def walk(folder: Path, notes: Notes, bad: list[str], seen: dict[tuple[int, int], str]) -> Iterator[tuple[Path, str]]:
    """(directory, name) of every file below `folder`, links to directories followed, each directory read once.

    `seen`: those read before, by device and inode; the others are added. What may not be listed goes to `bad`.
    Raises OSError when the storage fails.
    """
    todo = [folder]
    while todo:
        where = todo.pop()
        try:
            status = where.stat()
            identity = status.st_dev, status.st_ino
            if identity in seen:
                notes.add(AGAIN, str(where))
                continue
            files, below = list_directory(where, notes)
        except OSError as error:
            if error.errno not in OF_THE_FILE:
                raise
            bad.append(f"{where}: this directory cannot be read: {error.strerror}")
            continue
        seen[identity] = str(where)
        todo += [where / name for name in reversed(below)]
        yield from ((where, name) for name in files)


def has_images(folder: Path) -> bool:
    return any(is_image(name) for _, name in walk(folder, Notes(), [], {}))


def scan_flat(names: list[str]) -> Piece:
    return _files(names, -1, Notes())


def scan_folder(job: tuple[str, str, int], all_suffixes: bool = False) -> Piece:
    """All images under a class folder, however deep. Raises UserError when there are none."""
    root, folder, label = job
    notes, bad, names = Notes(), [], []
    top = Path(root).stat()
    above = {(top.st_dev, top.st_ino): root}
    seen = dict(above)
    for where, name in walk(Path(root, folder), notes, bad, seen):
        if takes(where / name, all_suffixes):
            names.append(os.path.relpath(where / name, root))
        else:
            notes.add(other_files(PurePosixPath(name).suffix[1:]), str(where / name))
    if not names and not bad:
        found = f" ({'; '.join(notes.lines())})" if notes else ""
        raise UserError(f"{root}/{folder}: a class folder without images{found}; remove the folder or add its images")
    below: dict[str, set[str]] = {}
    for where in {name.rpartition("/")[0] for name in names}:
        while "/" in where:
            where, _, name = where.rpartition("/")
            below.setdefault(where, set()).add(name)
    for where in sorted(below):
        splits, kinds = splits_among(sorted(below[where]))
        if kinds > 1:
            raise holds_splits(Path(root, where), splits)
    names.sort(key=lambda name: name.split("/"))
    piece = _files(names, label, notes)
    return piece._replace(bad=bad, folders={key: path for key, path in seen.items() if key not in above})


def _files(names: list[str], label: int, notes: Notes) -> Piece:
    """A piece of these files; those that lie beside `x.jpg` as `x.seg.png` does are noted, as they may be no images."""
    n = len(names)
    parts = [(key, suffix) for key, suffix in map(split_name, names) if "." in suffix]
    if parts:
        whole = {key for key, suffix in map(split_name, names) if "." not in suffix}
        for key, suffix in parts:
            if key in whole:
                notes.add(DOTTED, f"{key}.{suffix}")
    return Piece(-1, names, np.tile(np.array([0, -1]), (n, 1)), np.full(n, label), notes=notes)
