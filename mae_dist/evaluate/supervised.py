"""Training with labels: the one loop of the linear probe and of fine-tuning. The same command again resumes."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mae_dist import config as configs
from mae_dist.config import flat, plain
from mae_dist.data import BadSamples, ImageStream, Source, evaluation_batches, subset
from mae_dist.data.augment import View
from mae_dist.data.feed import DeviceFeed, Normalise
from mae_dist.engine import World
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import Pretrained
from mae_dist.evaluate.features import check_bad
from mae_dist.evaluate.knn import labelled_sources
from mae_dist.evaluate.learner import Learner
from mae_dist.evaluate.options import FinetuneConfig, LinearConfig
from mae_dist.evaluate.tracked import EVALUATIONS, logged, track_of
from mae_dist.launched import rank_or_zero
from mae_dist.manual import OF_THE_RUN
from mae_dist.model.sizes import check_fits
from mae_dist.track.journal import Journal
from mae_dist.train.alone import alone
from mae_dist.train.checkpoint import Checkpoints
from mae_dist.train.health import Health, check_skipped
from mae_dist.train.meters import Meters
from mae_dist.train.progress import Progress, say
from mae_dist.train.resume import (
    check_lost,
    check_resume,
    identity,
    mend_config,
    save_config,
    stamp,
    start_record,
)
from mae_dist.train.saving import Saver
from mae_dist.train.schedule import Plan
from mae_dist.train.stop import Agreement, Stopped, StopRequest

SHORT = {"--init": "--network.init", "--fraction": "--labels.fraction", "--per-class": "--labels.per_class"}
FEW = 12  # images
CROP_SCALE = (0.08, 1.0)  # of both recipes; the probe's official code draws one crop, and clips it
CROPS = ("mean", "std", "crop_ratio", "flip", "eval_crop", "decoder", "max_pixels")
TRACK = ("mlflow", "experiment", "tracking_uri")
SHARDS = ("shards", "val_shards", "cache_dir", "cache_bytes", "workers", "lanes", "window", "max_bad_fraction")

Supervised = FinetuneConfig | LinearConfig
Views = Callable[[NDArray[np.int64], NDArray[np.int64]], list[View]]


def load(kind: type, name: str, arguments: Sequence[str], batch: int, epochs: float) -> tuple[Pretrained, Any]:
    """The checkpoint and the config of `mae-dist linear|finetune RUN ...`.

    `batch`, `epochs`: of the recipe, as the area of crops is. Data and what else crops are like are those of the
    pretraining run where the command line and its --config files say nothing else.
    """
    prog = f"mae-dist {name}"
    recipe = {"train.global_batch_size": batch, "train.epochs": epochs, "train.name": name}
    recipe |= {"data.crop_scale": CROP_SCALE, "data.crop_clip": kind is LinearConfig}
    inherited = [*(f"data.{key}" for key in (*CROPS, *SHARDS)), *(f"track.{key}" for key in TRACK)]
    inherited += ["train.precision", "train.device", "train.runs_dir"]
    if {"-h", "--help"} & set(arguments):
        configs.load(["--help"], prog, kind, dict.fromkeys(inherited, OF_THE_RUN) | recipe)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            f"{prog}: write the run to evaluate first: {prog} runs/NAME --config configs/{name}_vit_b16.yaml"
        )
    pretrained = Pretrained.find(Path(arguments[0]))
    words = [option.partition("=") for option in arguments[1:]]
    spread = [SHORT.get(option, option) + equals + value for option, equals, value in words]
    run = pretrained.config
    now = dataclasses.replace(
        run,
        track=track_of(pretrained),
        train=dataclasses.replace(run.train, runs_dir=str(pretrained.run_dir / EVALUATIONS)),
    )
    own = {key: value for key, value in configs.flat(now) if key in inherited}
    config = configs.load(spread, prog, kind, own | recipe)
    config.check(run.model.in_chans)
    config = dataclasses.replace(config, data=config.data.absolute(), track=config.track.absolute())
    return pretrained.at(config.network.img_size), config


@dataclass
class Session:
    """All that one rank needs to train; built by `train`."""

    pretrained: Pretrained
    config: Any
    world: World
    learner: Learner
    stream: ImageStream
    test: Source
    bad: BadSamples
    accumulate: int
    plan: Plan
    saver: Saver
    meta: dict
    stop: StopRequest

    @property
    def size(self) -> tuple[int, int]:
        return self.pretrained.config.model.height_width


def train(
    pretrained: Pretrained,
    config: Any,
    make: Callable[[World, int, int], Learner],
    views: Views | None = None,
) -> int:
    """Train, or go on training, on all the processes of this world; returns the exit status as `pretrain` does.

    `make(world, num_classes, accumulate)`: what is trained. `views(epochs, samples)`: how samples are seen.
    """
    stop = StopRequest()
    try:
        world = World.join(config.train.device)
        with ExitStack() as stack:
            session = prepare(pretrained, config, make, views, world, stop, stack)
            if session:
                report(session)
        world.leave()  # not after an error: the other ranks may hang in what this would wait for
    except Stopped as stopped:
        if rank_or_zero() == 0:
            print(f"\n{config.train.name}: {stopped}", flush=True)
        return 128 + stopped.signal
    return 0


def prepare(
    pretrained: Pretrained,
    config: Any,
    make: Callable[[World, int, int], Learner],
    views: Views | None,
    world: World,
    stop: StopRequest,
    stack: ExitStack,
) -> Session | None:
    """Everything before the first step; None when the training is complete. `stack`: undone at its end."""
    t = config.train
    accumulate, batch = t.accumulate(world.size), t.global_batch_size
    merged = configs.Config(model=pretrained.config.model, data=config.data)
    check_fits(merged.model, batch // world.size // accumulate)
    whole, test, num_classes = labelled_sources(merged)
    source = subset(whole, config.labels.fraction, config.labels.per_class, config.labels.seed)
    num_samples = int(source.counts.sum())
    learner = make(world, num_classes, accumulate)
    meta = identity(config, source, test) | origin(pretrained, config)
    stack.enter_context(alone(t.run_dir, world))
    check_lost(t.run_dir, world)
    checkpoints = Checkpoints(t.run_dir / "checkpoints", world, t.keep_checkpoints, t.keep_every)
    newest = checkpoints.newest()
    start, seen = check_resume(config, newest, meta) if newest else (0, 0)
    stamp(meta)
    peak = config.optim.blr * batch / 256 if config.optim.lr is None else config.optim.lr
    plan = Plan(t, config.optim, peak, num_samples, start, seen)
    if start == 0:
        plan.check()
    if newest:
        learner.read(newest)
    if start >= plan.total:
        if world.is_main:
            print(f"{t.run_dir}: complete, {start} of {plan.total} steps; for another write --train.name NAME")
            mend_config(config)
        return None
    bad = BadSamples(t.run_dir, config.data.max_bad_fraction, num_samples)
    first, shift = plan.batches(config.data.repeated_aug)
    stream = ImageStream(
        source, merged.model.height_width, config.data, t.seed, batch, accumulate, first, world.rank, world.size,
        pin_memory=world.device.type == "cuda", bad=bad, node=world.node, views=views, shift=shift,
    )  # fmt: skip
    return Session(
        pretrained, config, world, learner, stream, test, bad, accumulate, plan,
        Saver(checkpoints, lambda: learner, learner.num_bytes, in_background=False, minutes=t.save_minutes), meta, stop,
    )  # fmt: skip


def origin(pretrained: Pretrained, config: Any) -> dict[str, Any]:
    """For the identity of a training: which network is trained, and whose weights it begins with."""
    whose = {"digest": pretrained.digest, "checkpoint": str(pretrained.checkpoint)}
    init = whose if config.network.init == "pretrained" else {"digest": None}
    return {"pretrained": {f"model.{key}": plain(value) for key, value in flat(pretrained.config.model)}, "init": init}


def report(session: Session) -> None:
    """Train with, on rank 0, a journal of its own."""
    config = session.config
    if not session.world.is_main:
        return fit(session, None)
    save_config(config)
    params = {key: value for key, value in flat(config) if key.split(".")[0] in ("network", "labels", "optim")}
    total = session.plan.total
    params |= {"global_batch_size": config.train.global_batch_size, "steps": total, "seed": config.train.seed}
    start = start_record(session.plan.start, session.meta, params, {})
    with logged(config.train.run_dir, session.pretrained, config.track, start) as journal:
        session.saver.journal = journal
        return fit(session, journal)


def fit(session: Session, journal: Journal | None) -> None:
    """Make every update from the plan's `start` to its `total`. Raises Stopped on an agreed signal."""
    config, learner, plan = session.config.train, session.learner, session.plan
    feed = DeviceFeed(iter(session.stream), session.world.device)
    normalise = Normalise(session.config.data, session.world.device)
    health = Health(session.world, None)
    meters = Meters(session.world, config.global_batch_size, health)
    agreement = Agreement(session.world)
    progress = Progress(plan.start, plan.total)
    if plan.start == 0:
        score(session, 0, journal)  # also: test images that cannot be read are an error now, not after hours
    for k in range(plan.start, plan.total):
        for micro in range(session.accumulate):
            batch = next(feed)
            learner.forward_backward(normalise(batch.images), batch, micro == session.accumulate - 1)
        meters.add(learner.step(plan.lr(k)), feed.waited)
        stop = agreement.soon(session.stop.signal)
        feed.waited, session.stop.begun = 0.0, True
        done, last, due = k + 1, k + 1 == plan.total, False
        if k == plan.start + 1:  # every rank is through its first step, and what that compiled
            session.world.set_timeout(config.timeout)
        if last or done % config.log_every == 0:
            read = plan.images(done) // session.config.data.repeated_aug
            found, rate = session.bad.count(read), session.stream.worker_rate()
            reading = meters.sync(plan.lr(k), plan.epoch(done), found, rate, session.saver.due)
            due = reading.save_due
            if journal:
                journal.write({"kind": "metrics", "step": done, "metrics": reading.metrics})
                progress.show(done, reading.metrics)
            root = session.saver.checkpoints.root
            look = partial(harm, session)
            check_skipped(reading.skipped_in_row, config.max_skipped, done, last, health, look, root)
            session.bad.check(reading.bad_samples, read)
        began = time.perf_counter()
        if last or done % config.eval_every == 0:
            score(session, done, journal)
        if last or stop or due or done % config.save_every == 0:
            meta = session.meta | {"images": plan.images(done)}
            session.saver.save(done, meta, wait=bool(last or stop), streak=health.streak())
        meters.pause(time.perf_counter() - began)
        if stop and not last:
            raise Stopped(stop, done)


def harm(session: Session) -> str:
    """What is wrong with what is trained, by a few test images; empty: nothing. Collective."""
    device, data = session.world.device, replace(session.config.data, workers=0)
    batch = next(evaluation_batches(session.test, session.size, data, FEW, bad=session.bad))
    return session.learner.harm(Normalise(data, device)(batch.images.to(device)))


def score(session: Session, step: int, journal: Journal | None) -> None:
    """Measure after `step` updates, and say it. Collective."""
    scores = accuracy(session)
    if journal:
        journal.write({"kind": "metrics", "step": step, "metrics": scores})
        say(f"step {step}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))


@torch.no_grad()
def accuracy(session: Session) -> dict[str, float]:
    """Top-1, top-5 and loss on the held-out images, each counted once, whatever the number of ranks. Collective.

    Raises UserError when too many of them are unreadable; they have a list of their own.
    """
    world, learner = session.world, session.learner
    batch_size = session.config.train.global_batch_size // world.size // session.accumulate
    normalise = Normalise(session.config.data, world.device)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    data, bad = session.config.data, BadSamples(session.bad.path.parent / "test", session.bad.fraction)
    if world.is_main:
        bad.begin_again()
    world.barrier()
    for batch in evaluation_batches(session.test, session.size, data, batch_size, world.rank, world.size, bad):
        images, labels = (tensor.to(world.device) for tensor in (batch.images, batch.labels))
        logits = learner.predict(normalise(images)).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (B, 5)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([best[:, 0].sum(), best.sum(), loss, torch.tensor(len(labels), device=world.device)])
    top1, top5, loss, count = world.sum(sums).tolist()
    check_bad(bad, int(count), world)
    return {"eval/top1": top1 / count, "eval/top5": top5 / count, "loss/val": loss / count}
