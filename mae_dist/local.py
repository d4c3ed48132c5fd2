"""Files of this machine, written whole or not at all: under a staging name, fsynced, then renamed once.

A process killed at any moment, or a power cut, leaves the old content or the new one, never a part. Modes honour the
umask, whatever a library that writes into the staging directory thinks of it.
"""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def write_file(path: Path, content: bytes | str) -> None:
    """Put `content` (text as UTF-8) under this name, in place of what is there. Raises OSError: nothing changed."""
    aside = staging(path)
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A staging directory that becomes `path`, with all its files fsynced, if the block ends without an error.

    Raises OSError, also when `path` is a directory with something in it.
    """
    aside = staging(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
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


def allow_as_umask(path: Path) -> None:
    """Give a file, or the files under a directory, the mode that the umask gives new ones: safetensors writes 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for file in (p for p in [path, *path.rglob("*")] if p.is_file() and not p.is_symlink()):
        file.chmod(0o666 & ~mask)
