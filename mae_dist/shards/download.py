"""One remote shard into an open file: by ranges, going on after a failure where it stopped; checked at the end."""

import hashlib
import itertools
import random
import time
from collections.abc import Callable
from functools import partial
from typing import IO, NamedTuple, TypeVar

from mae_dist.errors import MENDED, Unreadable, UserError
from mae_dist.shards import remote
from mae_dist.shards.counters import Counters
from mae_dist.shards.web import NotAFile
from mae_dist.urls import masked

CHUNK = 16 << 20  # bytes a request: what a dropped connection loses at most
TRIES = 8  # with these waits: a server may be away for about a minute
ANSWERED_TRIES = 3  # when the server did answer, and the answer was no
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
GIVE_UP = 180.0  # seconds after which no further try begins: a silent server takes a client's whole time limit each try

T = TypeVar("T")
_jitter = random.Random()  # its own: nobody else's random numbers move


class Wanted(NamedTuple):
    """A remote shard, and what it must be when it is here."""

    place: str
    num_bytes: int
    sha256: str
    """Empty: not known, only the size is checked."""

    @property
    def name(self) -> str:
        """Of its file in a cache: a hash of the whole place, and of the content, which may change at the same place.

        Without its secrets where the content is known: a new signature is no new shard.
        """
        place = masked(self.place) if self.sha256 else self.place
        return hashlib.sha256("\n".join(map(str, self._replace(place=place))).encode()).hexdigest() + ".tar"

    def __repr__(self) -> str:
        return f"Wanted({masked(self.place)!r})"


class WrongContent(OSError):
    """What came is not what the manifest promises."""


def persist(action: Callable[[], T], place: str, counters: Counters | None = None, done: str = "fetched") -> T:
    """Do it again until it works, waiting twice as long each time, with jitter. Raises UserError after the last try."""
    answers, began = 0, time.monotonic()
    for attempt in itertools.count(1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # client libraries raise what they like
            answers += isinstance(error, ANSWERS)
            if attempt >= TRIES or answers >= ANSWERED_TRIES or time.monotonic() - began > GIVE_UP:
                what = "not there" if isinstance(error, FileNotFoundError) else f"cannot be {done}"
                last = " ".join(f"{type(error).__name__}: {error}".split())  # UserError masks it
                stays = isinstance(error, ANSWERS) or getattr(error, "errno", None) in MENDED
                raise (UserError if stays else Unreadable)(
                    f"{place}: {what}, tried {attempt} times, last error: {last}; look at the place and at the "
                    "network, then start the same command again"
                ) from error
            if counters:
                counters.add(retries=1)
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1)
            time.sleep(max(wait, min(getattr(error, "retry_after", 0.0), GIVE_UP)))  # a server may say how long
    raise AssertionError("count has no end")


ANSWERS = FileNotFoundError | PermissionError | WrongContent | NotAFile


class Download:
    """`go` tries each request again by itself; it may be called again after it failed, and then starts again."""

    def __init__(self, wanted: Wanted, file: IO[bytes], counters: Counters):
        self.wanted, self.file, self.counters = wanted, file, counters

    def go(self) -> None:
        """Raises WrongContent for another size or checksum, UserError when a server stays away, and what clients do."""
        self._restart()
        if self.wanted.place.startswith(remote.PIPE):
            self._stream()
        else:
            self._ask_for_ranges()
        if self.wanted.sha256 and self.digest.hexdigest() != self.wanted.sha256:
            raise WrongContent(f"sha256 {self.digest.hexdigest()} where the manifest says {self.wanted.sha256}")
        self.file.truncate(self.wanted.num_bytes)  # an earlier try may have brought more

    def _restart(self) -> None:
        self.done, self.digest = 0, hashlib.sha256()
        self.file.seek(0)

    def _add(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.done += len(data)
        self.counters.add(bytes=len(data))

    def _ask_for_ranges(self) -> None:
        size = self.wanted.num_bytes
        while self.done < size:
            end = min(self.done + CHUNK, size + 1)  # one byte more than there should be: a longer shard shows
            ask = partial(remote.read_range, self.wanted.place, self.done, end)
            data = persist(ask, self.wanted.place, self.counters)
            if len(data) > end - self.done:  # a server without ranges sends everything, whatever is asked
                self._restart()
                return self._stream()
            if self.done + len(data) != min(end, size):
                raise WrongContent(self._size_message(self.done + len(data)))
            self._add(data)
        return None

    def _stream(self) -> None:
        with remote.open_stream(self.wanted.place) as stream:
            while data := stream.read(1 << 20):
                self._add(data)
                if self.done > self.wanted.num_bytes:
                    break
        if self.done != self.wanted.num_bytes:
            raise WrongContent(self._size_message(self.done))

    def _size_message(self, size: int) -> str:
        found = f"{size} bytes" if size < self.wanted.num_bytes else "more bytes"
        return f"{found} where the manifest says {self.wanted.num_bytes}"
