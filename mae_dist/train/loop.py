"""The training loop."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from mae_dist.data.bad import BadSamples
from mae_dist.data.feed import DeviceFeed, Normalise
from mae_dist.data.loader import ImageStream
from mae_dist.data.resampled import ResampledStream
from mae_dist.engine import Engine, World
from mae_dist.engine.state import broken
from mae_dist.track.journal import Journal
from mae_dist.train.health import Health, check_skipped
from mae_dist.train.meters import Meters
from mae_dist.train.objective import Evaluation, Interrupted, Objective
from mae_dist.train.progress import Progress
from mae_dist.train.saving import Saver
from mae_dist.train.schedule import Plan
from mae_dist.train.stop import Agreement, Stopped, StopRequest
from mae_dist.train.watchdog import DATA, SAVING, Watchdog


@dataclass
class Run:
    """All that one rank needs to train; built in `run.py`."""

    objective: Objective
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
    evaluations: list[Evaluation]
    journal: Journal | None
    """On rank 0 only."""
    stop: StopRequest
    health: Health
    watch: Watchdog
    evaluate_first: list[Evaluation]
    """What was due after the step it goes on from and is not there: a signal came, or it is newly asked for."""


def train(run: Run) -> None:
    """Make every update from the plan's `start` to its `total`. Raises Stopped on an agreed signal."""
    objective, health, watch, plan = run.objective, run.health, run.watch, run.plan
    config, data = objective.config.train, objective.config.data
    feed = DeviceFeed(iter(run.stream), run.world.device)
    normalise = Normalise(data, run.world.device)
    agreement = Agreement(run.world)
    for evaluation in run.evaluations if plan.start == 0 else ():
        evaluation.begin(run.engine, run.journal)
    for evaluation in run.evaluate_first:
        evaluation.run(plan.start, run.engine, run.journal, lambda: 0)
    meters, progress = Meters(run.world, config.global_batch_size, health), Progress(plan.start, plan.total)
    for k in range(plan.start, plan.total):
        for micro in range(run.accumulate):
            watch.enter(DATA, k + 1)
            batch = next(feed)
            watch.enter("forward and backward", k + 1)
            inputs = objective.inputs(normalise(batch.images), batch)
            if inputs is not None:
                run.engine.forward_backward(*inputs, last=micro == run.accumulate - 1)
        watch.enter("update", k + 1)
        meters.add(run.engine.step(plan.lr(k), health.veto(run.engine.loss)), feed.waited)
        stop = agreement.soon(run.stop.signal)
        feed.waited = 0.0
        done, last, due = k + 1, k + 1 == plan.total, False
        run.stop.begun = True
        if k == plan.start + 1:  # every rank is through its first step, and what that compiled
            run.world.set_timeout(config.timeout)
        if last or done % config.log_every == 0:
            read = plan.images(done) // data.repeated_aug
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
        for evaluation in run.evaluations:
            if not stop and evaluation.due(done):
                stop = evaluate(run, evaluation, done, agreement)
        if last or stop or due or done % config.save_every == 0:
            watch.enter(SAVING, done)
            meta = run.meta | {"images": plan.images(done)}
            run.saver.save(done, meta, wait=bool(last or stop), streak=health.streak())
        meters.pause(time.perf_counter() - began)
        if stop:
            raise Stopped(stop, done)


def harm(run: Run) -> str:
    """What is wrong with the weights, the same on all ranks; empty: nothing. Collective."""
    if name := broken(run.engine):
        return f"{name} is not finite"
    network = run.engine.replica().eval()
    loss = run.objective.trial(network)
    trained = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    network.train()
    bad = run.world.max((~(loss + norm).isfinite()).float())
    return "they give no finite loss and gradient, in float32 either" if bad else ""


def evaluate(run: Run, evaluation: Evaluation, done: int, agreement: Agreement) -> int:
    """Measure after `done` updates; returns the signal that ended it, or 0."""

    def stop() -> int:
        run.watch.enter(evaluation.phase, done)
        return agreement.now(run.stop.signal)

    with suppress(Interrupted):
        evaluation.run(done, run.engine, run.journal, stop)
    return agreement.agreed
