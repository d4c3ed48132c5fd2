"""What the ranks of a run know of each other without talking: one small file each in `logs`, rewritten as they go on.

It works when no collective does, on any number of nodes (the run's directory is shared); it costs a write a second.
"""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mae_dist.engine.world import World
from mae_dist.track.tracker import is_gone
from mae_dist.urls import masked

SIZE = 1024  # bytes of a file: written at once and never shorter, so that no reader sees half of it
# How the last phase of a rank begins:
FAILED, MISTAKE, STOPPED, LEFT = "failed: ", "mistake: ", "stopped by signal ", "left"


def host() -> str:
    """Where a process id means something: containers that share a host name have numbers of their own."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


HOST = host()


class Beat(NamedTuple):
    """What a rank wrote last."""

    rank: int
    pid: int
    host: str
    step: int
    phase: str
    """What it is at, or how it ended."""
    seconds: float
    """For how long."""
    age: float
    """Seconds ago, by the clock of the file system."""
    late: str = ""
    """The data workers that it waits for."""

    def is_dead(self) -> bool:
        """Whether the process is gone without a word; only known of this rank's own node."""
        return self.host == HOST and self.phase != LEFT and is_gone(self.pid, is_child=False)


class Board:
    """The files of all ranks. Collective to make; a full disk only makes it blind."""

    def __init__(self, logs: Path, world: World):
        self.logs, self.rank, self.file = logs, world.rank, -1
        if world.is_main:
            with suppress(OSError):
                logs.mkdir(parents=True, exist_ok=True)
                for old in logs.glob("rank-*.beat"):  # of the attempt before
                    old.unlink()
        world.barrier()
        with suppress(OSError):
            self.file = os.open(self.path(self.rank), os.O_WRONLY | os.O_CREAT, 0o666)

    def path(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.beat"

    def write(self, step: int, phase: str, seconds: float = 0.0, late: str = "") -> None:
        phase, late, text = masked(phase)[: SIZE // 2], late[: SIZE // 4], b""
        while not text or (len(text) > SIZE and phase + late):  # letters may take some bytes each
            content = [self.rank, os.getpid(), HOST, step, phase, round(seconds, 1), late]
            text = json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace")  # as JSON escapes
            phase, late = phase[: len(phase) * 4 // 5], late[: len(late) * 4 // 5]
        with suppress(OSError):
            os.pwrite(self.file, text.ljust(SIZE)[:SIZE], 0)

    def read(self) -> list[Beat]:
        """Of all ranks that have written, in their order."""
        found = []
        with suppress(OSError):
            now = self.path(self.rank).stat().st_mtime
            for path in self.logs.glob("rank-*.beat"):
                with suppress(OSError, ValueError):
                    rank, pid, host, step, phase, seconds, *late = json.loads(path.read_bytes())
                    age = max(0.0, now - path.stat().st_mtime)
                    found.append(Beat(rank, pid, host, step, phase, seconds, age, *late))
        return sorted(found)
