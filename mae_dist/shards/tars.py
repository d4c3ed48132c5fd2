"""Images inside tars that somebody else made: where each lies, so that it can be read without unpacking anything."""

import re
import tarfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae_dist.errors import UserError
from mae_dist.shards.labels import decide, said_in
from mae_dist.shards.notes import Notes

WNID_TAR = re.compile(r"n\d{8}\.tar")  # ILSVRC's class tars, once taken out of the train tar
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}


class Piece(NamedTuple):
    """Some images of an input, in their fixed order."""

    container: int
    """Which of the input's files they lie in; -1: each is a file of its own."""
    origins: list[str]
    """Their names: a path under the input's root, or a member of a tar."""
    places: NDArray[np.int64]
    """(n, 2): offset and length in a tar; row group and row in a parquet file; (0, -1) for a whole file."""
    labels: NDArray[np.int64]
    """(n,), -1: none."""
    bad: tuple[str, ...] = ()
    notes: Notes = Notes()
    """What of it is not used."""


class TarRange(NamedTuple):
    """A tar, or one that lies inside another: ILSVRC's train tar holds a tar a class."""

    container: int
    path: str
    start: int
    end: int
    label: int
    folder: str
    """Put before the members' names, as if they had been unpacked into a class folder."""


def is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def find_ranges(files: Sequence[Path]) -> tuple[list[TarRange], list[str]]:
    """What to scan, and the class names: those of class tars, in sorted order. Raises UserError for what is no tar."""
    whole = [TarRange(i, str(path), 0, path.stat().st_size, -1, "") for i, path in enumerate(files)]
    if all(WNID_TAR.fullmatch(path.name) for path in files):
        names = sorted(path.stem for path in files)
        return [r._replace(label=names.index(Path(r.path).stem), folder=Path(r.path).stem) for r in whole], names
    if len(files) > 1:
        return whole, []
    try:
        with tarfile.open(files[0], "r:") as tar:
            first = tar.next()
            if first is None or not first.name.endswith(".tar"):
                return whole, []
            members = sorted((m for m in tar if m.name.endswith(".tar")), key=lambda m: m.name)
            end_mark(tar, files[0])
    except tarfile.TarError as error:
        raise UserError(f"{files[0]}: {error}; download it again (a compressed tar must be unpacked first)") from error
    names = [PurePosixPath(m.name).stem for m in members]
    ranges = [
        TarRange(0, str(files[0]), m.offset_data, m.offset_data + m.size, label, name)
        for label, (m, name) in enumerate(zip(members, names, strict=True))
    ]
    return ranges, names


def end_mark(tar: tarfile.TarFile, path: str | Path) -> None:
    """Raises TarError when a tar just stops: `tarfile` takes one that is cut at a header for a shorter one."""
    assert tar.fileobj
    tar.fileobj.seek(tar.offset)  # type: ignore[attr-defined]
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"cut short or damaged at byte {tar.offset}, no end-of-archive mark")  # type: ignore[attr-defined]


def scan_tar(where: TarRange) -> Piece:
    """The images of one tar, by name; labels as `mae-dist index` finds them (`decide`), or the range's own.

    A tar that is cut short gives the images before the cut and one bad entry. Raises UserError for two images of one
    name.
    """
    found: list[tuple[str, int, int]] = []
    said: dict[str, dict[str, list]] = {"cls": {}, "json": {}}
    inside = f"{where.path}: {where.folder}.tar" if where.folder else where.path
    bad: tuple[str, ...] = ()
    with open(where.path, "rb") as file:  # noqa: PTH123
        file.seek(where.start)
        try:
            # Reads from where the file stands and counts offsets from the file's start: what a tar in a tar needs.
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset >= where.end:
                        raise tarfile.ReadError(f"cut short before byte {where.end}")
                    if member.isfile() and is_image(member.name):
                        if member.offset_data + member.size > where.end:
                            raise tarfile.ReadError(f"cut short inside {member.name}")
                        found.append((member.name.removeprefix("./"), member.offset_data, member.size))
                    elif (kind := label_kind(member.name, where)) and (content := tar.extractfile(member)):
                        said[kind][sample_key(member.name)] = said_in(kind, content.read())
                    tar.members = []  # type: ignore[attr-defined]  # tarfile would remember them all
                end_mark(tar, where.path)
        except tarfile.TarError as error:
            bad = (f"{inside}: {error}",)
    found.sort()
    folder = f"{where.folder}/" if where.folder else ""
    names = [name for name, _, _ in found]
    if twice := next((a for a, b in pairwise(names) if a == b), None):
        raise UserError(
            f"{inside}: holds {twice!r} twice; write the tar again with one of them, or unpack it (the last one stays) "
            "and give the directory"
        )
    notes = Notes()

    def label(key: str) -> int:
        values = [value for kind in said.values() for value in kind.get(key, ())]
        own = decide(values, f"{inside}: {key}", notes) if values or where.label < 0 else -1
        return own if own >= 0 else where.label

    places = np.array([place for _, *place in found], dtype=np.int64).reshape(-1, 2)
    numbers = np.array([label(sample_key(name)) for name in names], np.int64)
    return Piece(where.container, [folder + name for name in names], places, numbers, bad, notes)


def sample_key(name: str) -> str:
    """What webdataset groups members by: the path up to the first dot of the file's name."""
    path = PurePosixPath(name.removeprefix("./"))
    return str(path.parent / path.name.split(".")[0])


def label_kind(name: str, where: TarRange) -> str:
    """`cls` or `json` for a member that may say a label; empty for others."""
    if name.lower().endswith(".cls"):
        return "cls"
    # Only `KEY.json`, as index: `KEY.boxes.json` is about something else. A class tar's name is the better label.
    return "json" if where.label < 0 and PurePosixPath(name).name.partition(".")[2].lower() == "json" else ""
