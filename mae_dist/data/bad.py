"""Bad samples: named, counted, replaced, up to a limit.

A sample that cannot be read keeps its place, its crop and its mask; only its pixels and label come from a stand-in,
which depends on (seed, epoch, sample) alone, so counts never change and every world size sees the same. Each bad sample
is one line of `bad_samples.jsonl` in the run directory, whoever finds it and however often.
"""

import fcntl
import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mae_dist import rng
from mae_dist.errors import UserError
from mae_dist.local import Secondary
from mae_dist.urls import masked

FILE_NAME = "bad_samples.jsonl"
STAND_IN_STREAM = 0x7374616E
TRIES = 16  # stand-ins asked, should they be bad too
ALWAYS_ALLOWED = 10  # so that a bad image in a small data set stops nothing
SLOTS = 4096
KINDS = {"where": str, "error": str, "position": int, "sample": int}  # in the records of the file
LISTED = 5  # in the message; the file has all
PLACE = re.compile(r"(?P<shard>.*): sample (?P<index>\d+) \(bytes (?P<offset>\d+) to (?P<end>\d+)\)", re.DOTALL)


class BadSample(UserError):
    """An image that cannot be decoded. `where`: shard, place and bytes, as the store says it; `key`: if known."""

    def __init__(self, where: str, reason: str, key: str = ""):
        super().__init__(f"{where}: unreadable image: {reason}")
        self.where, self.reason, self.key = masked(where), masked(reason), key


def stand_ins(
    epoch: int, position: int, sample: int, seed: int, num_samples: int, lanes: int = 1, window: int = 0
) -> NDArray[np.int64]:
    """Positions of the stream to try in place of `position`: (TRIES,) int64, none where there is no other sample.

    Of the same epoch and lane and at most `window` reads apart, so their shards are at hand.
    """
    place = position - epoch * num_samples
    lane, i = place % lanes, place // lanes
    length = num_samples // lanes + (lane < num_samples % lanes)
    reach = min(window or length, length)
    start = min(i // reach * reach, length - reach)
    if reach == 1:
        return np.empty(0, dtype=np.int64)
    draws = rng.fold(seed ^ STAND_IN_STREAM, np.full(1, sample), epoch, np.arange(TRIES))
    other = start + (i - start + 1 + draws % (reach - 1)) % reach  # never i itself
    return epoch * num_samples + lane + lanes * other


class BadSamples:
    """The list of a run's bad samples, in `run_dir`, shared by all its processes. `fraction`: data.max_bad_fraction.

    It is never cut back: a line holds the place in the stream of training samples where it was found, and counts once
    training is past that, be it for the second time. What evaluations find has no such place and counts at once.
    `different`: training samples in an epoch (None: not known); `evaluated`: samples that evaluations read.
    """

    def __init__(self, run_dir: Path, fraction: float, different: int | None = None, evaluated: int = 0):
        self.path, self.fraction, self.different, self.evaluated = run_dir / FILE_NAME, fraction, different, evaluated
        self._known: set[str] = set()
        self._size, self._found = 0, {}
        self._output, self._waiting, self._owner = Secondary(self.path), list[dict](), os.getpid()
        # Lines that processes forked from this one could not write yet; each has a number of its own (nearly surely).
        self._unwritten = np.frombuffer(mmap.mmap(-1, 2 * SLOTS), np.uint16)

    def add(self, bad: BadSample, **found: int | str) -> None:
        """Write a line for a bad sample that has none yet. `found`: what is known of it, `position` in training.

        A full or read-only disk does not stop the caller: the line waits, is counted, and is written by a later call.
        """
        if bad.where in self._known:
            return
        self._known.add(bad.where)
        line = {"where": bad.where, "error": bad.reason} | found | location(bad.where)
        self.flush()
        self._waiting.append(line | ({"key": bad.key} if bad.key else {}))
        self._unwritten[os.getpid() % SLOTS] += 1
        self.flush()

    def flush(self) -> None:
        """Write the lines of this process that wait, if there is room now."""
        if self._owner != os.getpid():  # forked: what the parent has is the parent's to write
            self._owner, self._waiting = os.getpid(), []
        if not self._waiting:
            return
        with self._output.attempt():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", errors="replace") as file:
                with suppress(OSError):  # not every file system has locks; short lines are appended whole all the same
                    fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
                file.seek(0)
                lines = file.readlines()
                listed = {known["where"] for known in parsed(lines)}
                torn = bool(lines) and not lines[-1].endswith("\n")
                new = [json.dumps(line) + "\n" for line in self._waiting if line["where"] not in listed]
                file.write("\n" * torn + "".join(new))
            self._unwritten[os.getpid() % SLOTS] -= len(self._waiting)
            self._waiting = []

    def begin_again(self) -> None:
        """Drop the list: what it names may have been mended. Its samples are looked at again."""
        self._known.clear()
        with self._output.attempt():
            self.path.unlink(missing_ok=True)

    def count(self, read: int | None = None) -> int:
        """Bad samples found by evaluations and among the first `read` of training (None: any), each once.

        So much at any number of ranks and after any restart. Reads the file only when it has grown.
        """
        with self._output.attempt():  # unreadable for a while: what was read before
            size = self.path.stat().st_size if self.path.exists() else 0
            if size != self._size:
                lines = list(self._lines())
                self._size, self._found = size, {}
                for bad in lines:  # shards may have moved: then a sample has two lines
                    place, trained = bad.get("position", -1), "position" in bad
                    name = bad.get("sample", bad["where"]) if trained else bad["where"].rpartition("/")[2]
                    self._found[name] = min(place, self._found.get(name, place))
        found = sum(read is None or position < read for position in self._found.values())
        return found + int(self._unwritten.sum())

    def _listed(self) -> list[dict]:
        with suppress(OSError):
            return list(self._lines())
        return []

    def _lines(self) -> Iterator[dict]:
        return parsed(self.path.read_text(errors="replace").splitlines() if self.path.exists() else [])

    def check(self, found: int, read: int) -> None:
        """Raise UserError, with the list, when `found` bad samples are too many for `read` samples of training."""
        reached = read
        read = min(read, self.different or read) + self.evaluated
        if found <= self.allowed(read):
            return
        known = [bad for bad in [*self._listed(), *self._waiting] if bad.get("position", -1) < reached]
        named = known[:LISTED]
        listing = "; ".join(f"{bad['where']} {bad.get('key', '')}: {bad['error']}" for bad in named)
        more = f"; and {found - len(named)} more in {self.path}" if found > len(named) else f"; listed in {self.path}"
        raise UserError(
            f"{found} bad samples among {read} read, more than data.max_bad_fraction {self.fraction} allows "
            f"({self.allowed(read)}): {listing}{more}. Mend these shards and remove that file, or allow more and go "
            f"on: --data.max_bad_fraction {min(1, found / read * 2):.1g}"
        )

    def allowed(self, read: int) -> int:
        """How many of `read` samples may be bad."""
        return max(ALWAYS_ALLOWED, int(self.fraction * read)) if self.fraction else 0


def parsed(lines: Iterable[str]) -> Iterator[dict]:
    """The records of the file; a line that a crash or a disk has spoilt is none."""
    for line in lines:
        with suppress(ValueError, RecursionError, AttributeError):
            record = json.loads(line)
            kinds = [isinstance(record.get(key, kind()), kind) for key, kind in KINDS.items()]
            if all(kinds) and "where" in record:
                yield {"error": ""} | record


def location(where: str) -> dict[str, int | str]:
    """Shard, index, offset and length in bytes, out of what the store says."""
    match = PLACE.fullmatch(where)
    if not match:
        return {}
    offset, end = int(match["offset"]), int(match["end"])
    return {"shard": match["shard"], "index": int(match["index"]), "offset": offset, "length": end - offset}
