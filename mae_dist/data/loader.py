"""Batches of uint8 pixels from worker processes, in the order of `SampleOrder`."""

import atexit
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mae_dist.data.augment import augment, centre
from mae_dist.data.options import DataConfig
from mae_dist.data.source import Source
from mae_dist.errors import UserError
from mae_dist.shards.order import FileOrder, SampleOrder, Samples
from mae_dist.shards.prefetch import Course

PREFETCH = 4  # batches ahead, each worker


class Batch(NamedTuple):
    images: Tensor
    """(B, C, H, W) uint8."""
    ids: Tensor
    """(B,) int64: place of each sample in the data set, shards laid end to end."""
    epochs: Tensor
    """(B,) int64."""
    labels: Tensor
    """(B,) int64, -1 where there is none."""


class Views(Dataset):
    """Views of the samples at some positions; a worker makes a whole batch at once.

    `lookup`: positions to samples. `view`: (pixels (H, W, C) uint8, epoch, sample) to (C, h, w) uint8.
    """

    def __init__(self, source: Source, lookup: Callable[[ArrayLike], Samples], view: Callable[..., Tensor]):
        self.source, self.lookup, self.view = source, lookup, view

    def __getitems__(self, positions: NDArray[np.int64]) -> Batch | UserError:
        samples = self.lookup(positions)
        images, labels = [], []
        try:
            for epoch, shard, index, sample in np.stack(samples, axis=1).tolist():
                pixels, label = self.source.pixels(shard, index)
                images.append(self.view(pixels, epoch, sample))
                labels.append(label)
        except UserError as error:  # sent as a value: a DataLoader would bury the message in a traceback
            return error
        return Batch(
            torch.stack(images), torch.from_numpy(samples.id), torch.from_numpy(samples.epoch), torch.tensor(labels)
        )


class RankPositions(Sampler):
    """Positions of this rank's micro-batches, from global batch `start` on, without end.

    Rank r takes positions r, r + W, ... of each global batch, cut into `accumulate` micro-batches.
    """

    def __init__(self, start: int, global_batch_size: int, accumulate: int, rank: int, world_size: int):
        self.start, self.global_batch_size, self.accumulate = start, global_batch_size, accumulate
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        k = self.start
        while True:
            first = k * self.global_batch_size
            mine = np.arange(first + self.rank, first + self.global_batch_size, self.world_size)
            yield from np.split(mine, self.accumulate)
            k += 1


def fetched_ahead(
    positions: RankPositions, source: Source, course: Course, workers: int
) -> Iterator[NDArray[np.int64]]:
    """The positions of a rank; on the first rank of a node, remote shards are fetched for the node as they go."""
    behind = 1 + PREFETCH * max(1, workers)
    prefetcher = source.prefetcher(course, behind) if course.ranks else None
    try:
        for micro_batch in positions:
            if prefetcher:
                prefetcher.at(int(micro_batch[0]) // positions.global_batch_size)
            yield micro_batch
    finally:
        if prefetcher:
            prefetcher.close()


def _start_worker(_: int) -> None:
    """Workers end when their trainer does; the signals that a scheduler sends to all processes are the trainer's."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


_running: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _stop_workers() -> None:
    """At exit multiprocessing ends workers by SIGTERM, which ours ignore: end them through their loader first."""
    for batches in list(_running):
        batches.close()


def _batches(views: Views, positions: Iterable, workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    batches = _generate(views, positions, workers, pin_memory)
    _running.add(batches)
    return batches


def _generate(views: Views, positions: Iterable, workers: int, pin_memory: bool) -> Iterator[Batch]:
    loader = DataLoader(
        views,
        batch_sampler=positions,
        collate_fn=lambda batch: batch,
        num_workers=workers,
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin_memory,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class ImageStream:
    """The training batches of one rank, for ever, beginning with global batch `start`.

    `source`: where pixels come from. `size`: (height, width) of the views. Which samples come, and how each is cropped
    and flipped, depend on (seed, epoch, sample) only. Yields `accumulate` micro-batches for each global batch.
    `node`: the ranks whose remote shards this one has fetched ahead (None: its own). An unreadable image raises
    UserError, naming it.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        config: DataConfig,
        seed: int,
        global_batch_size: int,
        accumulate: int = 1,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        node: range | None = None,
    ):
        self.order = SampleOrder(source.counts, seed, config.lanes, config.window)
        self.positions = RankPositions(start, global_batch_size, accumulate, rank, world_size)
        self.views = Views(source, self.order.lookup, partial(augment, size=size, config=config, seed=seed))
        self.workers, self.pin_memory = config.workers, pin_memory
        ranks = range(rank, rank + 1) if node is None else node
        self.course = Course(
            self.order.counts, seed, config.lanes, config.window, global_batch_size, ranks, world_size, start
        )

    def __iter__(self) -> Iterator[Batch]:
        positions = fetched_ahead(self.positions, self.views.source, self.course, self.workers)
        return _batches(self.views, positions, self.workers, self.pin_memory)


def evaluation_batches(
    source: Source, size: tuple[int, int], config: DataConfig, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of a whole source: each sample once over all ranks, centred; the last batch may be smaller."""
    order = FileOrder(source.counts)
    mine = np.arange(rank, order.num_samples, world_size)
    positions = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    view = partial(_centre_view, size=size, config=config)
    return _batches(Views(source, order.lookup, view), positions, min(config.workers, len(positions)))


def _centre_view(
    pixels: NDArray[np.uint8], epoch: int, sample: int, size: tuple[int, int], config: DataConfig
) -> Tensor:
    return centre(pixels, size, config)
