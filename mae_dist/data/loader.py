"""Batches of uint8 pixels from worker processes, in the order of `SampleOrder`."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mae_dist.data.augment import View, centre_views, enclosing, finish, random_views
from mae_dist.data.bad import BadSample, BadSamples, stand_ins
from mae_dist.data.decode import Box
from mae_dist.data.options import DataConfig
from mae_dist.data.ring import HELD, Ring, Table, batches_ahead
from mae_dist.data.source import Source
from mae_dist.shards.order import FileOrder, SampleOrder, Samples
from mae_dist.shards.prefetch import Course

Ints = NDArray[np.int64]
POSITION, EPOCH, SHARD, ROW, ID, LABEL, NANOSECONDS = range(7)  # columns of a table, one row a sample


class Batch(NamedTuple):
    images: Tensor
    """(B, C, H, W) uint8, channels last in memory: as decoders write and as patches are cut."""
    ids: Tensor
    """(B,) int64: place of each sample in the data set, shards laid end to end."""
    epochs: Tensor
    """(B,) int64; view r of R of a sample, in pass e over the data: e * R + r."""
    labels: Tensor
    """(B,) int64, -1 where there is none."""


class Views:
    """Makes the views of the samples at some positions, in whatever process.

    `lookup`: positions to samples. `views(epochs, samples)`: how samples are seen. `replace(epoch, position, sample)`:
    the positions to try in place of a bad one. `bad`: where bad samples are listed; None: the first raises BadSample.
    `repeat`: views of each sample, side by side, each as in an epoch of its own; they are read and decoded together.
    `evaluates`: positions are none of training's.
    """

    def __init__(
        self,
        source: Source,
        lookup: Callable[[ArrayLike], Samples],
        views: Callable[[Ints, Ints], list[View]],
        replace: Callable[[int, int, int], Ints],
        size: tuple[int, int],
        config: DataConfig,
        bad: BadSamples | None,
        repeat: int = 1,
        evaluates: bool = False,
    ):
        self.source, self.lookup, self.views, self.replace = source, lookup, views, replace
        self.size, self.config, self.bad, self.repeat, self.evaluates = size, config, bad, repeat, evaluates
        self.made, self.seconds = 0, 0.0  # images handed out, and the time that making them took

    def table(self, positions: Ints) -> Table:
        """What is to be made at n positions: (n * repeat, 7); label and time are to be found."""
        samples = self.lookup(positions)
        unknown = np.full(len(positions), -1)
        columns = positions, samples.epoch * self.repeat, samples.shard, samples.row, samples.id, unknown, unknown
        table = np.repeat(np.stack(columns, axis=1), self.repeat, axis=0)
        table[:, EPOCH] += np.tile(np.arange(self.repeat), len(positions))
        return table

    @torch.inference_mode()
    def fill(self, table: Table, images: Tensor) -> None:
        """Make (B, C, H, W) uint8 of the rows of a table, and fill in labels and times."""
        if self.bad:
            self.bad.flush()
        views = self.views(table[:, EPOCH], table[:, ID])
        self.source.will_need(table[:: self.repeat, SHARD].tolist(), table[:: self.repeat, ROW].tolist())
        for first in range(0, len(table), self.repeat):
            rows = slice(first, first + self.repeat)
            position, epoch, shard, row, sample, _, _ = table[first].tolist()
            began = time.perf_counter_ns()
            try:
                crops, label = self._cut(shard, row, views[rows])
            except BadSample as error:
                crops, label = self._stand_in(error, epoch // self.repeat, position, sample, views[rows])
            for n, crop in enumerate(crops, first):
                images[n] = finish(crop, views[n], self.size, self.config)
            table[rows, LABEL] = label
            table[rows, NANOSECONDS] = (time.perf_counter_ns() - began) // self.repeat

    def _stand_in(
        self, error: BadSample, epoch: int, position: int, sample: int, views: list[View]
    ) -> tuple[list[NDArray[np.uint8]], int]:
        if self.bad is None:
            raise error
        self.bad.add(error, sample=sample, epoch=epoch, **({} if self.evaluates else {"position": position}))
        others = self.lookup(self.replace(epoch, position, sample))
        for shard, row in zip(others.shard.tolist(), others.row.tolist(), strict=True):
            try:
                return self._cut(shard, row, views)
            except BadSample:
                continue  # listed when its own turn comes
        raise BadSample(error.where, f"{error.reason}; nor was any of {len(others.shard)} samples near it readable")

    def _cut(self, shard: int, row: int, views: list[View]) -> tuple[list[NDArray[np.uint8]], int]:
        """(h, w, C) uint8 of each view, from one decode of what holds them all, and the label. Raises BadSample."""
        boxes: list[Box] = []

        def choose(height: int, width: int) -> Box:
            boxes[:] = [view.choose(height, width) for view in views]
            return enclosing(boxes)

        pixels, label = self.source.pixels(shard, row, choose)
        if len(boxes) == 1:
            return [pixels], label  # the box itself, perhaps at a smaller scale (data.dct_scale)
        top, left, _, _ = enclosing(boxes)
        return [pixels[t - top : t - top + h, x - left : x - left + w] for t, x, h, w in boxes], label


def rank_positions(
    start: int, global_batch_size: int, accumulate: int, rank: int, world_size: int, shift: int = 0
) -> Iterator[Ints]:
    """Positions of this rank's micro-batches, from global batch `start` on, without end.

    Global batch 0 begins at position `shift`. Rank r takes positions r, r + W, ... of each global batch, cut into
    `accumulate` micro-batches.
    """
    k = start
    while True:
        first = k * global_batch_size + shift
        mine = np.arange(first + rank, first + global_batch_size, world_size)
        yield from np.split(mine, accumulate)
        k += 1


def fetched_ahead(positions: Iterable[Ints], source: Source, course: Course, behind: int) -> Iterator[Ints]:
    """The positions of a rank; on the first rank of a node, remote shards are fetched for the node as they go."""
    prefetcher = source.prefetcher(course, behind) if course.ranks else None
    try:
        for micro_batch in positions:
            if prefetcher:
                prefetcher.at((int(micro_batch[0]) - course.shift) // course.global_batch_size)
            yield micro_batch
    finally:
        if prefetcher:
            prefetcher.close()


class Maker(Protocol):
    """What makes the images of a table, in whatever process."""

    made: int
    seconds: float

    @property
    def source(self) -> Source: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def bad(self) -> BadSamples | None: ...
    @property
    def repeat(self) -> int: ...

    def table(self, positions: Ints) -> Table: ...
    def fill(self, table: Table, images: Tensor) -> None: ...


def _batches(
    views: Maker, positions: Iterable[Ints], workers: int, batch_size: int, pin_memory: bool = False
) -> Iterator[Batch]:
    tables = map(views.table, positions)
    shape = (views.source.channels, *views.size)
    if not workers:
        for table in tables:
            images = torch.empty((len(table), *shape), dtype=torch.uint8, memory_format=torch.channels_last)
            views.fill(table, images)
            yield _batch(views, table, images)
        return
    ring = Ring(views.fill, workers, batch_size, NANOSECONDS + 1, shape, pin_memory, views.repeat)
    try:
        for table, images in ring.run(tables):
            yield _batch(views, table, images)
            del images  # how long it stays is for the reader alone to say
    finally:
        ring.close()


def _batch(views: Maker, table: Table, images: Tensor) -> Batch:
    views.made += len(table)
    views.seconds += float(table[:, NANOSECONDS].sum()) / 1e9
    ids, epochs, labels = (torch.from_numpy(table[:, column].copy()) for column in (ID, EPOCH, LABEL))
    return Batch(images, ids, epochs, labels)


class ImageStream:
    """The training batches of one rank, for ever, beginning with global batch `start`.

    `source`: where pixels come from. `size`: (height, width) of the views. Which samples come, and how each is cropped
    and flipped, depend on (seed, epoch, sample) only. Yields `accumulate` micro-batches for each global batch: R =
    `config.repeated_aug` views of each of B / R samples, which has then been seen in epochs e R to e R + R - 1. `node`:
    the ranks whose remote shards this one has fetched ahead (None: its own). An unreadable image is listed in `bad` and
    replaced by another of its window; without `bad` it raises UserError. `views(epochs, samples)`: how samples are
    seen, instead of a random crop and flip. `shift`: samples of the stream before global batch 0.
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
        bad: BadSamples | None = None,
        node: range | None = None,
        views: Callable[[Ints, Ints], list[View]] | None = None,
        shift: int = 0,
    ):
        self.order = SampleOrder(source.counts, seed, config.lanes, config.window)
        samples = global_batch_size // config.repeated_aug
        self.positions = partial(rank_positions, start, samples, accumulate, rank, world_size, shift)
        views = views or partial(random_views, config=config, seed=seed)
        others = partial(
            stand_ins, seed=seed, num_samples=self.order.num_samples, lanes=self.order.lanes, window=config.window
        )
        self.views: Maker = Views(source, self.order.lookup, views, others, size, config, bad, config.repeated_aug)
        self.workers, self.pin_memory, self.rank = config.workers, pin_memory, rank
        self.batch_size = global_batch_size // world_size // accumulate
        ranks = range(rank, rank + 1) if node is None else node
        line = self.order.counts, seed, config.lanes, config.window
        self.course = Course(*line, samples, ranks, world_size, start, shift)

    def __iter__(self) -> Iterator[Batch]:
        behind = 1 + HELD + batches_ahead(self.workers, self.batch_size)
        positions = fetched_ahead(self.positions(), self.views.source, self.course, behind)
        return _batches(self.views, positions, self.workers, self.batch_size, self.pin_memory)

    def worker_rate(self) -> float:
        """Images a second that one worker makes while it works, of those handed out since the last call."""
        made, seconds = self.views.made, self.views.seconds
        self.views.made, self.views.seconds = 0, 0.0
        return made / seconds if seconds else 0.0


def evaluation_batches(
    source: Source,
    size: tuple[int, int],
    config: DataConfig,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    bad: BadSamples | None = None,
) -> Iterator[Batch]:
    """This rank's share of a whole source: each sample once over all ranks, centred; the last batch may be smaller.

    An unreadable image is listed in `bad` and replaced by another; without `bad` it raises UserError.
    """
    mine = range(rank, int(source.counts.sum()), world_size)
    positions = (np.array(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size))
    workers = min(config.workers, -(-len(mine) // batch_size))
    return centred_batches(source, size, replace(config, workers=workers), positions, batch_size, bad)


def centred_batches(
    source: Source,
    size: tuple[int, int],
    config: DataConfig,
    positions: Iterable[Ints],
    batch_size: int,
    bad: BadSamples | None = None,
) -> Iterator[Batch]:
    """A batch of centred views for each array of up to `batch_size` places in file order; see `evaluation_batches`."""
    order = FileOrder(source.counts)
    views = partial(centre_views, size=size, config=config)
    others = partial(stand_ins, seed=0, num_samples=order.num_samples)
    maker = Views(source, order.lookup, views, others, size, config, bad, evaluates=True)
    return _batches(maker, positions, config.workers, batch_size)
