"""Bytes at a place: a local path, any fsspec URL (s3://, gs://, https://), or a command (webdataset's `pipe:`)."""

import io
import os
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mae_dist.errors import UserError
from mae_dist.local import regular
from mae_dist.shards import web
from mae_dist.urls import masked

PIPE = "pipe:"
VARIABLE = "PIPE_COMMAND"  # holds the command that the shell is to run
SILENCE = 60  # seconds without a byte after which nothing more is expected


def is_remote(place: str) -> bool:
    """Whether a place is anything but a path of this machine's file system."""
    return "://" in place or place.startswith(PIPE)


def join(directory: str, name: str) -> str:
    """The place of `name` in a directory; a place of its own (an URL, an absolute path) stays as it is."""
    if is_remote(name) or Path(name).is_absolute():
        return name
    query = ""
    if directory.startswith(web.SCHEMES):  # a token in the address of a directory opens what lies in it
        directory, mark, query = directory.partition("?")
        query = mark + query
    return f"{directory.rstrip('/')}/{name}{query}"


def open_stream(place: str) -> IO[bytes]:
    """Read from the start. Raises what clients do when there is nothing, often OSError."""
    if place.startswith(PIPE):
        return io.BufferedReader(_Piped(place[len(PIPE) :]), 1 << 20)
    if place.startswith(web.SCHEMES):
        return web.open_stream(place, SILENCE)
    system, path = _system(place)
    return system.open(path, "rb")


def read_range(place: str, start: int, end: int) -> bytes:
    """Bytes [start, end) without reading what lies before. Raises what clients do, often OSError.

    A `pipe:` has no ranges; of a server without any more bytes come, the file's first: look at the length.
    """
    if place.startswith(PIPE):
        raise OSError(f"{masked(place)}: a command has no ranges to read")
    if place.startswith(web.SCHEMES):
        return web.read_range(place, start, end, SILENCE)
    system, path = _system(place)
    return system.cat_file(path, start=start, end=end)


def size(place: str) -> int:
    """Bytes there. Raises OSError."""
    if place.startswith(web.SCHEMES):
        return web.size(place, SILENCE)
    system, path = _system(place)
    return int(system.size(path))


def _system(place: str) -> tuple[Any, str]:
    """The file system of a place and the path in it.

    Raises UserError for a kind of place that nothing here reads, ValueError for a FIFO, OSError for a local path
    without a file.
    """
    try:
        system, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:  # no package for it, or no such protocol
        raise UserError(f"{place}: {' '.join(str(error).split())}") from error
    if isinstance(system, LocalFileSystem):
        regular(Path(path))
    return system, path


class _Piped(io.RawIOBase):
    """A command's output as a file.

    A command that fails is an OSError at the end of it, not a short file; one that falls silent is a TimeoutError.
    Closing it ends the command and all that it has started.
    """

    def __init__(self, command: str):
        self.command = masked(command)
        # By the environment: a list of processes shows everybody the arguments of a shell. Its own process group: what
        # is killed is the whole of `fetch | unpack`, not only the shell.
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", f'command=${VARIABLE}; unset {VARIABLE}; eval "$command"'],
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,
            env=os.environ | {VARIABLE: command},
        )
        assert self.process.stdout
        self.output, self.has_come = self.process.stdout, select.poll()
        self.has_come.register(self.output, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        if not self.has_come.poll(1000 * SILENCE):
            self._give_up("sent no byte")
        count = os.readv(self.output.fileno(), [into])
        if count == 0:
            try:
                code = self.process.wait(SILENCE)
            except subprocess.TimeoutExpired:
                self._give_up("did not end")
            if code:
                raise OSError(f"{PIPE}{self.command}: ended with status {code}")
        return count

    def _give_up(self, what: str) -> NoReturn:
        self.close()
        raise TimeoutError(f"{PIPE}{self.command}: {what} for {SILENCE} seconds and was killed")

    def close(self) -> None:
        if not self.closed:
            if self.process.returncode is None:  # not waited for yet, so the number is still its own
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.output.close()
        super().close()
