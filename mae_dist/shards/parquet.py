"""Images in parquet files as Hugging Face stores them: a column `image` (struct with `bytes`), maybe an int `label`.

A row group is the least that can be read. A shuffled shard takes its images from as many row groups, so each image
costs one row group's reading: keep the files on a fast disk, and row groups small (Hugging Face writes 100 rows).
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mae_dist.errors import UserError
from mae_dist.shards.tars import Piece


def open_file(path: str | Path) -> Any:
    """A pyarrow ParquetFile. Raises UserError when it is none, or has no images in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({error}); download it again") from error
    schema = file.schema_arrow
    kind = schema.field("image").type if "image" in schema.names else None
    if kind is None or not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise UserError(f"{path}: no column image with bytes in it (columns: {', '.join(schema.names)})")
    if "label" in schema.names and not pa.types.is_integer(schema.field("label").type):
        raise UserError(f"{path}: the column label holds {schema.field('label').type}, not ints; drop or rename it")
    return file


def class_names(path: Path) -> list[str]:
    """What the `datasets` library notes about the column label; empty when there is no such note."""
    try:
        note = json.loads((open_file(path).schema_arrow.metadata or {})[b"huggingface"])
        return list(note["info"]["features"]["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return []


def scan_parquet(job: tuple[int, str]) -> Piece:
    """The rows of one file, in their order. Reads the labels only. Raises UserError as `open_file`."""
    container, path = job
    file = open_file(path)
    lengths = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    n = sum(lengths)
    groups = np.repeat(np.arange(len(lengths)), lengths)
    rows = np.concatenate([np.arange(length) for length in lengths]) if lengths else np.zeros(0)
    labels = np.full(n, -1)
    if "label" in file.schema_arrow.names:
        column = file.read(columns=["label"]).column("label")
        labels = column.fill_null(-1).to_numpy().astype(np.int64)
    stem = Path(path).stem
    return Piece(container, [f"{stem}/{i}" for i in range(n)], np.stack([groups, rows], 1).astype(np.int64), labels)


def read_cell(path: str, group: int, row: int) -> bytes:
    """The bytes of one image. Raises ValueError when the row has none (only a path)."""
    data = _row_group(path, group)[row].as_py()
    if data is None:
        raise ValueError("a row without bytes")
    return data


@lru_cache(maxsize=4)
def _row_group(path: str, group: int) -> Any:
    return _file(path).read_row_group(group, columns=["image.bytes"]).column("image").combine_chunks().field("bytes")


@lru_cache(maxsize=64)
def _file(path: str) -> Any:
    return open_file(path)
