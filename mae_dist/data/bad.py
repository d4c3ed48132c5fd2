"""Bad samples: named, counted, replaced, up to a limit.

A sample that cannot be read keeps its place, its crop and its mask; only its pixels and label come from a stand-in,
which depends on (seed, epoch, sample) alone, so counts never change and every world size sees the same. Each bad sample
is one line of `bad_samples.jsonl` in the run directory, whoever finds it and however often.
"""

import fcntl
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mae_dist import rng
from mae_dist.errors import UserError
from mae_dist.shards.remote import read_range

FILE_NAME = "bad_samples.jsonl"
STAND_IN_STREAM = 0x7374616E
TRIES = 16  # stand-ins asked, should they be bad too
ALWAYS_ALLOWED = 10  # so that a bad image in a small data set stops nothing
LISTED = 5  # in the message; the file has all
TAR_BLOCK, TAR_NAME = 512, 100
PLACE = re.compile(r"(?P<shard>.*): sample (?P<index>\d+) \(bytes (?P<offset>\d+) to (?P<end>\d+)\)", re.DOTALL)


class BadSample(UserError):
    """An image that cannot be decoded. `where`: shard, place and bytes, as the store says it."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: unreadable image: {reason}")
        self.where, self.reason = where, reason


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
    """The list of a run's bad samples, in `run_dir`, shared by all its processes. `fraction`: data.max_bad_fraction."""

    def __init__(self, run_dir: Path, fraction: float):
        self.path, self.fraction = run_dir / FILE_NAME, fraction
        self._known: set[str] = set()
        self._size, self._count = 0, 0

    def add(self, bad: BadSample, epoch: int, sample: int) -> None:
        """Write a line for a bad sample that has none yet."""
        if bad.where in self._known:
            return
        self._known.add(bad.where)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
            file.seek(0)
            if any(known["where"] == bad.where for known in parsed(file)):
                return
            line = {"where": bad.where, "error": bad.reason, "sample": sample, "epoch": epoch} | location(bad.where)
            file.write(json.dumps(line) + "\n")

    def count(self) -> int:
        """Bad samples found so far by the whole run, each once; reads the file only when it has grown."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            self._size, self._count = size, len(self.path.read_text().splitlines())
        return self._count

    def check(self, found: int, read: int) -> None:
        """Raise UserError, with the list, when `found` bad samples are too many for `read` samples read."""
        if found <= self.allowed(read):
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        named = list(parsed(lines))[:LISTED]
        listing = "; ".join(f"{bad['where']} {bad.get('key', '')}: {bad['error']}" for bad in named)
        more = f"; and {found - len(named)} more in {self.path}" if found > len(named) else f"; listed in {self.path}"
        raise UserError(
            f"{found} bad samples among {read} read, more than data.max_bad_fraction {self.fraction} allows "
            f"({self.allowed(read)}): {listing}{more}. Make these shards again, or allow more and go on: "
            f"--data.max_bad_fraction {min(1.0, found / read * 2):.1g}"
        )

    def allowed(self, read: int) -> int:
        """How many of `read` samples may be bad."""
        return max(ALWAYS_ALLOWED, int(self.fraction * read)) if self.fraction else 0


def parsed(lines: Iterable[str]) -> Iterator[dict]:
    """The records of the file; a line that a crash has torn is none."""
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def location(where: str) -> dict:
    """Shard, index, offset and length in bytes, and the key, from the tar header; what is not found is left out."""
    match = PLACE.fullmatch(where)
    if not match:
        return {}
    offset, end = int(match["offset"]), int(match["end"])
    found = {"shard": match["shard"], "index": int(match["index"]), "offset": offset, "length": end - offset}
    try:
        header = read_range(match["shard"], offset - TAR_BLOCK, offset)
    except OSError:
        return found
    return found | {"key": header[:TAR_NAME].split(b"\0")[0].decode(errors="replace").rsplit(".", 1)[0]}
