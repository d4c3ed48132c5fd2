"""From a config to a finished run: build everything, resume, train, and say how it ended."""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mae_dist
from mae_dist.data import BadSamples, ImageStream, Source
from mae_dist.data.resampled import ResampledStream
from mae_dist.data.ring import Ring
from mae_dist.engine import Engine, World, build_engine, capture, restore, state_bytes
from mae_dist.errors import Ended, UserError
from mae_dist.launched import rank_or_zero
from mae_dist.model.sizes import check_fits
from mae_dist.track.journal import FILE_NAME, Journal, read
from mae_dist.track.place import how_to_watch
from mae_dist.track.tracker import MLflowTracker
from mae_dist.train.alone import alone
from mae_dist.train.checkpoint import Checkpoints
from mae_dist.train.goodput import goodput
from mae_dist.train.health import Health
from mae_dist.train.loop import Run, train
from mae_dist.train.objective import Objective, Setup
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
from mae_dist.train.watchdog import ECHO, RankLost, Watchdog, brief, is_echo
from mae_dist.urls import masked


def run(objective: Objective) -> int:
    """Train, or go on training, on all the processes of this world. Returns the exit status.

    0: complete. 128 + n: stopped by signal n, everything saved. Raises UserError for a user's mistake, before the first
    step wherever it can be seen then, TrainingDiverged when numbers stay bad, and RankLost when another rank ended.
    """
    config = objective.config
    Ring.limit = 0.8 * config.train.timeout  # so that the rank whose workers stand still says so before others give up
    stop = StopRequest()
    code = 0
    try:
        world = World.join(config.train.device)
        with ExitStack() as stack:
            _train(objective, world, stop, stack)
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


def _train(objective: Objective, world: World, stop: StopRequest, stack: ExitStack) -> None:
    config = objective.config
    run_dir, batch = config.train.run_dir, config.train.global_batch_size
    accumulate = config.train.accumulate(world.size, config.data.repeated_aug)
    sources = objective.sources()
    meta = identity(config, *sources) | {**objective.origin()} | {"world_size": world.size}
    micro = batch // world.size // accumulate
    check_fits(objective.model, micro)
    module = objective.build(world, accumulate)  # before anything is written: a wrong model name leaves no run behind
    passes = objective.passes(accumulate)
    engine = build_engine(config.engine, module, world, config.optim, config.train.precision, passes)
    stack.enter_context(alone(run_dir, world))
    check_lost(run_dir, world)
    checkpoints = Checkpoints(run_dir / "checkpoints", world, config.train.keep_checkpoints, config.train.keep_every)
    newest = checkpoints.newest()
    health = Health(world, config.train.spike_sigma)
    start, seen = resume(config, newest, engine, health, meta) if newest else (0, 0)
    stamp(meta)
    plan = Plan(config.train, config.optim, config.optim.peak_lr(batch), int(sources[0].counts.sum()), start, seen)
    if start == 0:
        plan.check()
    bad = bad_samples(objective, *sources)
    evaluations = objective.evaluations(Setup(world, *sources, micro, plan, bad))
    missing = world.broadcast(unmeasured(run_dir, start, evaluations) if start and world.is_main else [])
    if start >= plan.total and not missing:
        if world.is_main:
            print(f"{run_dir}: complete, {start} of {plan.total} steps; for another run write --train.name NAME")
            mend_config(config)
            say_finished(config)
        return
    journal = open_journal(config, start) if world.is_main else None
    snapshot_fn = partial(capture, engine, health.counters)
    async_save, minutes = config.train.async_save, config.train.save_minutes
    saver = Saver(checkpoints, snapshot_fn, state_bytes(engine), async_save, minutes, journal)
    if start == 0:
        saver.check_room()
    _train_and_report(
        Run(
            objective=objective,
            world=world,
            engine=engine,
            stream=open_stream(objective, sources[0], world, accumulate, plan, bad),
            bad=bad,
            accumulate=accumulate,
            plan=plan,
            counts_read=sources[0].counts_read,
            saver=saver,
            meta=meta,
            evaluations=evaluations,
            journal=journal,
            stop=stop,
            health=health,
            watch=Watchdog(run_dir, world, stop, config.train.watchdog, start),
            evaluate_first=[evaluations[i] for i in missing],
        )
    )


def say_finished(config: Any) -> None:
    """End the journal of a complete run, and its run in MLflow, where the process was killed before it did."""
    path = config.train.run_dir / FILE_NAME
    kinds = [record.get("kind") for record in read(path)] if path.is_file() else []
    if "start" not in kinds or "end" in kinds[-kinds[::-1].index("start") :]:
        return
    journal = Journal(path)
    journal.write({"kind": "end", "status": "FINISHED", "reason": ""})
    journal.sync()
    journal.close()
    MLflowTracker.start(config.train.run_dir, config.track).close()


def bad_samples(objective: Objective, train: Source, held_out: Source | None) -> BadSamples:
    """The list of a run, and of its evaluations."""
    config = objective.config
    different = int(train.counts.sum()) if config.data.mode == "exact" else None  # a list's length is only said
    evaluated = objective.num_evaluated(train, held_out)
    return BadSamples(config.train.run_dir, config.data.max_bad_fraction, different, evaluated)


def open_stream(
    objective: Objective, source: Source, world: World, accumulate: int, plan: Plan, bad: BadSamples
) -> ImageStream | ResampledStream:
    config, batch = objective.config, plan.batch
    start, shift = plan.batches(config.data.repeated_aug)
    exact = partial(ImageStream, shift=shift, views=objective.make_views())
    stream = exact if config.data.mode == "exact" else ResampledStream
    return stream(
        source, objective.model.height_width, config.data, config.train.seed, batch, accumulate,
        start, world.rank, world.size, pin_memory=world.device.type == "cuda", bad=bad, node=world.node,
    )  # fmt: skip


def _train_and_report(run: Run) -> None:
    """Train; whatever happens, the journal says how it ended."""
    tracker, watch = None, run.watch
    run.stop.last_words = partial(_end, run)
    try:
        if run.journal:
            describe(run)
            tracker = MLflowTracker.start(run.objective.config.train.run_dir, run.objective.config.track)
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
    print(f"{run.objective.config.train.name}: {spent}", flush=True)


def resume(config: Any, checkpoint: Path, engine: Engine, health: Health, meta: dict) -> tuple[int, int]:
    """Load a checkpoint; returns the updates behind it and the images seen.

    Raises UserError when config or data are not the run's.
    """
    done = check_resume(config, checkpoint, meta)
    health.restore(restore(engine, checkpoint))
    return done


def describe(run: Run) -> None:
    """Say what this run is: to the terminal, and to the journal as few parameters and some tags."""
    config, world, batch = run.objective.config, run.world, run.plan.batch
    params, tags = run.objective.describe(run.plan)
    tags |= {
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
        f"{config.train.run_dir}: {run.objective.model.enc_name} ({count / 1e6:.1f} M parameters), "
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
