"""What an input holds and shards do not: said by kind, with a count and the first of each, never passed over."""

import re
from collections.abc import Iterator, Mapping

from mae_dist.errors import one_line

HIDDEN = "hidden files or folders"
AGAIN = "folders that lead to one read already"
WITHOUT_IMAGE = "samples without an image"
EMPTY = "images of no bytes"
UNLISTED = "tars that manifest.json does not list (a pattern for all, such as '*.tar', takes them in)"
DOTTED = "images with dots in their names, each one taken"
FRAMES = "images of several frames or pages, the first alone taken"
TOUCHED = "tars or parquet files written again since, or copies (if their labels are others, start anew)"
CHANGED = "directories that changed after they were listed: what came since is not taken"
COPIES = "files with the bytes of another, their images taken again"
ALIKE = "classes that differ by case, blanks or the spelling of accents alone, each taken as one"
BY_TEXT = "classes with numbers for names, their labels in the order of text (as torchvision's)"
IN_FOLDERS = "tars with folders, not taken for classes (unpack them for that, or write --labels)"
SAID = (DOTTED, FRAMES, CHANGED, COPIES, ALIKE, BY_TEXT, IN_FOLDERS, TOUCHED)  # and nothing of it left out
NO_SUFFIX = "no suffix"
FURTHER = "files of further kinds"
SHOWN, KINDS = 20, 200


class Notes(dict[str, tuple[int, str]]):
    """How often, and the first example, by kind; as JSON, an object of lists."""

    def add(self, kind: str, example: str, count: int = 1) -> None:
        kind = kind if kind in self or kind in SAID or len(self) < KINDS else FURTHER
        times, first = self.get(kind, (0, example))
        self[kind] = (times + count, first)

    def update_from(self, others: Mapping[str, tuple[int, str]]) -> None:
        for kind, (count, example) in others.items():
            self.add(kind, example, count)

    def lines(self) -> Iterator[str]:
        """For people, a line a kind."""
        items = sorted(
            self.items(), key=lambda item: item[0].startswith((".", FURTHER))
        )  # files by their suffix come last
        for kind, (count, example) in items[:SHOWN]:
            yield f"{'note' if kind in SAID else 'left out'}: {count} {kind}, such as {one_line(example)}"
        if len(self) > SHOWN:
            rest = [what for _, what in items[SHOWN:]]
            count = sum(count for count, _ in rest)
            yield f"left out: {count} of {len(rest)} more kinds, such as {one_line(rest[0][1])}"


def suffix_kind(suffix: str) -> str:
    """A suffix (without its dot in front) as it is counted: numbers, queries and what is none are of one kind each."""
    word, query, _ = suffix.lower().partition("?")
    word = re.sub(r"\d+", "N", word) if "." in word or word[:1].isdigit() else word
    return f".{word}{'?...' if query else ''}" if re.fullmatch(r"[\w.-]{1,20}", word, re.ASCII) else NO_SUFFIX


def other_files(suffix: str) -> str:
    """The kind of files that are left out by their suffix."""
    kind = suffix_kind(suffix)
    return "files without a known suffix" if kind == NO_SUFFIX else f"{kind} files, by their suffix"


def beside_image(suffix: str) -> str:
    """The kind of files that belong to an image: masks, crops, another format."""
    return f"{suffix_kind(suffix)} files beside the image of their sample"
