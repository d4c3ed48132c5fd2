"""The local truth of a run: one JSON object a line in `<run_dir>/journal.jsonl`. MLflow is a copy of it.

Each line reaches the operating system when it is written, and the disk with `sync`, which goes with each checkpoint.
Kinds of record, all with "time" (epoch seconds): start, metrics, image, artifact, cut, end. Non-finite floats are
kept as the strings "nan", "inf" and "-inf", so that every line is valid JSON, and come back as floats.

A line that a disk has spoilt is no record: nobody who reads gets it, `cut` names it and leaves it where it is.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from mae_dist.local import fsync, naming, new_file
from mae_dist.urls import masked

FILE_NAME = "journal.jsonl"
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
NAMED = 5  # unreadable lines in a warning
FIELDS: dict[str, dict[str, type]] = {  # of each kind that readers rely on
    "metrics": {"step": int, "metrics": dict},
    "image": {"step": int, "key": str, "path": str},
    "artifact": {"path": str},
    "cut": {"steps": int},
}


class Journal:
    """The one writer of a journal (rank 0), for any of its threads: the watchdog's may have to write how a run ended.

    Opening it drops a last line that an earlier writer left torn.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._pending = bytearray()
        self._lock = threading.RLock()
        self._failed = False
        self._fd = self._open()

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`, with "time" if it has none.

        A full or absent disk does not stop the caller: the line waits in memory, in its place, for the next call.
        """
        timed = record if "time" in record else {**record, "time": time.time()}
        line = json.dumps(to_json(timed), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._pending += line
            self._flush()

    def sync(self) -> None:
        """What was written survives a power cut from here on."""
        with self._lock:
            self._flush()
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._warn(error)

    def cut(self, step: int) -> int:
        """Drop every record of a step greater than `step`; returns how many steps that are, which will be run again.

        Records without a step stay, and starts; so do lines that are no records, which are counted and named on stderr.
        Written aside, synced and renamed: a reader sees the old file or the new one. Raises OSError.
        """
        with self._lock:
            self._flush()
            dropped, spoilt = 0, list[int]()
            with new_file(self.path) as aside, self.path.open("rb") as old, aside.open("wb") as new:
                for number, line in enumerate(whole_lines(old), 1):
                    record = parse(line)
                    if record is not None and is_after(record, step):
                        dropped = max(dropped, record["step"] - step)
                        continue
                    new.write(line)
                    if record is None:
                        spoilt.append(number)
            os.close(self._fd)
            self._fd = self._open()
        if spoilt:
            lines = ", ".join(map(str, spoilt[:NAMED])) + (", ..." if len(spoilt) > NAMED else "")
            counted = f"{len(spoilt)} line{'s are' if len(spoilt) > 1 else ' is'} no record"
            print(f"warning: {self.path}: {counted} and kept, but not counted: line {lines}", file=sys.stderr)
        return dropped

    def close(self) -> None:
        """Sync and close. Closing twice does nothing."""
        with self._lock:
            if self._fd >= 0:
                self.sync()
                os.close(self._fd)
                self._fd = -1
            if self._pending:
                self._rescue()

    def _rescue(self) -> None:
        """The end, and the disk still takes nothing: the lines go where there is room, and that is said."""
        lines = self._pending.count(b"\n")
        try:
            with NamedTemporaryFile(prefix="mae_dist-journal-", suffix=".jsonl", delete=False) as file:
                file.write(self._pending)
            self._pending.clear()
            what = f"are in {file.name}: cat {file.name} >> {self.path}"
        except OSError as error:
            what = f"are lost: {error}"
        print(f"warning: {self.path}: the last {lines} lines could not be written, and {what}", file=sys.stderr)

    def _open(self) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if self.path.is_file():  # a device or a pipe has no tail to repair
            with naming(self.path), self.path.open("rb") as file:
                whole, size = last_newline(file), file.seek(0, os.SEEK_END)
            if whole < size:
                os.ftruncate(fd, whole)
            with suppress(OSError):  # where the file system can promise that
                fsync(self.path.parent)
        return fd

    def _flush(self) -> None:
        try:
            if self._failed and self._fd >= 0:  # a file server that was away gives the old number no second life
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                os.close(self._fd)
                self._fd = fd
            while self._pending:  # a nearly full disk takes a part of a line; the rest follows when it can
                written = os.write(self._fd, self._pending)
                del self._pending[:written]
            self._failed = False
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            print(f"warning: {self.path}: {error.strerror}; kept in memory until it can be written", file=sys.stderr)
        self._failed = True


def read(path: Path | str) -> Iterator[dict[str, Any]]:
    """The whole records of a journal, in order, without a torn last line and without lines that are no JSON object."""
    with naming(Path(path)), Path(path).open("rb") as file:
        for line in whole_lines(file):
            record = parse(line)
            if record is not None:
                yield record


def is_after(record: dict[str, Any], step: int) -> bool:
    """Whether a record belongs to a later step than `step`; a start, and one without a step, belong to none."""
    return record.get("step", step) > step and record.get("kind") != "start"


def whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines from where `file` stands, each with its newline, up to a torn last one."""
    for line in file:
        if not line.endswith(b"\n"):
            return
        yield line


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of one line; None for what is none: no JSON object, or with a wrong type where readers need one."""
    try:
        record = from_json(json.loads(line))
    except (ValueError, RecursionError):  # a power cut can leave zeros, a bad disk anything
        return None
    return record if isinstance(record, dict) and is_sound(record) else None


def is_sound(record: dict[str, Any]) -> bool:
    """Whether the fields that readers rely on are there and of their types: others may be anything."""
    time, step, kind = record.get("time", 0.0), record.get("step", 0), record.get("kind", "")
    needed = FIELDS.get(kind, {}) if isinstance(kind, str) else {}
    return (
        type(time) in (int, float)
        and 0 <= time < 1e11  # no NaN either
        and type(step) is int
        and 0 <= step < 1 << 53
        and all(type(record.get(name)) is wanted for name, wanted in needed.items())
        and all(isinstance(record.get(name) or {}, dict) for name in ("params", "tags"))
        and isinstance(record.get("artifacts") or [], list)
    )


def number(record: dict[str, Any], key: str, default: float = 0.0) -> float:
    """A metric of a record; `default` when it is not there, or no finite number."""
    value = (record.get("metrics") or {}).get(key, default)
    return value if isinstance(value, int | float) and abs(value) < 1e300 else default


def to_json(value: Any) -> Any:
    """`value` as plain JSON types: non-finite floats as strings, array scalars as numbers, the rest as str; masked."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, str):
        return masked(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return to_json(value.item()) if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else str(value)


def from_json(value: Any) -> Any:
    """The inverse of `to_json` for plain types; a string "nan", "inf" or "-inf" becomes a float too."""
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def last_newline(file: IO[bytes], block: int = 65536) -> int:
    """The offset after the last newline of a file, 0 if there is none."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
