"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mae_dist.config import Config
from mae_dist.data.bad import BadSamples
from mae_dist.data.feed import DeviceFeed, Normalise
from mae_dist.data.loader import Batch, ImageStream
from mae_dist.data.resampled import ResampledStream
from mae_dist.engine import Engine, World, capture
from mae_dist.model.masking import mask_noise
from mae_dist.track.journal import Journal
from mae_dist.train.checkpoint import Checkpoints
from mae_dist.train.health import check_skipped
from mae_dist.train.knn import KnnWatch
from mae_dist.train.meters import Meters
from mae_dist.train.progress import Progress
from mae_dist.train.schedule import CosineSchedule
from mae_dist.train.stop import StopRequest
from mae_dist.train.validate import Validation


class Stopped(Exception):
    """A signal ended the run after step `step`; everything is saved."""

    def __init__(self, signal: int, step: int):
        super().__init__(f"stopped by signal {signal} after step {step}; the same command goes on from there")
        self.signal = signal


@dataclass
class Run:
    """All that one rank needs to train; built in `run.py`."""

    config: Config
    world: World
    engine: Engine
    stream: ImageStream | ResampledStream
    bad: BadSamples
    num_samples: int
    """In an epoch."""
    accumulate: int
    start: int
    """Updates already done."""
    total_steps: int
    epoch_steps: float
    """Updates in one epoch; a batch may straddle two."""
    counts_read: Callable[[], dict[str, int]]
    """Of remote shards: hits, misses, bytes and so on since the start, by this rank and its prefetcher."""
    schedule: CosineSchedule
    checkpoints: Checkpoints
    meta: dict
    """Saved with each checkpoint."""
    validation: Validation
    knn: KnnWatch | None
    """None: `train.knn_every` is not set."""
    journal: Journal | None
    """On rank 0 only."""
    stop: StopRequest


def train(run: Run) -> None:
    """Make every update from `run.start` to `run.total_steps`. Raises Stopped on an agreed signal."""
    config = run.config.train
    feed = DeviceFeed(iter(run.stream), run.world.device)
    normalise = Normalise(run.config.data, run.world.device)
    meters = Meters(run.world, config.global_batch_size)
    progress = Progress(run.start, run.total_steps)
    if run.start == 0:
        run.validation.draw(0, run.engine, run.journal)  # the untrained model; and drawing fails now or never
    for k in range(run.start, run.total_steps):
        for micro in range(run.accumulate):
            batch = next(feed)
            run.engine.forward_backward(normalise(batch.images), noise_of(batch, run), micro == run.accumulate - 1)
        meters.add(run.engine.step(run.schedule.lr(k)), feed.waited)
        feed.waited = 0.0
        done, last, stop = k + 1, k + 1 == run.total_steps, 0
        if last or done % config.log_every == 0:
            found, rate = run.bad.count(), run.stream.worker_rate()
            reading = meters.sync(run.schedule.lr(k), done / run.epoch_steps, run.stop.signal, found, rate)
            if run.journal:
                counts = {f"remote/{name}": count for name, count in run.counts_read().items()}
                run.journal.write({"kind": "metrics", "step": done, "metrics": reading.metrics | counts})
                progress.show(done, reading.metrics)
            check_skipped(reading.skipped_in_row, config.max_skipped, done)
            run.bad.check(reading.bad_samples, min(done * config.global_batch_size, run.num_samples))
            stop = reading.stop_signal
        began = time.perf_counter()
        if last or done % config.eval_every == 0:
            run.validation.run(done, run.engine, run.journal)
        if run.knn and (last or run.knn.due(done)):
            run.knn.run(done, run.engine, run.journal)
        if last or stop or done % config.save_every == 0:
            save(run, done)
        meters.pause(time.perf_counter() - began)
        if stop and not last:
            raise Stopped(stop, done)


def noise_of(batch: Batch, run: Run) -> Tensor:
    return mask_noise(run.config.train.seed, batch.epochs, batch.ids, run.config.model.num_patches)


def save(run: Run, done: int) -> None:
    """Commit a checkpoint, after the journal that leads to it."""
    if run.journal:
        run.journal.sync()
    run.checkpoints.save(done, capture(run.engine).write, run.meta)
