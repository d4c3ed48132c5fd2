"""What a label is: one rule for `.cls` and `.json` members, for columns of parquet files and for `--labels` files.

A label is a whole number from 0 that int64 holds, written as a number (3, 3.0) or as text ("3"). Of what is no label
nothing is made up: it is -1, none, and counted in the input's notes.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from mae_dist.shards.notes import Notes

UNUSED = "labels not used (they are numbers from 0)"
WITHOUT = "images without a label, beside labelled ones"
DIFFERENT = "samples with two labels (of .cls, label and cls in .json the first is taken)"
NUMBER = re.compile(r"\s*\+?(\d+)(?:\.0*)?\s*", re.ASCII)
NO_NAME = re.compile(r"\s*|[+-]?\d*\.?\d+(?:[eE][+-]?\d+)?|nan|<NA>", re.IGNORECASE)  # a class is hardly called so


def is_missing(word: str) -> bool:
    """Whether a text is neither a label nor the name of a class: blank, a number that is no label, pandas' `nan`."""
    return as_label(word) is None and bool(NO_NAME.fullmatch(word))


def as_label(value: Any) -> int | None:
    """The label that a value says; None when it says none."""
    if isinstance(value, str | bytes):
        found = NUMBER.fullmatch(value.decode("latin-1") if isinstance(value, bytes) else value)
        value = int(found[1]) if found and len(found[1]) < 20 else None
    elif isinstance(value, float):
        value = int(value) if math.isfinite(value) and value.is_integer() else None
    number = isinstance(value, int) and not isinstance(value, bool)
    return value if number and 0 <= value < 1 << 63 else None


def said_in(suffix: str, content: bytes) -> list[Any]:
    """What a member `KEY.cls` or `KEY.json` says about the label, the best first; nothing for other suffixes."""
    if suffix == "cls":
        return [content]
    if suffix != "json":
        return []
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return [content]
    found = [values.get("label"), values.get("cls")] if isinstance(values, dict) else []
    return [value for value in found if value is not None]


def decide(said: Sequence[Any], where: str, notes: Notes) -> int:
    """The label of a sample, -1 for none, of all that its members say; `notes` gets what is not used."""
    labels = [label for value in said if (label := as_label(value)) is not None]
    if said and not labels:
        first = said[0].decode(errors="replace") if isinstance(said[0], bytes) else str(said[0])
        notes.add(UNUSED, f"{first[:40]!r} of {where}")
    elif not labels:
        notes.add(WITHOUT, where)
    elif len(set(labels)) > 1:
        notes.add(DIFFERENT, f"{where}: {', '.join(map(str, labels))}")
    return labels[0] if labels else -1


def of_unlabelled(notes: Notes, images: int) -> Notes:
    """The notes about so many images: where none of them has a label, that is nothing to note."""
    count = sum(notes[kind][0] for kind in (WITHOUT, UNUSED) if kind in notes)
    return Notes({kind: what for kind, what in notes.items() if kind != WITHOUT or count < images})
