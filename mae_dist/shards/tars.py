"""Images inside tars that somebody else made: where each lies, so that it can be read without unpacking anything."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mae_dist.errors import UserError
from mae_dist.shards.encoded import shows_image
from mae_dist.shards.notes import HIDDEN, IN_FOLDERS, Notes, other_files
from mae_dist.shards.samples import (
    SUFFIXES,
    File,
    add_file,
    is_hidden,
    samples_of,
    split_name,
)
from mae_dist.shards.samples import is_image as has_image_suffix
from mae_dist.shards.tar import LABELS, BadTar, Member, Section, members

NUMBER = re.compile(r"\d+")
WNID_TAR = re.compile(r"n\d{8}\.tar")  # ILSVRC's class tars, once taken out of the train tar


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
    bad: Sequence[str] = ()
    """What could not be looked at or used, each with the reason."""
    notes: Notes = Notes()
    """What of it is not used."""
    folders: dict[tuple[int, int], str] = {}  # noqa: RUF012
    """The directories that were read, by device and inode."""


class TarRange(NamedTuple):
    """A tar, or one that lies inside another: ILSVRC's train tar holds a tar a class."""

    container: int
    path: str
    start: int
    end: int
    label: int
    folder: str
    """Put before the members' names, as if they had been unpacked into a class folder."""

    @property
    def name(self) -> str:
        """For a message."""
        return f"{self.path}: {self.folder}.tar" if self.folder and self.start else self.path


def find_ranges(files: Sequence[Path]) -> tuple[list[TarRange], list[str], Notes]:
    """What to scan, and the class names: those of class tars, in sorted order; and what is hidden beside those.

    Raises UserError for what is no tar, and for tars beside images or beside tars of another kind.
    """
    whole = [TarRange(i, str(path), 0, path.stat().st_size, -1, "") for i, path in enumerate(files)]
    if by_class := next((path for path in files if WNID_TAR.fullmatch(path.name)), None):
        if other := next((path for path in files if not WNID_TAR.fullmatch(path.name)), None):
            raise UserError(f"{other}: lies beside class tars such as {by_class.name}; move it, or write a pattern")
        label = {name: i for i, name in enumerate(sorted({path.stem for path in files}))}
        stems = [path.stem for path in files]
        return [r._replace(label=label[s], folder=s) for r, s in zip(whole, stems, strict=True)], list(label), Notes()
    return (whole, [], Notes()) if len(files) > 1 else _inside(whole[0])


def _inside(outer: TarRange) -> tuple[list[TarRange], list[str], Notes]:
    """The class tars of one tar, or itself when an image comes before any tar."""
    notes, found = Notes(), {}
    with open(outer.path, "rb") as file:  # noqa: PTH123
        try:
            for member in members(Section(file.fileno(), 0, outer.end), lambda name: False):
                name = member.name.removeprefix("./")
                if is_hidden(name):
                    notes.add(HIDDEN, name)
                elif has_image_suffix(name):
                    if found:
                        raise beside(outer, name)
                    return [outer], [], Notes()
                elif name.lower().endswith(".tar"):
                    stem = PurePosixPath(name).stem
                    if member.fault or stem in found:
                        why = f"is {member.fault}" if member.fault else "has the name of another class tar in it"
                        raise UserError(f"{outer.path}: {name} {why}; unpack it and give the directory")
                    found[stem] = member
                else:
                    notes.add(other_files(PurePosixPath(name).suffix[1:]), name)
        except BadTar as error:
            if found:  # else scan_tar finds the same
                raise UserError(f"{outer.path}: {error}; download it again") from error
    if not found:
        return [outer], [], Notes()
    kinds = {NUMBER.sub("#", stem) for stem in found}
    if len(kinds) == 1 and "#" in "".join(kinds) and kinds != {"n#"}:
        two = " and ".join(sorted(found)[:2])
        raise UserError(f"{outer.path}: {two}: parts of one set by their names, not classes; unpack it and give those")
    names = sorted(found)
    ranges = [
        TarRange(0, outer.path, found[name].offset, found[name].offset + found[name].size, label, name)
        for label, name in enumerate(names)
    ]
    return ranges, names, notes


def beside(where: TarRange, name: str) -> UserError:
    return UserError(f"{where.name}: holds images beside tars (such as {name}); unpack it and give one kind of them")


def scan_tar(where: TarRange, all_suffixes: bool = False) -> Piece:
    """The images of one tar, by name; labels as `mae-dist index` finds them, or the range's own.

    A tar that is cut short or damaged gives the images before that and one bad entry; so does each sample that cannot
    be used. `all_suffixes`: take what begins as an image does, whatever it is called. Raises UserError for tars inside.
    """
    groups: dict[str, dict[str, File]] = {}
    notes, bad, found = Notes(), [], []

    def wanted(name: str) -> bool:
        return name.lower().endswith(LABELS) or (all_suffixes and not has_image_suffix(name))

    with open(where.path, "rb") as file:  # noqa: PTH123
        try:
            for member in members(Section(file.fileno(), where.start, where.end), wanted):
                _take(member._replace(name=member.name.removeprefix("./")), where, groups, notes, bad, all_suffixes)
        except BadTar as error:
            bad.append(f"{where.name}: {error}" + ("; what lies behind that is not read" if groups else ""))
    for sample in samples_of(sorted(groups.items()), notes, where.label):
        if sample.fault:
            bad.append(f"{where.name}: {sample.fault}")
        elif image := sample.image:
            found.append((image.name, where.start + image.offset, image.size, sample.label))
    if not found and not bad:
        bad.append(f"{where.name}: holds no images ({', '.join(SUFFIXES)})")
    found.sort()
    if len({name.rpartition("/")[0] for name, *_, label in found if label < 0}) > 1:
        notes.add(IN_FOLDERS, where.name)
    folder = f"{where.folder}/" if where.folder else ""
    rows = np.array([row for _, *row in found], dtype=np.int64).reshape(-1, 3)
    return Piece(where.container, [folder + name for name, *_ in found], rows[:, :2], rows[:, 2], bad, notes)


def _take(
    member: Member, where: TarRange, groups: dict[str, dict[str, File]], notes: Notes, bad: list[str], look: bool
) -> None:
    """One file of a tar into the sample of its key."""
    if is_hidden(member.name):
        notes.add(HIDDEN, member.name)
        return
    if member.name.lower().endswith(".tar"):
        raise beside(where, member.name)
    if where.label >= 0 and member.name.lower().endswith(".cls"):
        raise UserError(
            f"{where.name}: {member.name} says a label, and the name of a class tar another; unpack the tars, and give "
            "the directory of their folders"
        )
    is_label = member.name.lower().endswith(LABELS)
    image = has_image_suffix(member.name) or (look and not is_label and shows_image(member.data or b""))
    files = groups.setdefault(split_name(member.name)[0], {})
    try:
        add_file(files, member if is_label else member._replace(data=None), image)
    except BadTar as error:
        bad.append(f"{where.name}: {error}")
