"""Whole remote shards in a directory of this node, under a byte limit, each downloaded once for all its processes.

A shard is written aside (`.tmp`), checked, synced and renamed, so a `.tar` here is whole. Every lock is flock(2) on a
file of the directory: the kernel frees it when a process ends, however it ends, and a `.tmp` that nobody has locked was
left by a dead process. Readers open a file for one read and keep nothing open, so any file may go at any time; which
should stay is what the `.needs` files of living prefetchers list.
"""

import fcntl
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO
from uuid import uuid4

from mae_dist.errors import UserError
from mae_dist.shards import remote
from mae_dist.shards.counters import Counters
from mae_dist.shards.download import Download, Wanted, persist

SHARE_OF_FREE = 0.9  # of the free space, when no limit is given


class NoRoom(OSError):
    """The byte limit is reached, and every shard here will be needed."""


class Cache:
    """`directory`: None for `default_directory`. `limit`: bytes; None for most of what is free.

    Nothing is written before `prepare`.
    """

    def __init__(self, directory: str | Path | None = None, limit: int | None = None, counters: Counters | None = None):
        self.given = directory
        self.limit = limit
        self.counters = counters or Counters()

    @cached_property
    def directory(self) -> Path:
        return Path(self.given) if self.given else default_directory()

    def __getstate__(self) -> dict:
        return {"directory": self.directory, "limit": self.limit}  # another process counts for itself

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def prepare(self) -> None:
        """Make the directory and sweep away what dead processes left.

        Raises UserError when it cannot be written, or when others can: what they put there would be believed.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if why := distrusted(self.directory, stat.S_IWOTH | (0 if self.given else stat.S_IWGRP)):
                raise UserError(
                    f"data.cache_dir: {self.directory}: {why}; write --data.cache_dir DIR, a directory of your own on "
                    f"this node's disk, such as {self.directory / f'mae_dist-{os.getuid()}'}"
                )
            with self._room_lock():
                for left in (*self.directory.glob("*.tmp"), *self.directory.glob("*.needs")):
                    remove_if_free(left)
                if self.limit is None:
                    here = sum(size for _, size, _ in self._files())
                    self.limit = here + int(SHARE_OF_FREE * shutil.disk_usage(self.directory).free)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {self.directory}: {error.strerror}; write --data.cache_dir DIR, a directory of this "
                "node's own disk"
            ) from error

    def has(self, wanted: Wanted) -> bool:
        return (self.directory / wanted.name).exists()

    def read(self, wanted: Wanted, offset: int, length: int) -> bytes | None:
        """Bytes of a shard that is here; None when it is not, or not whole any more: then it is removed."""
        path = self.directory / wanted.name
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(file).st_size == wanted.num_bytes:
                return os.pread(file, length, offset)
        finally:
            os.close(file)
        path.unlink(missing_ok=True)
        return None

    def touch(self, wanted: Wanted) -> None:
        """It is in use: others go first."""
        with suppress(FileNotFoundError):
            os.utime(self.directory / wanted.name)

    def ensure(self, wanted: Wanted) -> None:
        """Have it here: download it, or wait for the process that does. Raises UserError after the last try."""
        path = self.directory / wanted.name
        if path.exists():
            self.touch(wanted)
            return
        aside = path.with_suffix(".tmp")
        with locked(aside) as file:
            try:
                if path.exists():  # somebody else was faster
                    return
                download = Download(wanted, file, self.counters)
                persist(lambda: self._download(download), wanted.place, self.counters)
                self.counters.add(downloads=1)
                aside.rename(path)
            finally:
                if is_at(file, aside):
                    aside.unlink()

    def _download(self, download: Download) -> None:
        wanted = download.wanted
        with self._room_lock():
            if os.fstat(download.file.fileno()).st_size == 0:  # not at a second try
                if not self._make_room(wanted.num_bytes):
                    raise NoRoom(
                        f"data.cache_bytes: {self.limit} bytes in {self.directory} are taken by shards that are needed "
                        f"next, no room for {wanted.num_bytes} more"
                    )
                download.file.truncate(wanted.num_bytes)  # taken, for all to see
        download.go()
        download.file.flush()
        os.fsync(download.file.fileno())

    def room_for(self, num_bytes: int) -> bool:
        """Whether so many bytes fit, after the least recently used shards that nobody needs next went."""
        with self._room_lock():
            return self._make_room(num_bytes)

    def _make_room(self, num_bytes: int) -> bool:
        assert self.limit is not None, "prepare() comes first"
        files = sorted(self._files())
        excess = sum(size for _, size, _ in files) + num_bytes - self.limit
        needed = self._needed() if excess > 0 else set()
        for _, size, path in files:
            if excess <= 0:
                break
            if path.suffix == ".tar" and path.name not in needed:
                path.unlink(missing_ok=True)
                excess -= size
        return excess <= 0

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of what takes room."""
        for entry in os.scandir(self.directory):
            if entry.name.endswith((".tar", ".tmp")):
                with suppress(FileNotFoundError):
                    yield entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)

    def _needed(self) -> set[str]:
        return {
            name
            for path in self.directory.glob("*.needs")
            if not remove_if_free(path)
            for name in path.read_text().split()
        }

    @contextmanager
    def _room_lock(self) -> Iterator[None]:
        with locked(self.directory / "room.lock"):
            yield

    @contextmanager
    def needs(self) -> Iterator["Needs"]:
        """A list, kept while this process lives, of the shards that stay."""
        path = self.directory / f"{uuid4().hex}.needs"  # processes of several containers have the same number
        with locked(path) as file:
            try:
                yield Needs(self, file)
            finally:
                path.unlink(missing_ok=True)


def default_directory() -> Path:
    """In XDG_CACHE_HOME, else ~/.cache; where that cannot be written, in the system's temporary directory."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(base, os.W_OK | os.X_OK):
            return base / "mae_dist"
        why = "cannot be written"
    except (OSError, RuntimeError) as error:  # no such user
        base, why = Path(home or "~/.cache"), getattr(error, "strerror", None) or str(error)
    other = Path(tempfile.gettempdir()) / f"mae_dist-{os.getuid()}"
    print(f"data.cache_dir: {base}: {why}; remote shards are kept in {other}", file=sys.stderr, flush=True)
    return other


def distrusted(directory: Path, modes: int) -> str:
    """Why others may have put something into a directory; empty when nobody can. `modes`: of those who must not."""
    found = directory.lstat()
    if stat.S_ISLNK(found.st_mode) and found.st_uid not in (0, os.getuid()):
        return "is a link of another user's"
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        return "is no directory"
    if found.st_uid != os.getuid():
        return f"belongs to another user (uid {found.st_uid})"
    if found.st_mode & modes:
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


class Needs:
    def __init__(self, cache: Cache, file: IO[bytes]):
        self.cache, self.file = cache, file

    def publish(self, shards: Iterable[Wanted]) -> None:
        """These stay, and no others."""
        names = "\n".join(wanted.name for wanted in shards).encode()
        with self.cache._room_lock():
            self.file.seek(0)
            self.file.truncate()
            self.file.write(names)
            self.file.flush()


def read_range(wanted: Wanted, offset: int, length: int, counters: Counters) -> bytes | None:
    """Bytes of a shard straight from its server; None when that has no ranges. Raises UserError after the last try."""
    data = persist(lambda: _exactly(wanted, offset, length), wanted.place, counters)
    if data is not None:
        counters.add(ranges=1, bytes=length)
    return data


def _exactly(wanted: Wanted, offset: int, length: int) -> bytes | None:
    data = remote.read_range(wanted.place, offset, offset + length)
    if len(data) < length:
        raise OSError(f"{len(data)} bytes came of the {length} from byte {offset} on")
    return data if len(data) == length else None


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """The file at `path`, made if need be, open and locked against every other process and thread."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(file, path):  # else renamed or removed while we waited
                yield file
                return


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove_if_free(path: Path) -> bool:
    """Remove a file that no process has locked. Returns whether it is gone."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(file, path):
                path.unlink()
            return True
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
