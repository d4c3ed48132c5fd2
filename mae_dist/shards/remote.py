"""Bytes at a place: a local path, any fsspec URL (s3://, gs://, https://), or a command (webdataset's `pipe:`)."""

import subprocess
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.config import conf

PIPE = "pipe:"


def is_remote(place: str) -> bool:
    """Whether a place is anything but a path of this machine's file system."""
    return "://" in place or place.startswith(PIPE)


def join(directory: str, name: str) -> str:
    """The place of `name` in a directory; a place of its own (an URL, an absolute path) stays as it is."""
    if is_remote(name) or Path(name).is_absolute():
        return name
    return f"{directory.rstrip('/')}/{name}"


def open_stream(place: str) -> IO[bytes]:
    """Read from the start. Raises OSError (FileNotFoundError among them) when there is nothing."""
    if place.startswith(PIPE):
        process = subprocess.Popen(place[len(PIPE) :], shell=True, stdout=subprocess.PIPE)
        assert process.stdout
        return _Piped(process)  # type: ignore[return-value]
    system, path = _system(place)
    return system.open(path, "rb")


def read_range(place: str, start: int, end: int) -> bytes:
    """Bytes [start, end) without reading what lies before. Raises OSError; a `pipe:` has no ranges."""
    if place.startswith(PIPE):
        raise OSError(f"{place}: a command has no ranges to read")
    system, path = _system(place)
    return system.cat_file(path, start=start, end=end)


def size(place: str) -> int:
    """Bytes there. Raises OSError."""
    system, path = _system(place)
    return int(system.size(path))


def _system(place: str) -> tuple[Any, str]:
    """The file system of a place and the path in it."""
    if not place.startswith(("http://", "https://")):
        return fsspec.core.url_to_fs(place)
    from aiohttp import ClientTimeout  # slow to import, needed here only

    # Its default is five minutes for a whole file, however long, and as much for a server that has fallen silent.
    timeout = {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    return fsspec.core.url_to_fs(place, client_kwargs=timeout | conf.get("http", {}).get("client_kwargs", {}))


class _Piped:
    """A command's output as a file; a command that fails is an OSError at the end of it, not a short file."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def read(self, count: int = -1) -> bytes:
        assert self.process.stdout
        data = self.process.stdout.read(count)
        if len(data) < count or count < 0:
            code = self.process.wait()
            if code:
                raise OSError(f"{PIPE}{self.process.args}: ended with status {code}")
        return data

    def close(self) -> None:
        if self.process.stdout:
            self.process.stdout.close()  # a command that still writes gets SIGPIPE
        self.process.wait()

    def __enter__(self) -> "_Piped":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
