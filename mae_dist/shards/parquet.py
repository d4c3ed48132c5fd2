"""Images in parquet files: a column of encoded images, as bytes or as Hugging Face's struct with `bytes`, maybe labels.

A row group is the least that can be read. A shuffled shard takes its images from as many row groups, so each image
costs one row group's reading: keep the files on a fast disk, and row groups small (Hugging Face writes 100 rows).
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mae_dist.errors import UserError
from mae_dist.local import naming
from mae_dist.shards.labels import UNUSED, WITHOUT, as_label, is_missing
from mae_dist.shards.notes import Notes
from mae_dist.shards.tars import Piece

IMAGE, LABEL, NONE = "image", "label", "none"
OTHER_COLUMNS = "other columns of images or bytes"
LIKE_LABELS = re.compile(
    r"(?:.*_)?(?:labels?|class|cls|categor(?:y|ies)|target|species|breed|wnid|synset)(?:_.*|id)?", re.I
)


@dataclass(frozen=True)
class Columns:
    """Which columns are read, of all files."""

    image: str = IMAGE
    label: str | None = LABEL
    """Empty: there is none; None: it is not wanted."""
    names: Sequence[str] = ()
    """Class names, in the order of the labels, where the column's values are names."""
    noted: Sequence[str] = ()
    """Class names that the `datasets` library notes about a column of numbers."""

    @property
    def classes(self) -> list[str]:
        return list(self.names or self.noted)


def find_columns(paths: Sequence[str], image: str | None, label: str | None, notes: Notes) -> Columns:
    """The columns of these files; `image`, `label`: as `--image-column` and `--label-column` say.

    `notes` gets other columns of images. Raises UserError, with what may be meant, when there is no such column or it
    holds something else.
    """
    path = paths[0]
    schema = open_file(path).schema_arrow
    found = image or IMAGE
    others = [name for name in schema.names if holds_images(schema.field(name).type) and name != found]
    for name in others:
        notes.add(OTHER_COLUMNS, name)
    if found not in schema.names or not holds_images(schema.field(found).type):
        advice = f"; write --image-column {' or '.join(others)}" if others else ""
        raise UserError(f"{path}: no column {found} with bytes in it (columns: {', '.join(schema.names)}){advice}")
    if label == NONE:
        return Columns(found, None)
    meant = label or (LABEL if LABEL in schema.names else "")
    if not meant and (like := like_labels(schema)):
        raise UserError(
            f"{path}: no column {LABEL}, but {', '.join(like)}; write --label-column {like[0]}, or "
            f"--label-column {NONE} for images without labels"
        )
    if not meant:
        return Columns(found, "")
    if meant not in schema.names:
        raise UserError(f"{path}: no column {meant} (columns: {', '.join(schema.names)}); write --label-column NAME")
    names = label_names(paths, meant) if is_text(schema.field(meant).type) else []
    return Columns(found, meant, names, class_names(schema, meant))


def like_labels(schema: Any) -> list[str]:
    """Columns that may hold labels, by their names and by what the `datasets` library notes."""
    return [name for name in schema.names if LIKE_LABELS.fullmatch(name) or class_names(schema, name)]


def open_file(path: str | Path) -> Any:
    """A pyarrow ParquetFile, read and not mapped: of a file that was cut short meanwhile a map is a fatal signal.

    Raises UserError when it is none, or has two columns of one name, OSError when the system cannot read it.
    """
    with said(path):
        file = pq.ParquetFile(path, memory_map=False)
        names = file.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path}: holds two columns called {twice}; write it again with one")
        return file


@contextmanager
def said(path: str | Path) -> Iterator[None]:
    """What pyarrow says of bytes that are no parquet file as a UserError; an OSError of the system as it is."""
    try:
        with naming(Path(path)):
            yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(f"{path}: not a parquet file ({' '.join(str(error).split())}); download it again") from error


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column's type is bytes, or a struct with `bytes`."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_images(kind.field(index).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, also of a column that holds each of them once."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Whether labels of this type are names."""
    kind = plain(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind)


def is_number(kind: pa.DataType) -> bool:
    kind = plain(kind)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)


def class_names(schema: Any, label: str) -> list[str]:
    """What the `datasets` library notes about a column; empty when there is no such note."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        return list(map(str, note["info"]["features"][label]["names"]))
    except (KeyError, ValueError, TypeError):
        return []


def values_of(path: str | Path, label: str) -> tuple[list[Any], NDArray[np.int64]]:
    """The different values of a column, and which of them each row has (-1: null). Raises UserError."""
    file = open_file(path)
    if label not in file.schema_arrow.names:
        raise UserError(f"{path}: no column {label}, which other files have; give files of one kind")
    kind = plain(file.schema_arrow.field(label).type)
    if not is_text(kind) and not is_number(kind):
        raise UserError(f"{path}: the column {label} holds {kind}, no numbers or names; write --label-column NAME")
    with said(path):
        encoded = file.read(columns=[label]).column(label).cast(kind).combine_chunks().dictionary_encode()
    values = [str(v).lower() if isinstance(v, bool) else v for v in encoded.dictionary.to_pylist()]
    return values, encoded.indices.fill_null(-1).to_numpy().astype(np.int64)


def label_names(paths: Sequence[str], label: str) -> list[str]:
    """The names in a column of text, sorted; none where all are numbers. `-1` and the like are none."""
    names = {value for path in paths for value in values_of(path, label)[0] if not is_missing(str(value))}
    return [] if all(as_label(name) is not None for name in names) else sorted(map(str, names))


def scan_parquet(job: tuple[int, str], columns: Columns = Columns()) -> Piece:
    """The rows of one file, in their order. Reads the labels only. Raises UserError for a file of another kind."""
    container, path = job
    file = open_file(path)
    schema = file.schema_arrow
    if columns.image not in schema.names or not holds_images(schema.field(columns.image).type):
        raise UserError(f"{path}: no column {columns.image} with bytes in it, which other files have")
    lengths = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    n = sum(lengths)
    groups = np.repeat(np.arange(len(lengths)), lengths)
    rows = np.concatenate([np.arange(length) for length in lengths]) if lengths else np.zeros(0)
    notes, labels = Notes(), np.full(n, -1)
    if columns.label:
        labels = _labels(path, schema, columns.label, columns, notes)
    elif columns.label == "" and (like := like_labels(schema)):
        raise UserError(f"{path}: a column {like[0]}, which other files lack; give files of one kind")
    stem = Path(path).stem
    places = np.stack([groups, rows], 1).astype(np.int64)
    return Piece(container, [f"{stem}/{i}" for i in range(n)], places, labels, notes=notes)


def _labels(path: str, schema: Any, label: str, columns: Columns, notes: Notes) -> NDArray[np.int64]:
    values, which = values_of(path, label)
    kind = schema.field(label).type
    if columns.names and not is_text(kind):
        raise UserError(f"{path}: the column {label} holds {kind}, and names in other files; give files of one kind")
    noted = class_names(schema, label)
    if noted and noted != list(columns.noted):
        raise UserError(f"{path}: the classes of {label} have other names than in other files; shard it alone")
    number = {name: i for i, name in enumerate(columns.names)}
    meant = [number.get(value) if columns.names else as_label(value) for value in values]
    for i, (value, found) in enumerate(zip(values, meant, strict=True)):
        if found is None:
            notes.add(UNUSED, f"{str(value)[:40]!r} of {path}", int((which == i).sum()))
    if (which < 0).any():
        notes.add(WITHOUT, f"{path}: row {int(np.argmax(which < 0))}", int((which < 0).sum()))
    table = np.array([*(-1 if found is None else found for found in meant), -1], dtype=np.int64)
    return table[which]  # null: the last


def read_cell(path: str, group: int, row: int, column: str | None = None) -> bytes:
    """The bytes of one image. Raises ValueError when the row has none (only a path)."""
    data = _row_group(path, group, column or IMAGE)[row].as_py()
    if isinstance(data, dict):
        where = f", only the path {data['path']!r}, which is not followed" if data.get("path") else ""
        data = data["bytes"]
        if data is None:
            raise ValueError(f"a row without bytes{where}")
    if data is None:
        raise ValueError("a row without an image")
    return data


@lru_cache(maxsize=4)
def _row_group(path: str, group: int, column: str) -> Any:
    return _file(path).read_row_group(group, columns=[column]).column(column)


@lru_cache(maxsize=64)
def _file(path: str) -> Any:
    return open_file(path)
