"""Files of this machine, written whole or not at all: under a staging name, fsynced, then renamed once.

A process killed at any moment, or a power cut, leaves the old content or the new one, never a part. Modes honour the
umask, whatever a library that writes into the staging directory thinks of it.
"""

import errno
import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mae_dist.errors import UserError

REMOTE = re.compile(r"[A-Za-z][\w+.-]+:/|pipe:")  # Path makes one `/` of two
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a file",
}


def kind_of(path: Path) -> str:
    """What lies there, for a message. Raises OSError."""
    return KINDS.get(stat.S_IFMT(path.stat().st_mode), "a special file")


def regular(path: Path) -> Path:
    """The path of a file that is about to be opened. Raises OSError, and ValueError unless it is a file or a directory.

    To open a FIFO is to wait for a writer, maybe for ever.
    """
    if (kind := kind_of(path)) not in ("a file", "a directory"):
        raise ValueError(f"{kind}, not a file")
    return path


def check_local(place: str | Path, where: str) -> None:
    """Raise UserError when a place that is to be written is no path of this machine. `where`: a key or an option."""
    if REMOTE.match(str(place)):
        raise UserError(f"{where}: {place}: not a path of this machine; write a directory of it, or one that is "
                        "mounted, and copy from there")  # fmt: skip
    if Path(place).parts[:1] == ("~",):
        raise UserError(f"{where}: {place}: `~` is known to the shell only; write {Path(place).expanduser()}")


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def staging(path: Path) -> Path:
    """A hidden name beside `path` that no other living process uses; `write_file` and `new_directory` write there."""
    return path.with_name(f".{path.name[:200]}.{socket.gethostname()}-{os.getpid()}.tmp")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A staging file that takes this name, in place of what is there, if the block ends without an error.

    Raises OSError, naming the file: nothing changed.
    """
    aside = staging(path)
    try:
        with naming(path, aside):
            yield aside
            allow_as_umask(aside)
            fsync(aside)
            aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    fsync(path.parent)


def write_file(path: Path, content: bytes | str) -> None:
    """Put `content` (text as UTF-8) under this name, in place of what is there. Raises OSError: nothing changed."""
    with new_file(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A staging directory that becomes `path`, with all its files fsynced, if the block ends without an error.

    Raises OSError, naming the directory, also when `path` is a directory with something in it.
    """
    aside = staging(path)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with naming(path, aside):
            aside.mkdir()
            yield aside
            allow_as_umask(aside)
            for where, _, files in os.walk(aside, topdown=False):
                for name in files:
                    fsync(Path(where, name))
                fsync(Path(where))
            aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, that survive a power cut; one that is there is left as it is.

    Raises OSError, naming the directory.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        what = "is a link to nothing" if path.is_symlink() else "is a file, where a directory is to be"
        raise NotADirectoryError(errno.ENOTDIR, what, str(path)) from None
    except FileNotFoundError:  # above it there is one that takes none, such as /proc
        raise PermissionError(errno.EACCES, "no directory can be made there", str(path)) from None
    fsync(path.parent)


@contextmanager
def naming(path: Path, aside: Path | None = None) -> Iterator[None]:
    """An OSError says which file it is of: a full disk and a failed read name nothing, a rename both names."""
    try:
        yield
    except OSError as error:
        if error.errno and (error.filename is None or (aside and str(error.filename).startswith(str(aside)))):
            error.filename = str(path)
            del error.filename2  # None would be shown, as "-> None"
        if aside and isinstance(error, FileNotFoundError):  # its directory has gone, or takes none, such as /proc
            raise NotADirectoryError(errno.ENOTDIR, "no file can be made there", str(path)) from None
        raise


class Secondary:
    """Output that the work can do without: an OSError is reported once, counted, and never raised.

    with pictures.attempt(): ...   # the next one that goes well says that it does again
    """

    def __init__(self, what: Path):
        self.what, self.failures, self._failed = what, 0, False

    @contextmanager
    def attempt(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failures += 1
            if not self._failed:
                self._failed = True
                why = f"{self.what}: cannot be written: {error.strerror or error}"
                print(f"warning: {why}; the work goes on, and it is tried again", file=sys.stderr, flush=True)
        else:
            if self._failed:
                print(f"{self.what}: can be written again", file=sys.stderr, flush=True)
            self._failed = False


def allow_as_umask(path: Path) -> None:
    """Give a file, or the files under a directory, the mode that the umask gives new ones: safetensors writes 0600."""
    mask = umask()
    for file in (p for p in [path, *path.rglob("*")] if p.is_file() and not p.is_symlink()):
        file.chmod(0o666 & ~mask)


def umask() -> int:
    """This process's; asked of Linux without changing it, because another thread may be making a file."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask
