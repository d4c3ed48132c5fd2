"""Shards fetched ahead of need: the order is known, so are the shards that the next batches need.

One process a node does it, apart from the trainer: its threads, locks and checksums are not in anybody's way, and no
worker is forked from them. It only makes things faster: readers fetch for themselves what is not there yet. The trainer
writes to its standard input which batch it has come to; the end of that input is the end of the process.
"""

import math
import os
import pickle
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mae_dist.errors import UserError
from mae_dist.launched import leave_signals_to_parent
from mae_dist.shards.cache import Cache, Needs
from mae_dist.shards.counters import Counters
from mae_dist.shards.download import Wanted
from mae_dist.shards.order import SampleOrder

THREADS = 8  # downloads at once
PATIENCE = 1.0  # seconds between looks for room
END = -1  # said instead of a batch


@dataclass(frozen=True)
class Course:
    """The samples that the ranks of one node will take.

    `ranks`: of this node; `start`: the first global batch; `shift`: samples of the stream before global batch 0.
    """

    counts: NDArray[np.int64]
    seed: int
    lanes: int
    window: int
    global_batch_size: int
    ranks: range
    world_size: int
    start: int
    shift: int = 0

    def offsets(self) -> NDArray[np.int64]:
        """Places of this node's samples in each global batch."""
        places = np.arange(self.global_batch_size)
        return places[np.isin(places % self.world_size, self.ranks)]

    def upcoming(self) -> Iterator[tuple[int, list[int]]]:
        """(k, the shards that global batch k needs on this node, in the order of their first need), for ever."""
        order = SampleOrder(self.counts, self.seed, self.lanes, self.window)
        k, offsets = self.start, self.offsets()
        while True:
            shards, first = np.unique(
                order.lookup(k * self.global_batch_size + self.shift + offsets).shard, return_index=True
            )
            yield k, shards[np.argsort(first)].tolist()
            k += 1

    def horizon(self) -> int:
        """How many batches to look ahead: two windows of every lane; after that, shards change."""
        samples = min(2 * self.lanes * self.window or math.inf, int(self.counts.sum()))
        return 1 + math.ceil(samples / self.global_batch_size)

    def at_once(self) -> int:
        """About how many shards this node reads side by side, at most."""
        lanes = self.offsets() % self.lanes if self.global_batch_size % self.lanes == 0 else np.arange(self.lanes)
        filled = self.counts[self.counts > 0]
        window = min(self.window or math.inf, -(-int(filled.sum()) // self.lanes))
        return min(len(filled), len(np.unique(lanes)) * (1 + math.ceil(window / filled.mean())))


def check_room(course: Course, shards: list[Wanted | None], cache: Cache) -> None:
    """Raise UserError when the cache cannot hold what is read side by side: shards would come again and again."""
    sizes = [wanted.num_bytes for wanted in shards if wanted]
    need = math.ceil(course.at_once() * sum(sizes) / len(shards)) + max(sizes)  # and one on its way
    assert cache.limit is not None
    if cache.limit < min(need, sum(sizes)):
        raise UserError(
            f"data.cache_bytes: {cache.limit} bytes in {cache.directory} are too few for the about {course.at_once()} "
            f"shards that this node reads side by side; write --data.cache_bytes {min(need, sum(sizes))}, or another "
            f"--data.lanes and --data.window (now {course.lanes} and {course.window}; usual for remote shards: 256 and "
            "4096)"
        )


class Prefetcher:
    """The trainer's end. `shards`: by number, None for a local one. `behind`: batches that workers may still read.

    Raises UserError when the cache is too small for the course.
    """

    def __init__(self, cache: Cache, shards: list[Wanted | None], course: Course, behind: int):
        check_room(course, shards, cache)
        counters = cache.counters.file.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mae_dist.shards.prefetch"],
            stdin=subprocess.PIPE,
            pass_fds=[counters],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it said why on its standard error; readers go on without it
            pickle.dump((cache.directory, cache.limit, counters, shards, course, behind), self.process.stdin)
            self.process.stdin.flush()
        os.set_blocking(self.process.stdin.fileno(), False)

    def at(self, k: int) -> None:
        """The trainer has asked its workers for global batch k."""
        assert self.process.stdin
        with suppress(BrokenPipeError, BlockingIOError):
            os.write(self.process.stdin.fileno(), struct.pack("<q", k))

    def close(self) -> None:
        assert self.process.stdin
        self.at(END)  # closing alone is no end while a forked process has a copy of the pipe
        with suppress(BrokenPipeError, BlockingIOError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it leaves nothing that the next start does not sweep away
            self.process.kill()
            self.process.wait()


class Progress:
    """How far the trainer has come."""

    def __init__(self, start: int):
        self.k, self.changed = start, threading.Condition()

    def follow(self, source: Callable[[int], bytes]) -> None:
        while len(record := source(8)) == 8 and (k := struct.unpack("<q", record)[0]) != END:
            with self.changed:
                self.k = k
                self.changed.notify_all()
        os._exit(0)  # the trainer is gone: whatever is under way is nobody's

    def wait(self, until: int | None = None) -> None:
        """For batch `until`; None: for any change, or a while."""
        with self.changed:
            if until is None:
                self.changed.wait(PATIENCE)
            else:
                self.changed.wait_for(lambda: self.k >= until)


class Fetching:
    """What the process does: walk the course, fetch what is not there, never more than there is room for."""

    def __init__(self, cache: Cache, shards: list[Wanted | None], progress: Progress, behind: int, needs: Needs):
        self.cache, self.shards, self.progress, self.behind, self.needs = cache, shards, progress, behind, needs
        self.last_need: dict[Wanted, int] = {}
        self.under_way: set[Wanted] = set()
        self.slots = threading.Semaphore(THREADS)
        self.spare = max(wanted.num_bytes for wanted in shards if wanted)  # for a reader that fetches by itself

    def walk(self, batches: Iterator[tuple[int, list[int]]], horizon: int) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            for k, numbers in batches:
                self.progress.wait(until=k - horizon)
                wanted = [w for w in (self.shards[n] for n in numbers) if w]
                new = set(wanted) - self.last_need.keys()
                self.last_need |= dict.fromkeys(wanted, k)
                if new:
                    self._publish()
                for shard in new:
                    self.cache.touch(shard)
                for shard in wanted:
                    if shard not in self.under_way and not self.cache.has(shard):
                        self._start(shard, pool)

    def _publish(self) -> None:
        """The shards of batches that are walked and not yet read stay."""
        now = self.progress.k - self.behind
        self.last_need = {shard: k for shard, k in self.last_need.items() if k >= now}
        self.needs.publish(self.last_need)

    def _start(self, shard: Wanted, pool: ThreadPoolExecutor) -> None:
        self.slots.acquire()
        while not self.cache.room_for(shard.num_bytes + self.spare + sum(s.num_bytes for s in tuple(self.under_way))):
            self.progress.wait()
            self._publish()
        self.under_way.add(shard)
        pool.submit(self._fetch, shard)

    def _fetch(self, shard: Wanted) -> None:
        try:
            self.cache.ensure(shard)
        except UserError:
            pass  # the reader that needs it finds the same, and says it
        finally:
            self.under_way.discard(shard)
            self.slots.release()


def main() -> None:
    leave_signals_to_parent()
    directory, limit, counters, shards, course, behind = pickle.load(sys.stdin.buffer)
    cache, progress = Cache(Path(directory), limit, Counters(counters)), Progress(course.start)
    threading.Thread(target=progress.follow, args=[sys.stdin.buffer.read], daemon=True).start()
    with cache.needs() as needs:
        Fetching(cache, shards, progress, behind, needs).walk(course.upcoming(), course.horizon())


if __name__ == "__main__":
    main()
