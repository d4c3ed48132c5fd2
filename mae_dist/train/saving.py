"""When a checkpoint is written, what the training waits for, and what is done when it cannot be written.

The loop waits for the copy of the state; a thread of each rank writes it while the training goes on, one save at a
time. A save that fails on the way (a full disk) is said aloud, its files are deleted, and it is tried again soon: the
training goes on. The last one, and the one on a signal, is waited for, and when it fails the run fails.
"""

import errno
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mae_dist.errors import UserError, machine_fault
from mae_dist.launched import STOP_SIGNALS
from mae_dist.track.journal import Journal
from mae_dist.train.checkpoint import Checkpoints, Share
from mae_dist.train.health import TrainingDiverged, go_back
from mae_dist.train.progress import say

RETRY = 60.0  # seconds after a save that failed, until the next log step that tries again
PATIENCE = 600.0  # seconds from the end of rank 0's own files to the end of the slowest rank's
LEAVING = 5.0  # the same, when the training has ended with an error: the others may be dead
SPARE = 1 << 20  # bytes for headers and meta.json


class SaveFailed(UserError):
    """The last checkpoint, or the one on a signal, could not be written. The same on all ranks."""


class Write(threading.Thread):
    """One rank's part of one save; on rank 0 the commit too. An error is kept, not raised."""

    def __init__(self, checkpoints: Checkpoints, step: int, snapshot: Share, meta: dict, patience: float):
        super().__init__(name=f"save-{step}", daemon=True)  # Saver.leave waits for it, but not for ever
        self.checkpoints, self.step, self.meta, self.patience = checkpoints, step, meta, patience
        self.snapshot: Share | None = snapshot
        self.written, self.abort = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.bytes, self.seconds, self.reported = 0, 0.0, False
        self.start()

    def run(self) -> None:
        began, checkpoints = time.perf_counter(), self.checkpoints
        assert self.snapshot
        try:
            checkpoints.write_share(self.step, self.snapshot)
            self.snapshot = None  # gigabytes
            self.written.set()
            if checkpoints.world.is_main:
                self.bytes = checkpoints.commit(self.step, self.meta, self.abort, self.patience)
                checkpoints.retire()
        except Exception as error:
            self.snapshot = None
            self._tell(error)  # before the ranks learn of it and rank 0 stops looking for why
            # The traceback of a full disk says nothing, and keeps the snapshot alive.
            self.error = error.with_traceback(None) if isinstance(error, OSError) else error
            self.written.set()
        self.seconds = time.perf_counter() - began

    def _tell(self, error: Exception) -> None:
        """Let rank 0 say what went wrong here; if it cannot be told, say it here, unless it gave up before."""
        there = self.checkpoints.aside(self.step).exists()
        try:
            self.checkpoints.discard(self.step, explain(error))
        except OSError:
            if there:
                rank = self.checkpoints.world.rank
                print(f"warning: checkpoint of step {self.step}, rank {rank}: {error}", file=sys.stderr, flush=True)


class Saver:
    """Makes the checkpoints of a run. Every rank calls `save` after the same steps; `journal` is rank 0's.

    `take`: makes this rank's share of a checkpoint; with `in_background`, one that later steps leave alone. Collective.
    `needed`: its bytes on all ranks together.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        take: Callable[[], Share],
        needed: int,
        in_background: bool = True,
        minutes: float | None = None,
        journal: Journal | None = None,
        patience: float = PATIENCE,
    ):
        self.checkpoints, self.take, self.needed, self.journal = checkpoints, take, needed + SPARE, journal
        self.world, self.in_background, self.patience = checkpoints.world, in_background, patience
        self.seconds = math.inf if minutes is None else minutes * 60
        self.last, self.retry_at, self.failures, self.why = time.monotonic(), math.inf, 0, ""
        self.write: Write | None = None

    @property
    def due(self) -> bool:
        """Whether the clock asks for a save; rank 0's counts."""
        now = time.monotonic()
        return self.world.is_main and (now - self.last >= self.seconds or now >= self.retry_at)

    def save(self, step: int, meta: dict, wait: bool, streak: int = 0) -> None:
        """Commit a checkpoint, after the journal that leads to it. Collective.

        With `wait` it is there, or SaveFailed is raised on all ranks, when this returns; else it is on its way. After a
        `streak` of skipped updates, which may come of an update that ruined the weights, it is put off: it would push
        out a checkpoint from before. Raises TrainingDiverged, and commits nothing, for weights that are not finite.
        """
        began = time.perf_counter()
        if streak and not wait:
            self.retry_at = time.monotonic()  # at the next log step
            return
        with undisturbed():
            self._finish()  # one at a time
            self.last, self.retry_at = time.monotonic(), math.inf
            if self.journal:
                self.journal.sync()
            failed = bool(self._no_room())
            if failed:
                self._failed(step)
            else:
                snapshot = self.take()
                if snapshot.broken:
                    harm = go_back(f"{snapshot.broken} is not finite", step, self.checkpoints.root)
                    raise TrainingDiverged(f"step {step} is not saved. {harm}")
                self.write = Write(self.checkpoints, step, snapshot, meta, self.patience)
                failed = (wait or not self.in_background) and self._finish()
            if failed and wait:
                why = self.world.broadcast(self.why)
                raise SaveFailed(f"the checkpoint of step {step} could not be saved: {why}")
            self._note(step, {"perf/save_stall_s": time.perf_counter() - began})

    def _finish(self) -> bool:
        """Wait until no rank writes any more; returns whether one failed. Collective.

        All ranks meet again and again meanwhile, so a slow disk is no hang, and a dead rank is seen.
        """
        if self.write is None:
            return False
        running = failed = 1.0
        while running:
            state = torch.tensor([self.write.is_alive(), self.write.error is not None], dtype=torch.float32)
            running, failed = self.world.max(state.to(self.world.device)).tolist()
            if failed:
                self.write.abort.set()
            if running:
                self.write.join(0.1)
        if failed and self.world.is_main:
            self.checkpoints.discard(self.write.step)  # what a slower rank wrote when rank 0 had given up
        self.report()
        self.write = None
        return bool(failed)

    def report(self) -> None:
        """Say what became of a save, once it is over. Raises what is no fault of the disk."""
        write = self.write
        if write is None or write.is_alive() or write.reported:
            return
        write.reported = True
        if write.error and not isinstance(write.error, OSError):
            raise write.error
        if write.error:
            self.why = explain(write.error)
            self._failed(write.step)
        else:
            self._note(write.step, {"perf/save_s": write.seconds, "perf/checkpoint_mb": write.bytes / 1e6})
            if self.world.is_main:
                say(f"step {write.step}: checkpoint saved, {write.bytes / 1e6:.1f} MB in {write.seconds:.1f} s")

    def _failed(self, step: int) -> None:
        """Say that the checkpoint of `step` is not there, `why`; soon there is another try."""
        self.failures += 1
        self.retry_at = time.monotonic() + RETRY
        if self.world.is_main:
            print(f"warning: no checkpoint of step {step}: {self.why}", file=sys.stderr, flush=True)
        self._note(step, {"progress/failed_saves": float(self.failures)})

    def _note(self, step: int, metrics: dict[str, float]) -> None:
        if self.journal:
            self.journal.write({"kind": "metrics", "step": step, "metrics": metrics})

    def _no_room(self) -> str:
        """Why the next checkpoint does not fit on the disk, as rank 0 sees it; empty when it does. Collective."""
        root, needed = self.checkpoints.root, self.needed
        try:
            free = shutil.disk_usage(root).free
            full = f"{root}: a checkpoint needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
            why = explain(OSError(errno.ENOSPC, full)) if free < needed else ""
        except OSError as error:
            why = str(error)
        self.why = self.world.broadcast(why)
        return self.why

    def check_room(self) -> None:
        """Raise UserError, before the first step, when not even one checkpoint could be written. Collective."""
        if self._no_room():
            raise UserError(self.why)

    def leave(self) -> None:
        """The training is over, with an error perhaps: let a save that all ranks can finish be finished."""
        write = self.write
        if write is None or write.reported:
            return
        with undisturbed():
            write.written.wait(self.patience)
            write.join(LEAVING)
            write.abort.set()
            write.join(LEAVING)
            if write.is_alive() or write.error:
                why = explain(write.error) if write.error else "the run ended before it"
                print(f"warning: no checkpoint of step {write.step}: {why}", file=sys.stderr, flush=True)


def explain(error: Exception) -> str:
    """What went wrong, and what to do if the disk is full."""
    if not isinstance(error, OSError):
        return f"{type(error).__name__}: {error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(machine_fault(error) or error)
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return f"{text}; make room there, or keep fewer: train.keep_checkpoints, train.keep_every"


@contextmanager
def undisturbed() -> Iterator[None]:
    """Stop signals that come meanwhile are handled afterwards, so that a second one does not break a save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    kept = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in came:
            signal.raise_signal(number)
