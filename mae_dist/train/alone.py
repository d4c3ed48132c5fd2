"""One attempt at a time works on a run: its ranks hold a lock on the run's directory.

Every rank has a shared lock on one file; rank 0 gets the first of them only when it has had the file for itself, that
is when no rank of any other attempt lives. The kernel lets go when a process ends, however it ends and wherever.
"""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mae_dist.engine.world import World
from mae_dist.errors import Ended
from mae_dist.local import make_directory

FILE_NAME = "run.lock"
PATIENCE_S = 120.0  # for the attempt before to end; a file server needs a while to miss a dead node
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Taken(Ended):
    """Another attempt works on this run. A scheduler may try again."""

    status = 75


@contextmanager
def alone(run_dir: Path, world: World, patience: float = PATIENCE_S) -> Iterator[None]:
    """Hold the lock, waiting at most `patience` seconds for it. Collective.

    Raises Taken, on every rank, when another attempt goes on. Where the file system has no locks, rank 0 says so.
    """
    make_directory(run_dir)
    with (run_dir / FILE_NAME).open("a+") as file:
        refused = world.broadcast(admit(file, run_dir, patience) if world.is_main else "")
        if refused:
            raise Taken(refused)
        with suppress(OSError):  # rank 0 has said it
            locked(file, fcntl.LOCK_SH)  # rank 0 has one, so nobody has it exclusively
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # closing would leave it to forked workers


def admit(file: IO[str], run_dir: Path, patience: float) -> str:
    """Rank 0's way in: "" when it holds a shared lock and no other attempt does, else what to tell the user."""
    deadline, said = time.monotonic() + patience, False
    try:
        # Between the two the file is free for a moment: whoever slips in then is found by the second.
        while not (locked(file, fcntl.LOCK_EX) and locked(file, fcntl.LOCK_SH)):
            file.seek(0)
            other = file.read().strip() or "another process"
            if time.monotonic() > deadline:
                return f"{run_dir}: {other} trains this run; stop it, or start another run with --train.name NAME"
            if not said:
                print(f"{run_dir}: {other} still works on this run; waiting {patience:.0f} s for its end", flush=True)
            said = True
            time.sleep(0.2)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print(f"warning: {run_dir}: no file locks here ({error.strerror}): do not start a run twice", file=sys.stderr)
        return ""
    note = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')},"
    with suppress(OSError):  # a full disk: the lock itself takes no room
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), note.encode())
    return ""


def locked(file: IO[str], how: int) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
