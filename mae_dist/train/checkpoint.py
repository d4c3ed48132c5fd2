"""A checkpoint exists or it does not.

Written under a temporary name, every rank's bytes fsynced, a barrier, then one rename. Nothing points at a checkpoint:
the newest is found by looking. Retention counts committed ones only.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mae_dist.engine.world import World

COMMITTED = re.compile(r"step-(\d{8})")
META = "meta.json"


def step_of(checkpoint: Path) -> int:
    """Updates done when it was written."""
    match = COMMITTED.fullmatch(checkpoint.name)
    if not match:
        raise ValueError(f"{checkpoint} is not named like a checkpoint (step-00000100)")
    return int(match[1])


def committed(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first."""
    found = [path for path in root.glob("step-*") if COMMITTED.fullmatch(path.name)]
    return sorted(found, key=step_of)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpoints:
    """The checkpoints of one run, in `root`. Every rank calls every method."""

    def __init__(self, root: Path, world: World, keep: int):
        self.root, self.world, self.keep = root, world, keep
        if world.is_main:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(".*"):  # of a process that was killed while saving or deleting
                shutil.rmtree(leftover)
        world.barrier()

    def newest(self) -> Path | None:
        """The newest committed checkpoint; rank 0 looks, so that all ranks take the same."""
        found = committed(self.root) if self.world.is_main else []
        return self.world.broadcast(found[-1] if found else None)

    def save(self, step: int, write: Callable[[Path], list[Path]], meta: dict) -> Path:
        """Commit what `write(directory)`, called on every rank, leaves in a directory, with `meta` as JSON."""
        final = self.root / f"step-{step:08d}"
        aside = self.root / f".{final.name}"
        if self.world.is_main:
            aside.mkdir()
        self.world.barrier()
        for path in write(aside):
            fsync(path)
        self.world.barrier()
        if self.world.is_main:
            (aside / META).write_text(json.dumps({"step": step} | meta, indent=1) + "\n")
            fsync(aside / META)
            fsync(aside)
            aside.rename(final)
            fsync(self.root)
            self._retire()
        self.world.barrier()
        return final

    def _retire(self) -> None:
        for old in committed(self.root)[: -self.keep]:
            doomed = old.rename(self.root / f".old-{old.name}")  # never half a checkpoint under a committed name
            shutil.rmtree(doomed)


def read_meta(checkpoint: Path) -> dict:
    return json.loads((checkpoint / META).read_text())
