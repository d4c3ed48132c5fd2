"""A file of labels (`--labels`): each image has one line of it and each line one image, or the line is named."""

import codecs
import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mae_dist.errors import UserError
from mae_dist.shards.labels import as_label, is_missing
from mae_dist.shards.samples import is_image

QUOTED = r'"(?:[^"]|"")*"|\'[^\']*\''
PAIR = re.compile(rf"\s*({QUOTED}|.*?)\s+({QUOTED}|\S+)\s*")
HEADER = re.compile(r"label|class|target|categor|wnid|synset|^y$", re.IGNORECASE)

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SHOWN = 3  # names in a message


def read_labels(path: Path, names: Sequence[str], images: str = "") -> tuple[NDArray[np.int64], list[str]]:
    """Labels (N,) of the images `names` (paths below `images`), and the class names: none for labels in numbers.

    A line is `LABEL`, for the images in the order of their names, or `NAME LABEL` with blanks, a tab or a comma between
    (CSV, with a header or without); UTF-8, or UTF-16 with its mark. NAME is a path, or a file name that one image alone
    has. A label is a number from 0, or a class name such as a wnid; names are numbered in sorted order, as folders are
    (and as torchvision and timm do). ILSVRC2012_validation_ground_truth.txt of the devkit is refused: its ids count
    from 1 in an order of its own. Raises UserError for that, and, naming the line, for all that does not fit exactly.
    """
    find = Finder(names, images)
    try:
        lines = _parse(_decoded(path.read_bytes()), find)
        labelled = (
            _in_order_of_names(lines, names) if all(len(fields) == 1 for _, fields in lines) else _by_name(lines, find)
        )
        return _numbered(labelled)
    except OSError as error:
        raise UserError(f"--labels {path}: {error.strerror or error}") from error
    except _Misfit as error:
        raise UserError(f"--labels {path}: {error}") from None


class _Misfit(Exception):
    """What is wrong with a labels file."""


Lines = list[tuple[int, list[str]]]
"""Line numbers, from 1, and the fields of each line."""


class Finder:
    """The image that a name in a labels file means, among `names`: paths below the directory or tar `images`."""

    def __init__(self, names: Sequence[str], images: str):
        self.names, self.by_path = names, {name: i for i, name in enumerate(names)}
        self.by_file: dict[str, int] = {}  # -1: several
        for i, name in enumerate(names):
            file = name.rpartition("/")[2]
            self.by_file[file] = -1 if file in self.by_file else i
        parts = Path(images.removesuffix(".tar")).parts
        self.above = ["/".join(parts[i:]).replace("//", "/") + "/" for i in range(len(parts))]

    def __call__(self, name: str) -> int | None:
        """Its place; None when there is no such image. -1: several have this file name."""
        name = name.removeprefix("./")
        if name in self.by_path or "/" not in name:
            return self.by_path.get(name, self.by_file.get(name))
        below = (name.removeprefix(above) for above in self.above if name.startswith(above))
        return next((self.by_path[path] for path in below if path in self.by_path), None)


def _decoded(content: bytes) -> str:
    """Text of any of the encodings that say what they are; names that are not UTF-8 as the file system has them."""
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise _Misfit(f"begins as {encoding}, and is none ({error.reason}); save it as UTF-8") from None
    if "\0" in text:
        raise _Misfit("is no text, or UTF-16 without a mark; save it as UTF-8")
    return text


def _parse(text: str, find: Finder) -> Lines:
    """The lines as the separator cuts them with which most of them begin with an image's name."""
    rows = [
        (n, line)
        for n, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
        if line.strip()
    ]
    ways = [
        [(n, _words(line)) for n, line in rows],
        *([(n, _csv(line, separator)) for n, line in rows] for separator in "\t,;"),
    ]
    hits = [sum(len(fields) > 1 and find(fields[0]) is not None for _, fields in way) for way in ways]
    single = [all(len(fields) == 1 for _, fields in way) for way in ways]
    if not any(hits) and not all(single):
        return ways[single.index(False)]
    return ways[hits.index(max(hits))]


def _words(line: str) -> list[str]:
    """NAME LABEL, NAME with blanks in it or in quotes; or the one word or quoted text that there is."""
    pair = None if re.fullmatch(QUOTED, line.strip()) else PAIR.fullmatch(line.strip())
    return [_unquoted(field) for field in (pair.groups() if pair else (line.strip(),))]


def _unquoted(field: str) -> str:
    quoted = len(field) > 1 and field[0] == field[-1] and field[0] in "\"'"
    return field[1:-1].replace('""', '"') if quoted else field


def _csv(line: str, separator: str) -> list[str]:
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]
    except csv.Error:  # a field of more than 128 kB
        return [line]


def _in_order_of_names(lines: Lines, names: Sequence[str]) -> Lines:
    """The lines again, if there is one for each name and no doubt about the names' order."""
    if len(lines) != len(names):
        raise _Misfit(f"{len(lines)} lines for {len(names)} images; write one LABEL, or NAME LABEL, for each")
    if HEADER.fullmatch(lines[0][1][0]) and lines[0][1] not in [fields for _, fields in lines[1:]]:
        raise _Misfit(f"line {lines[0][0]}: {lines[0][1][0]!r} is no number or class, but a header; remove it")
    alike: dict[str, list[list[int]]] = {}  # the numbers in names that differ by them, and by the suffix
    for name in names:
        stem = name.rpartition(".")[0]
        alike.setdefault(re.sub(r"\d+", "0", stem), []).append([*map(int, re.findall(r"\d+", stem))])
    if any(numbers != sorted(numbers) for numbers in alike.values()):
        raise _Misfit(
            f"one LABEL a line is for names in sorted order, and {names[0]}, {names[1]}, ... are not in the order "
            "of their numbers; write NAME LABEL on each line"
        )
    suspect = next(((n, fields[0]) for n, fields in lines if is_image(re.split(r"[^\w.-]", fields[0])[0])), None)
    if suspect:
        raise _Misfit(f"line {suspect[0]}: {suspect[1]!r} is a name, not a label; write NAME LABEL")
    return lines


def _by_name(lines: Lines, find: Finder) -> Lines:
    """(line number, [label]) of each image, in their order."""
    first = lines[0][1]
    if len(first) == 2 and find(first[0]) is None and not Path(first[0]).suffix and HEADER.search(first[1]):
        lines = lines[1:]
    found: dict[int, tuple[int, list[str]]] = {}
    for n, fields in lines:
        name = fields[0]
        if len(fields) == 1 or not fields[1]:
            raise _Misfit(f"line {n}: {name!r} has no label; write NAME LABEL")
        if len(fields) > 2:
            raise _Misfit(f"line {n}: {len(fields)} columns; leave NAME and LABEL")
        image = find(name)
        if image is None:
            raise _Misfit(
                f"line {n}: no image is called {name!r}; they are called {', '.join(find.names[:SHOWN])}, ..."
            )
        if image < 0:
            raise _Misfit(f"line {n}: several images are called {name!r}; write their paths, such as {find.names[0]}")
        if image in found:
            raise _Misfit(f"line {n}: {name!r} has a label on line {found[image][0]} already; leave one")
        found[image] = (n, fields[1:])
    missing = [name for i, name in enumerate(find.names) if i not in found]
    if missing:
        raise _Misfit(f"no line for {missing[0]} (nor for {len(missing) - 1} more)")
    return [found[i] for i in range(len(found))]


def _numbered(labelled: Lines) -> tuple[NDArray[np.int64], list[str]]:
    """Numbers as they are; names by their sorted order."""
    labels = [as_label(word) for _, (word,) in labelled]
    if None not in labels:
        numbers = np.array(labels, dtype=np.int64)
        if numbers.min() > 0:
            raise _Misfit(
                f"numbers from {numbers.min()}, but labels count from 0; the devkit's ground truth has ids in an order "
                "of its own: write the wnid of each image instead (imagenet_2012_validation_synset_labels.txt)"
            )
        return numbers, []
    some = any(label is not None for label in labels)
    for (n, (word,)), label in zip(labelled, labels, strict=True):
        if is_missing(word):
            raise _Misfit(f"line {n}: {word} is no label; labels are whole numbers from 0 (below 2^63), or class names")
        if some and label is None:
            raise _Misfit(
                f"line {n}: {word!r} is no number, and other lines have numbers; write numbers, or names, on all"
            )
        if word.encode(errors="ignore").decode() != word:
            raise _Misfit(f"line {n}: {word!r} is no UTF-8; save the file as UTF-8")
    classes = sorted({word for _, (word,) in labelled})
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[word] for _, (word,) in labelled], dtype=np.int64), classes
