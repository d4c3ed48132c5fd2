"""What a piece of code does to files, call by call: recorded, failed or killed at any one of them."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_listeners: list[Callable[["Call"], None]] = []
_hooked = False


class Call(NamedTuple):
    """`write`: opened for writing; `fsync`; `rename`, to `target`; `remove`; `mkdir`."""

    kind: str
    path: str
    target: str = ""


def _audit(event: str, arguments: tuple) -> None:
    if not _listeners:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        if arguments[2] & WRITES:
            _tell(Call("write", os.fsdecode(arguments[0])))
    elif event == "os.rename":
        _tell(Call("rename", os.fsdecode(arguments[0]), os.fsdecode(arguments[1])))
    elif event in ("os.remove", "os.mkdir"):
        _tell(Call(event.removeprefix("os."), os.fsdecode(arguments[0])))


def _tell(call: Call) -> None:
    for listener in tuple(_listeners):
        listener(call)


@contextmanager
def listening(under: Path, listener: Callable[[Call], None]) -> Iterator[None]:
    """Before each call on a file below `under`, in this process, `listener(call)`; what it raises, the call raises."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_audit)  # for ever: it cannot be taken away
        _hooked = True
    really = os.fsync

    def fsync(descriptor: int) -> None:
        _tell(Call("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        really(descriptor)

    def ours(call: Call) -> None:
        if Path(call.path).is_relative_to(under):
            listener(call)

    _listeners.append(ours)
    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = really
        _listeners.remove(ours)


def record(under: Path, work: Callable[[], object]) -> list[Call]:
    """The calls of `work` on files below `under`, in order."""
    calls: list[Call] = []
    with listening(under, calls.append):
        work()
    return calls


def killed_at(n: int, under: Path, work: Callable[[], object]) -> bool:
    """Do `work` in a process that dies before its n-th call, from 0; False when it ended before that."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(_: Call) -> None:
            nonlocal seen
            if seen == n:
                os._exit(77)
            seen += 1

        status = 1
        try:
            with listening(under, count):
                work()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 77), status
    return status == 77


def failing(error: OSError, n: int) -> Callable[[Call], None]:
    """A listener that raises `error` at the n-th call, from 0, and at all after it, as a disk does that has failed."""
    seen = 0

    def count(_: Call) -> None:
        nonlocal seen
        seen += 1
        if seen > n:
            raise error

    return count


def not_durable(calls: list[Call]) -> list[str]:
    """What a power cut could undo: names given before the bytes are on disk, or not on disk before the next name."""
    unsynced: set[str] = set()  # files, and directories for the names given in them
    named_in, wrong = "", []
    for call in calls:
        if call.kind == "write":
            unsynced.add(call.path)
        elif call.kind in ("fsync", "remove"):
            unsynced.discard(call.path)
        elif call.kind == "rename":
            wrong += [f"{named_in} before {call.target}"] if named_in in unsynced else []
            moved = {path for path in unsynced if Path(path).is_relative_to(call.path)}
            wrong += [f"{path} before {call.target}" for path in sorted(moved)]
            named_in = str(Path(call.target).parent)
            unsynced = (unsynced - moved) | {named_in}
    return wrong + ([f"{named_in} at the end"] if named_in in unsynced else [])
