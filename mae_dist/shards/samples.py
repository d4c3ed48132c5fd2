"""Which files are images, and which belong together: one rule for `shard`, `index`, `verify` and training.

It is webdataset's: the key ends at the first dot of a file's name, and files of one key are one sample. Where a sample
has no plain `KEY.jpg` and nothing else that is plainly its own, the dots are taken for part of the names.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath
from typing import NamedTuple

from mae_dist.shards.labels import decide, said_in
from mae_dist.shards.notes import DOTTED, HIDDEN, NO_SUFFIX, WITHOUT_IMAGE, Notes, beside_image, suffix_kind
from mae_dist.shards.tar import LABELS, BadTar, Member

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")  # of two in one sample, the first counts
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
OTHER_IMAGES = ("gif", "avif", "jfif", "jpe", "jp2", "j2k", "jxl", "heic", "heif", "tga", "ico", "svg", "psd", "exr")
META = re.compile(r"__[^/]*__(/|$)")  # webdataset passes over these too


class File(NamedTuple):
    """One file of a sample."""

    member: Member
    is_image: bool


@dataclass(frozen=True)
class Sample:
    """What readers make of the files of one key; `image` is None when none of them is one, or it has a `fault`."""

    key: str
    image: Member | None
    label: int = -1
    """-1: none."""
    fault: str = ""
    """What is wrong with it, and with which file."""


def is_image(name: str) -> bool:
    """By its suffix, whatever that says about the bytes."""
    return PurePosixPath(name).suffix[1:].lower() in SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a path is what systems and tools leave lying about: `._x.jpg`, `.DS_Store`, `__MACOSX/`."""
    return bool(hidden_part(name) or META.match(name))


def hidden_part(name: str) -> str:
    return next((p for p in name.split("/") if (p.startswith(".") and p.strip(".")) or p in SYSTEM_FOLDERS), "")


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix, the latter in lower case; empty for a name without a dot."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def last_suffix(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def add_file(files: dict[str, File], member: Member, image: bool) -> None:
    """Into the sample of its key. Raises BadTar when it is there already."""
    suffix = split_name(member.name)[1]
    if suffix in files:
        raise BadTar(f"holds {member.name.removeprefix('./')!r} twice")
    files[suffix] = File(member, image)


def samples(archive: Iterable[Member], notes: Notes | None = None) -> Iterator[Sample]:
    """The samples of a tar as readers see them, who take a sample for ended when another key comes.

    `notes` gets what is not used. Raises BadTar for a key that comes back, a file that comes twice, and a sample with
    a fault.
    """
    notes = Notes() if notes is None else notes

    def visible() -> Iterator[Member]:
        for member in archive:
            if is_hidden(member.name.removeprefix("./")):
                notes.add(HIDDEN, member.name)
            elif member.name.lower().endswith(".tar"):
                raise BadTar(f"holds tars (such as {member.name}); mae-dist shard reads those")
            elif not split_name(member.name)[1]:
                notes.add(f"{WITHOUT_IMAGE} ({NO_SUFFIX})", member.name)  # readers pass over it
            else:
                yield member

    def groups() -> Iterator[tuple[str, dict[str, File]]]:
        seen: set[str] = set()
        for key, group in groupby(visible(), key=lambda member: split_name(member.name)[0]):
            files: dict[str, File] = {}
            for member in group:
                add_file(files, member, is_image(member.name))
            if key in seen:
                raise BadTar(f"the files of key {key!r} do not lie together: readers see several samples")
            seen.add(key)
            yield key, files

    for sample in samples_of(groups(), notes):
        if sample.fault:
            raise BadTar(sample.fault)
        yield sample


def samples_of(groups: Iterable[tuple[str, dict[str, File]]], notes: Notes, label: int = -1) -> Iterator[Sample]:
    """What to make of files by key and suffix. `label`: of all that `.cls` gives no other; -1: `.json` may say one.

    Of a sample with a plain `KEY.jpg` that is the image, and others are parts of it, such as masks (`KEY.seg.png`).
    One with plain files that are no image lacks its image. Else the names have dots in them: each image file is one,
    after all others; but not where its suffix is that of a part elsewhere, nor where words tell several apart.
    """
    parts: set[str] = set()
    later: list[tuple[str, dict[str, File]]] = []
    for key, files in groups:
        images = [suffix for suffix, file in files.items() if file.is_image]
        plain = sorted((suffix for suffix in images if "." not in suffix), key=rank)
        if plain:
            parts.update(suffix for suffix in images if is_word(suffix))
            yield made(key, plain[0], files, notes, label)
        elif images and all("." in suffix for suffix in files):
            later.append((key, files))
        else:
            yield without_image(key, files, notes)
    for key, files in later:
        images = [suffix for suffix, file in files.items() if file.is_image and suffix not in parts]
        middles = dict.fromkeys(suffix.rpartition(".")[0] for suffix in images)
        if not images:
            yield without_image(key, files, notes)
        elif len(middles) > 1 and any(map(is_word, images)):
            several = ", ".join(f".{suffix}" for suffix in images[:3])
            yield Sample(key, None, fault=f"several images of the key {key!r} ({several}); call one {key}.jpg")
        else:
            for middle in middles:
                own = {last_suffix(s): file for s, file in files.items() if s.rpartition(".")[0] == middle}
                image = min((suffix for suffix, file in own.items() if file.is_image), key=rank)
                notes.add(DOTTED, own[image].member.name)
                yield made(f"{key}.{middle}", image, own, notes, label)
            for suffix, file in files.items():
                if suffix.rpartition(".")[0] not in middles:
                    notes.add(beside_image(suffix), file.member.name)


def made(key: str, suffix: str, files: Mapping[str, File], notes: Notes, label: int) -> Sample:
    """The sample whose image has this suffix; other images in it are counted."""
    labels = [s[1:] for s in LABELS if s[1:] in files and (label < 0 or s != ".json")]
    for name in (suffix, *labels):
        if fault := files[name].member.fault:
            return Sample(key, None, fault=f"{files[name].member.name!r} is {fault}")
    for name, file in files.items():
        if name != suffix and (file.is_image or last_suffix(name) in OTHER_IMAGES):
            notes.add(beside_image(name), file.member.name)
    said = [value for name in labels for value in said_in(name, files[name].member.data or b"")]
    own = decide(said, key, notes) if said or label < 0 else -1
    return Sample(key, files[suffix].member, own if own >= 0 else label)


def without_image(key: str, files: Mapping[str, File], notes: Notes) -> Sample:
    kind = "+".join(sorted(map(suffix_kind, files)))
    notes.add(f"{WITHOUT_IMAGE} ({kind})", next(iter(files.values())).member.name)
    return Sample(key, None)


def rank(suffix: str) -> int:
    return SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES)


def is_word(suffix: str) -> bool:
    """Whether the part before the last dot names a thing (`seg.png`), and is no number (`0001.jpg`, `5x.jpg`)."""
    return "." in suffix and not re.search(r"\d", suffix.rpartition(".")[0])
