"""The training loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mae_dist.config import Config
from mae_dist.data.bad import BadSamples
from mae_dist.data.feed import DeviceFeed, Normalise
from mae_dist.data.loader import Batch, ImageStream
from mae_dist.data.resampled import ResampledStream
from mae_dist.engine import Engine, World
from mae_dist.engine.state import broken
from mae_dist.track.journal import Journal
from mae_dist.train.health import Health, check_skipped
from mae_dist.train.knn import KnnWatch
from mae_dist.train.meters import Meters
from mae_dist.train.progress import Progress
from mae_dist.train.saving import Saver
from mae_dist.train.schedule import Plan
from mae_dist.train.stop import Agreement, Stopped, StopRequest
from mae_dist.train.validate import Validation
from mae_dist.train.watchdog import DATA, SAVING, Watchdog


@dataclass
class Run:
    """All that one rank needs to train; built in `run.py`."""

    config: Config
    world: World
    engine: Engine
    stream: ImageStream | ResampledStream
    bad: BadSamples
    accumulate: int
    plan: Plan
    counts_read: Callable[[], dict[str, int]]
    """Of remote shards: hits, misses, bytes and so on since the start, by this rank and its prefetcher."""
    saver: Saver
    meta: dict
    """Saved with each checkpoint."""
    validation: Validation
    knn: KnnWatch | None
    """None: `train.knn_every` is not set."""
    journal: Journal | None
    """On rank 0 only."""
    stop: StopRequest
    health: Health
    watch: Watchdog
    evaluate_first: list[Validation | KnnWatch]
    """What was due after the step it goes on from and is not there: a signal came, or it is newly asked for."""


def train(run: Run) -> None:
    """Make every update from the plan's `start` to its `total`. Raises Stopped on an agreed signal."""
    config, health, watch, plan = run.config.train, run.health, run.watch, run.plan
    feed = DeviceFeed(iter(run.stream), run.world.device)
    normalise = Normalise(run.config.data, run.world.device)
    meters = Meters(run.world, config.global_batch_size, health)
    progress = Progress(plan.start, plan.total)
    agreement = Agreement(run.world)
    if plan.start == 0:
        run.validation.draw(0, run.engine, run.journal)  # the untrained model; and drawing fails now or never
    for what in run.evaluate_first:
        what.run(plan.start, run.engine, run.journal)
    for k in range(plan.start, plan.total):
        for micro in range(run.accumulate):
            watch.enter(DATA, k + 1)
            batch = next(feed)
            watch.enter("forward and backward", k + 1)
            run.engine.forward_backward(normalise(batch.images), noise_of(batch, run), micro == run.accumulate - 1)
        watch.enter("update", k + 1)
        meters.add(run.engine.step(plan.lr(k), health.veto(run.engine.loss)), feed.waited)
        stop = agreement.soon(run.stop.signal)
        feed.waited = 0.0
        done, last, due = k + 1, k + 1 == plan.total, False
        run.stop.begun = True
        if k == plan.start + 1:  # every rank is through its first step, and what that compiled
            run.world.set_timeout(config.timeout)
        if last or done % config.log_every == 0:
            read = plan.images(done) // run.config.data.repeated_aug
            found, rate = run.bad.count(read), run.stream.worker_rate()
            reading = meters.sync(plan.lr(k), plan.epoch(done), found, rate, run.saver.due)
            if run.journal:
                counts = {f"remote/{name}": count for name, count in run.counts_read().items()}
                run.journal.write({"kind": "metrics", "step": done, "metrics": reading.metrics | counts})
                progress.show(done, reading.metrics)
            look = partial(harm, run)
            root = run.saver.checkpoints.root
            check_skipped(reading.skipped_in_row, config.max_skipped, done, last, health, look, root)
            run.bad.check(reading.bad_samples, read)
            run.saver.report()
            due = reading.save_due
        began = time.perf_counter()
        if not stop and (last or done % config.eval_every == 0):
            stop = evaluate(run, run.validation, done, agreement)
        if run.knn and not stop and (last or run.knn.due(done)):
            stop = evaluate(run, run.knn, done, agreement)
        if last or stop or due or done % config.save_every == 0:
            watch.enter(SAVING, done)
            meta = run.meta | {"images": plan.images(done)}
            run.saver.save(done, meta, wait=bool(last or stop), streak=health.streak())
        meters.pause(time.perf_counter() - began)
        if stop:
            raise Stopped(stop, done)


def noise_of(batch: Batch, run: Run) -> Tensor:
    return run.config.model.noise(run.config.train.seed, batch.epochs, batch.ids)


def harm(run: Run) -> str:
    """What is wrong with the weights, the same on all ranks; empty: nothing. Collective."""
    if name := broken(run.engine):
        return f"{name} is not finite"
    model, seen = run.engine.replica().eval(), run.validation
    pixels, ids = (tensor.to(run.world.device) for tensor in seen.pictured)
    loss = model(seen.normalise(pixels), seen.noise(ids)).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    model.train()
    bad = run.world.max((~(loss + norm).isfinite()).float())
    return "they give no finite loss and gradient, in float32 either" if bad else ""


def evaluate(run: Run, what: Validation | KnnWatch, done: int, agreement: Agreement) -> int:
    """Measure after `done` updates; returns the signal that ended it, or 0."""

    def stop() -> int:
        run.watch.enter(what.phase, done)
        return agreement.now(run.stop.signal)

    what.run(done, run.engine, run.journal, stop)
    return agreement.agreed
