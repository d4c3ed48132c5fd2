"""Worker processes that write into one piece of shared memory; only numbers cross the pipes.

The memory is a ring of slots, a batch each: a table of what to make (int64 rows, filled in by the trainer; workers may
write what they found) and the pixels. A batch is cut into tasks of a few images, so that all workers make the next
batch together. A task is one number in a pipe that all workers read; done, the same number goes into another. Pipes
hand out eight bytes at once or none, and these never fill up: a killed worker leaves no half message and no lock.
"""

import fcntl
import mmap
import os
import select
import signal
import struct
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_dist.errors import Ended, Unreadable, UserError
from mae_dist.launched import leave_signals_to_parent

TASK = 8  # images
AHEAD = 3  # batches being made or ready
HELD = 3  # batches that the reader may keep in place; of further ones it gets copies
NUMBER = struct.Struct("q")
TEXT = 8192  # bytes for the words of a worker that failed
PATIENCE = 200  # milliseconds between looks whether the other side lives
PAGE = mmap.PAGESIZE

Table = NDArray[np.int64]
Fill = Callable[[Table, Tensor], None]
KINDS = {"P": Unreadable, "U": UserError}  # of a worker's errors, the narrower first; all others are faults of ours


STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a disk", "R": "running"}
STUCK = 6  # times the limit, for workers that nobody has stopped: files may be slow
KILLED = 5.0  # seconds for a killed worker to be gone: one that waits for a dead file server stays

waited_for: "weakref.WeakSet[Ring]" = weakref.WeakSet()
"""The rings of this process."""


class WorkerDied(Ended):
    """A data worker ended, or stands still, although nobody told it to."""

    status = 75  # a restart may well cure it


def late_workers() -> str:
    """Which data workers this process waits for now, with their states; empty: for none. From any thread."""
    return "; ".join(text for ring in list(waited_for) if (text := ring.late()))


class Ring:
    """`batch`: the most rows of a table. `fill(rows, images)`: makes images of a batch, in a worker. `pin`: for CUDA.
    `together`: rows in a row that one task makes.

    `run` raises what a worker raised (UserError as it was, all else as RuntimeError with the worker's traceback), and
    WorkerDied, with name and cause, when one was killed or nothing came for longer than `limit`. `close` ends the
    workers; they also end with the trainer, however that ends.
    """

    limit = 240.0
    """Seconds to wait for workers that are stopped, less than ranks wait for each other; `STUCK` times for others."""

    def __init__(
        self,
        fill: Fill,
        workers: int,
        batch: int,
        columns: int,
        shape: tuple[int, int, int],
        pin: bool,
        together: int = 1,
    ):
        self.fill = fill
        self.ahead = batches_ahead(workers, batch)
        slots = self.ahead + HELD
        (self.tasks, self.new), (self.done, self.made) = os.pipe(), os.pipe()
        most = min(fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) for pipe in (self.new, self.made)) // NUMBER.size // 2
        self.task = -(-max(TASK, -(-slots * batch // most)) // together) * together
        self.pieces = -(-batch // self.task)
        rows, pixels = (-(-size // PAGE) * PAGE for size in (batch * columns * 8, batch * int(np.prod(shape))))
        first = -(-(slots * 8 + workers * (8 + TEXT)) // PAGE) * PAGE
        # Anonymous memory, shared by fork: no limit of /dev/shm (64 MB in many containers) and nothing to clean up.
        self.memory = mmap.mmap(-1, first + slots * (rows + pixels))
        starts = range(first, len(self.memory), rows + pixels)
        self.tables = [np.ndarray((batch, columns), np.int64, self.memory, start) for start in starts]
        channels, height, width = shape
        last = batch, height, width, channels
        self.images = [np.ndarray(last, np.uint8, self.memory, start + rows).transpose(0, 3, 1, 2) for start in starts]
        self.lengths = np.ndarray(slots, np.int64, self.memory)
        self.begun = np.ndarray(workers, np.int64, self.memory, slots * 8)  # seconds; 0: waiting for a task
        self.since = 0.0  # when the trainer began to wait; 0: it does not
        self.free, self.held = deque(range(slots)), set()
        self.undone = [0] * slots  # tasks
        os.set_blocking(self.tasks, False)  # several workers wake for one task
        self.trainer = os.getpid()
        self.workers = dict(enumerate(self._start(worker) for worker in range(workers)))  # number: process id
        waited_for.add(self)
        pinned = self.memory if pin and _pin(self.memory) else None
        self.close = weakref.finalize(
            self, _end, self.trainer, self.workers, (self.tasks, self.new, self.done, self.made), pinned
        )

    def run(self, tables: Iterable[Table]) -> Iterator[tuple[Table, Tensor]]:
        """A batch of each table, in order: (the table as workers left it, (B, C, H, W) uint8, channels last in memory).

        An images tensor stays as it is for as long as anybody holds it or a view of it.
        """
        tables, coming = iter(tables), deque()
        while True:
            while len(coming) < self.ahead and (table := next(tables, None)) is not None:
                coming.append(self._submit(table))
            if not coming:
                return
            self._wait(coming[0])
            yield self._hand_out(coming.popleft())

    def _submit(self, table: Table) -> int:
        slot = self.free.popleft()
        self.tables[slot][: len(table)] = table
        self.lengths[slot] = len(table)
        self.undone[slot] = -(-len(table) // self.task)
        first = slot * self.pieces
        os.write(self.new, b"".join(map(NUMBER.pack, range(first, first + self.undone[slot]))))
        return slot

    def _wait(self, slot: int) -> None:
        """Until every task of a slot is done."""
        poll = select.poll()
        poll.register(self.done, select.POLLIN)
        self.since = time.monotonic()
        while True:
            ready = poll.poll(PATIENCE if self.undone[slot] else 0)
            self.since = time.monotonic() if ready else self.since
            for (number,) in NUMBER.iter_unpack(os.read(self.done, 1 << 15) if ready else b""):
                if number < 0:
                    self._raise(-number - 1)
                self.undone[number // self.pieces] -= 1
            self._look_for_dead()
            if not self.undone[slot]:
                self.since = 0.0
                return
            self._look_for_stuck()

    def _hand_out(self, slot: int) -> tuple[Table, Tensor]:
        length = int(self.lengths[slot])
        table, images = self.tables[slot][:length].copy(), self.images[slot][:length]
        if len(self.held) == HELD:
            self.free.append(slot)
            return table, torch.from_numpy(images.copy(order="K"))
        self.held.add(slot)
        weakref.finalize(images, self._take_back, slot).atexit = False  # when the tensor and its views are gone
        return table, torch.from_numpy(images)

    def _take_back(self, slot: int) -> None:
        self.held.discard(slot)
        self.free.append(slot)

    def _raise(self, worker: int) -> None:
        text = self._text(worker).tobytes().rstrip(b"\0").decode(errors="surrogateescape")
        if kind := KINDS.get(text[0]):
            raise kind(text[1:])
        raise RuntimeError(f"data worker {worker} (pid {self.workers[worker]}) failed:\n{text[1:]}")

    def _text(self, worker: int) -> NDArray[np.uint8]:
        return np.ndarray(TEXT, np.uint8, self.memory, self.begun.nbytes + self.lengths.nbytes + worker * TEXT)

    def _look_for_dead(self) -> None:
        for worker, pid in self.workers.items():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self.workers[worker]
                code = os.waitstatus_to_exitcode(status)
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                advice = "; if nobody did that, the node ran out of memory" if code == -signal.SIGKILL else ""
                raise WorkerDied(f"data worker {worker} (pid {pid}) {how}{advice}; the same command resumes the run")

    def _look_for_stuck(self) -> None:
        waited = time.monotonic() - self.since
        if waited > self.limit:
            stopped = any(state_of(pid) in "Tt" for pid in self.workers.values())
            if stopped or waited > STUCK * self.limit:
                raise WorkerDied(f"waited {waited:.0f} s for {self.late()}; the same command resumes the run")

    def late(self) -> str:
        """The workers that are waited for: those at a task, or, when none is, those that should have taken one."""
        began, now = self.since, time.monotonic()
        if not began or now - began < 2 * PATIENCE / 1000:
            return ""
        workers = list(self.workers.items())
        busy = [(n, pid, int(self.begun[n])) for n, pid in workers if self.begun[n]] or [
            (n, pid, 0) for n, pid in workers
        ]
        return "; ".join(
            f"data worker {n} (pid {pid}, {STATES.get(state_of(pid), 'sleeping')})"
            + (f", {now - since:.0f} s at a task" if since else "")
            for n, pid, since in busy[:8]
        )

    def _start(self, worker: int) -> int:
        """Fork, not spawn: source and function need not travel, memory is shared, workers begin at once."""
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            self._work(worker)
            status = 0
        finally:
            os._exit(status)  # nothing of the trainer's is flushed, joined or cleaned up here

    def _work(self, worker: int) -> None:
        """A worker's life. The signals that a scheduler sends to every process are the trainer's to act on."""
        leave_signals_to_parent()
        os.close(self.done)  # so that no write waits for a trainer that is gone
        torch.set_num_threads(1)
        poll = select.poll()
        poll.register(self.tasks, select.POLLIN)
        while os.getppid() == self.trainer:
            if not poll.poll(PATIENCE):
                continue
            try:
                (number,) = NUMBER.unpack(os.read(self.tasks, NUMBER.size))
            except BlockingIOError:
                continue  # another worker was faster
            slot, piece = divmod(number, self.pieces)
            begin = piece * self.task
            end = min(begin + self.task, int(self.lengths[slot]))
            self.begun[worker] = int(time.monotonic())
            try:
                self.fill(self.tables[slot][begin:end], torch.from_numpy(self.images[slot][begin:end]))
            except BaseException as error:
                letter = next((letter for letter, kind in KINDS.items() if isinstance(error, kind)), "")
                words = f"{letter}{error}" if letter else f"T{traceback.format_exc()[-TEXT // 4 :]}"
                text = words.encode(errors="surrogateescape")[:TEXT]  # a path may be no UTF-8
                self._text(worker)[: len(text)] = np.frombuffer(text, np.uint8)
                number = -worker - 1
                poll.unregister(self.tasks)  # its words stay as they are; it only waits for the end
            self.begun[worker] = 0
            os.write(self.made, NUMBER.pack(number))


def batches_ahead(workers: int, batch: int) -> int:
    """Batches being made or ready before they are asked for: at least as many as keep every worker busy."""
    return max(AHEAD, -(-3 * workers * TASK // batch))


def state_of(pid: int) -> str:
    """One letter, as `ps` shows it: R, S, D (waits for a disk), T (stopped), ...; Z for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def _pin(memory: mmap.mmap) -> bool:
    """Register with CUDA, so that copies run beside the computation; without that they are only slower."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    runtime: Any = torch.cuda.cudart()
    return int(runtime.cudaHostRegister(address, len(memory), 0)) == 0


def _end(trainer: int, workers: dict[int, int], pipes: tuple[int, ...], pinned: mmap.mmap | None) -> None:
    if os.getpid() != trainer:
        return  # a copy of the ring in some other worker
    for pid in workers.values():
        os.kill(pid, signal.SIGKILL)  # they hold nothing that could break
    deadline = time.monotonic() + KILLED
    while workers and time.monotonic() < deadline:
        for worker in [n for n, pid in workers.items() if os.waitpid(pid, os.WNOHANG)[0]]:
            del workers[worker]
        if workers:
            time.sleep(0.002)
    workers.clear()
    for pipe in pipes:
        os.close(pipe)
    if pinned is not None:
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(np.frombuffer(pinned, np.uint8).ctypes.data)
