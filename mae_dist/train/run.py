"""From a config to a finished run: build everything, resume, train, and say how it ended."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

import mae_dist
from mae_dist.config import Config
from mae_dist.data import BadSamples, ImageStream, Source, open_sources
from mae_dist.data.resampled import ResampledStream
from mae_dist.data.ring import Ring
from mae_dist.engine import Engine, World, build_engine, capture, restore, state_bytes
from mae_dist.errors import Ended, UserError
from mae_dist.launched import rank_or_zero
from mae_dist.model import MAE
from mae_dist.model.sizes import check_fits
from mae_dist.track.journal import read
from mae_dist.track.place import how_to_watch
from mae_dist.track.tracker import MLflowTracker
from mae_dist.train.alone import alone
from mae_dist.train.checkpoint import Checkpoints
from mae_dist.train.goodput import goodput
from mae_dist.train.health import Health
from mae_dist.train.knn import IMAGES, KNN, KnnWatch
from mae_dist.train.loop import Run, train
from mae_dist.train.peers import FAILED, LEFT, MISTAKE, STOPPED
from mae_dist.train.resume import (
    check_lost,
    check_resume,
    identity,
    mend_config,
    open_journal,
    stamp,
    start_record,
    unmeasured,
)  # fmt: skip
from mae_dist.train.saving import Saver
from mae_dist.train.schedule import Plan
from mae_dist.train.stop import Stopped, StopRequest
from mae_dist.train.validate import PICTURE, PICTURED, Validation
from mae_dist.train.watchdog import ECHO, RankLost, Watchdog, brief, is_echo
from mae_dist.urls import masked


def pretrain(config: Config) -> int:
    """Train, or go on training, on all the processes of this world. Returns the exit status.

    0: complete. 128 + n: stopped by signal n, everything saved. Raises UserError for a user's mistake, before the first
    step wherever it can be seen then, TrainingDiverged when numbers stay bad, and RankLost when another rank ended.
    """
    config.check()
    config = config.with_epoch_size()
    config = dataclasses.replace(config, data=config.data.absolute(), track=config.track.absolute())
    Ring.limit = 0.8 * config.train.timeout  # so that the rank whose workers stand still says so before others give up
    stop = StopRequest()
    code = 0
    try:
        world = World.join(config.train.device)
        accumulate = config.train.accumulate(world.size, config.data.repeated_aug)
        sources = open_sources(config.data, config.model.height_width, config.model.in_chans)
        with ExitStack() as stack:
            _train(config, world, accumulate, sources, stop, stack)
        world.leave()  # not after an error: the other ranks may hang in what this would wait for
    except Stopped as stopped:
        code = 128 + stopped.signal
        if rank_or_zero() == 0:
            print(f"\n{config.train.name}: {stopped}", flush=True)
    except Exception as error:
        if isinstance(error, Ended) or not is_echo(error):
            raise
        stop.leave()
        time.sleep(ECHO)  # whose error it is, or torchrun, is to be heard first
        raise RankLost(f"lost another rank before the first step: {brief(error)}") from None
    return code


def _train(
    config: Config,
    world: World,
    accumulate: int,
    sources: tuple[Source, Source | None],
    stop: StopRequest,
    stack: ExitStack,
) -> None:
    run_dir, batch = config.train.run_dir, config.train.global_batch_size
    meta = identity(config, *sources) | {"world_size": world.size}
    micro = batch // world.size // accumulate
    check_fits(config.model, micro)
    torch.manual_seed(config.train.seed)
    model = MAE(config.model)  # before anything is written: a wrong model name leaves no run behind
    engine = build_engine(config.engine, model, world, config.optim, config.train.precision, accumulate)
    keep, keep_every = config.train.keep_checkpoints, config.train.keep_every
    stack.enter_context(alone(run_dir, world))
    check_lost(run_dir, world)
    checkpoints = Checkpoints(run_dir / "checkpoints", world, keep, keep_every)
    newest = checkpoints.newest()
    health = Health(world, config.train.spike_sigma)
    start, seen = resume(config, newest, engine, health, meta) if newest else (0, 0)
    stamp(meta)
    plan = Plan(config.train, config.optim, config.optim.peak_lr(batch), int(sources[0].counts.sum()), start, seen)
    if start == 0:
        plan.check()
    missing: set[str] = set()
    if start:
        missing = world.broadcast(unmeasured(config, plan) if world.is_main else missing)
    if start >= plan.total and not missing:
        if world.is_main:
            print(f"{run_dir}: complete, {start} of {plan.total} steps; for another run write --train.name NAME")
            mend_config(config)
        return
    bad = bad_samples(config, *sources)
    validation = Validation(config, sources[1], sources[0], micro, world, bad)
    knn = KnnWatch(config, *sources, micro, plan, world, bad) if config.train.knn_every else None
    again = {PICTURE: validation, KNN: knn}
    journal = open_journal(config, start) if world.is_main else None
    take = partial(capture, engine, health.counters)
    saver = Saver(checkpoints, take, state_bytes(engine), config.train.async_save, config.train.save_minutes, journal)
    if start == 0:
        saver.check_room()
    run = Run(
        config=config,
        world=world,
        engine=engine,
        stream=open_stream(config, sources[0], world, accumulate, plan, bad),
        bad=bad,
        accumulate=accumulate,
        plan=plan,
        counts_read=sources[0].counts_read,
        saver=saver,
        meta=meta,
        validation=validation,
        knn=knn,
        journal=journal,
        stop=stop,
        health=health,
        watch=Watchdog(run_dir, world, stop, config.train.watchdog, plan.start),
        evaluate_first=[what for name, what in again.items() if what and name in missing],
    )
    _train_and_report(run)


def bad_samples(config: Config, train: Source, held_out: Source | None) -> BadSamples:
    """The list of a run. Its evaluations read the held-out images, or one picture's, and those that vote in k-NN."""
    count = int(train.counts.sum())
    evaluated = int(held_out.counts.sum()) if held_out else PICTURED
    evaluated += min(IMAGES, count) if config.train.knn_every else 0
    different = count if config.data.mode == "exact" else None  # a list's length is only said to be so
    return BadSamples(config.train.run_dir, config.data.max_bad_fraction, different, evaluated)


def open_stream(
    config: Config, source: Source, world: World, accumulate: int, plan: Plan, bad: BadSamples
) -> ImageStream | ResampledStream:
    start, shift = plan.batches(config.data.repeated_aug)
    stream = partial(ImageStream, shift=shift) if config.data.mode == "exact" else ResampledStream
    return stream(
        source, config.model.height_width, config.data, config.train.seed, config.train.global_batch_size, accumulate,
        start, world.rank, world.size, pin_memory=world.device.type == "cuda", bad=bad, node=world.node,
    )  # fmt: skip


def _train_and_report(run: Run) -> None:
    """Train; whatever happens, the journal says how it ended."""
    tracker, watch = None, run.watch
    run.stop.last_words = partial(_end, run)
    try:
        if run.journal:
            describe(run)
            tracker = MLflowTracker.start(run.config.train.run_dir, run.config.track)
        train(run)
        run.stop.leave()
        _end(run, None)
    except BaseException as error:
        run.stop.leave()
        cause = watch.cause(error) if is_echo(error) else error
        _end(run, cause)
        if cause is error:
            raise
        raise cause from None
    finally:
        run.saver.leave()
        if run.journal:
            run.journal.close()
        if tracker:
            tracker.close()


def _end(run: Run, cause: BaseException | None) -> None:
    """Say how the run ended: to the other ranks, and in the journal. Once."""
    if run.watch.closed.is_set():
        return
    if cause is None:
        said, status, reason = LEFT, "FINISHED", ""
    elif isinstance(cause, Stopped):
        said, status, reason = f"{STOPPED}{cause.signal}", cause.end, str(cause)
    elif isinstance(cause, KeyboardInterrupt):
        said, status, reason = f"{STOPPED}{signal.SIGINT}", "KILLED", "interrupted"
    else:
        status, reason = "FAILED", masked(f"{type(cause).__name__}: {cause}")
        said = LEFT if isinstance(cause, RankLost) else f"{FAILED}{reason}"
        said = f"{MISTAKE}{cause}" if isinstance(cause, UserError) and cause.status == UserError.status else said
    run.watch.close(said)
    if run.journal:
        account(run)
        run.journal.write({"kind": "end", "status": status, "reason": reason[:1000]})
        run.journal.sync()


def account(run: Run) -> None:
    """Say where the time of the whole run went, here and in the journal."""
    assert run.journal
    try:
        spent = goodput(read(run.journal.path), ended=True)
    except OSError as error:
        print(f"warning: {run.journal.path}: {error.strerror}", file=sys.stderr)
        return
    run.journal.write({"kind": "metrics", "step": spent.step, "metrics": spent.metrics()})
    print(f"{run.config.train.name}: {spent}", flush=True)


def resume(config: Config, checkpoint: Path, engine: Engine, health: Health, meta: dict) -> tuple[int, int]:
    """Load a checkpoint; returns the updates behind it and the images seen.

    Raises UserError when config or data are not the run's.
    """
    done = check_resume(config, checkpoint, meta)
    health.restore(restore(engine, checkpoint))
    return done


def describe(run: Run) -> None:
    """Say what this run is: to the terminal, and to the journal as few parameters and some tags."""
    config, world = run.config, run.world
    model, batch = config.model, config.train.global_batch_size
    params = {
        "enc_name": model.enc_name,
        "mask_ratio": model.mask_ratio,
        "decoder": f"{model.dec_dim}x{model.dec_depth}",
        "norm_pix_loss": model.norm_pix_loss,
        "global_batch_size": batch,
        "peak_lr": config.optim.peak_lr(batch),
        "steps": run.plan.total,
        "seed": config.train.seed,
    }
    tags = {
        "world_size": str(world.size),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "precision": config.train.precision,
        "data.digest": run.meta["data"]["digest"],
        "mae_dist.version": mae_dist.__version__,
    }
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    assert run.journal
    run.journal.write(start_record(run.plan.start, run.meta, params, tags))
    count = sum(map(math.prod, run.engine.shapes.values()))
    print(
        f"{config.train.run_dir}: {model.enc_name} ({count / 1e6:.1f} M parameters with decoder), "
        f"{run.meta['data']['num_samples']} images, {run.plan.total} steps of {batch} = {world.size} processes x "
        f"{run.accumulate} x {batch // world.size // run.accumulate} on {tags['device']} in {config.train.precision}"
        + (f"; resumed at step {run.plan.start}" if run.plan.start else ""),
        flush=True,
    )
    if config.track.mlflow:
        print(f"MLflow: {how_to_watch(config.train.runs_dir, config.track)}", flush=True)


def git_commit() -> str | None:
    """The commit of the code that runs, from MAE_DIST_GIT_COMMIT (containers) or git."""
    given = os.environ.get("MAE_DIST_GIT_COMMIT")
    if given:
        return given
    here = Path(mae_dist.__file__).parent
    git = partial(subprocess.run, capture_output=True, text=True, timeout=5, check=True, cwd=here)
    try:
        git(["git", "ls-files", "--error-unmatch", "__init__.py"])  # else the repository of what encloses site-packages
        commit = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        return commit + "-dirty" * bool(git(["git", "status", "--porcelain", "-uno", "."]).stdout)
    except (OSError, subprocess.SubprocessError):
        return None
