"""The faults: each does its worst to `scene.job`, says what it did, and whether the job must end of it."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from tests.cluster import laws
from tests.cluster.job import Process, kill
from tests.cluster.nodes import plug
from tests.cluster.scene import PATIENCE_S, SAVE_EVERY, Scene, await_true

FILLER = "filler"
Deadly = bool


class Missed(Exception):
    """The fault did not hit: it is not counted."""


def strike(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process that is there, else raise Missed."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise Missed from None


def any_rank(scene: Scene) -> Process:
    if not (ranks := scene.job.ranks()):
        raise Missed
    return scene.random.choice(ranks)


def kill_rank(scene: Scene) -> tuple[str, Deadly]:
    rank = any_rank(scene)
    strike(rank.pid)
    return f"SIGKILL rank {rank.environment['RANK']}", True


def kill_agent(scene: Scene) -> tuple[str, Deadly]:
    """The scheduler sees the job's end at once, and starts the next attempt while ranks may still be there."""
    strike(scene.job.agents[-1].pid)
    return f"SIGKILL torchrun, {len(scene.job.ranks())} ranks without a parent", True


def kill_all(scene: Scene) -> tuple[str, Deadly]:
    count = len(scene.job.trainers())
    scene.job.kill_all()
    return f"SIGKILL all {count} processes", True


def kill_worker(scene: Scene) -> tuple[str, Deadly]:
    workers = scene.job.workers()
    if not workers:
        raise Missed
    worker = scene.random.choice(workers)
    strike(worker.pid)
    return f"SIGKILL loader worker of rank {worker.environment['RANK']}", True


def kill_in_save(scene: Scene) -> tuple[str, Deadly]:
    """One rank, or the whole node, while `.step-N` is being written."""
    checkpoints, deadline = scene.run / "checkpoints", time.monotonic() + PATIENCE_S
    while not (aside := [path.name for path in checkpoints.glob(".step-*")]):
        if scene.job.ended() or time.monotonic() > deadline:
            raise Missed
        time.sleep(0.002)
    time.sleep(scene.random.uniform(0, 0.12))
    whole = scene.random.random() < 0.5
    said = kill_all(scene)[0] if whole else kill_rank(scene)[0]
    return f"{said} while {aside[0]} was written" + (", left there" if any(checkpoints.glob(".step-*")) else ""), True


def stop_a_while(scene: Scene) -> tuple[str, Deadly]:
    rank, seconds = any_rank(scene), scene.random.uniform(0.5, 3)
    strike(rank.pid, signal.SIGSTOP)
    time.sleep(seconds)
    kill(rank.pid, signal.SIGCONT)
    return f"SIGSTOP rank {rank.environment['RANK']} for {seconds:.1f} s", False


def stop_for_good(scene: Scene) -> tuple[str, Deadly]:
    """The scheduler loses patience: SIGTERM to the job, and SIGKILL to all of it a little later."""
    rank = any_rank(scene)
    strike(rank.pid, signal.SIGSTOP)
    time.sleep(scene.random.uniform(0.5, 2))
    kill(scene.job.agents[-1].pid, signal.SIGTERM)
    scene.job.wait(2)
    scene.job.kill_all()
    return f"SIGSTOP rank {rank.environment['RANK']}; the scheduler ends the job", True


def terminate_rank(scene: Scene) -> tuple[str, Deadly]:
    rank = any_rank(scene)
    strike(rank.pid, signal.SIGTERM)
    return f"SIGTERM rank {rank.environment['RANK']}", True


def terminate_agent(scene: Scene) -> tuple[str, Deadly]:
    strike(scene.job.agents[-1].pid, signal.SIGTERM)
    return "SIGTERM torchrun", True


def fill_disk(scene: Scene) -> tuple[str, Deadly]:
    """Too little room for one more checkpoint, until the job has ended of it or passed by where one was due."""
    job, checkpoints = scene.job, scene.run / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    size = max((path.stat().st_size for path in checkpoints.glob("step-*/model.safetensors")), default=200_000)
    room = max(0, shutil.disk_usage(checkpoints).free - scene.random.randrange(size))
    with suppress(OSError), (checkpoints / FILLER).open("wb", buffering=0) as file:
        file.write(bytes(room))
    left, passed = shutil.disk_usage(checkpoints).free, len(job.steps()) + SAVE_EVERY + scene.random.randint(1, 5)
    await_true(lambda: job.ended() or len(job.steps()) >= passed)
    (checkpoints / FILLER).unlink()
    if "no checkpoint of step" not in job.log.read_text() and not job.ended():
        raise Missed
    return f"{left} bytes free in the run's directory", job.ended()


def read_only(scene: Scene) -> tuple[str, Deadly]:
    """The run's directory takes no new file for a while, as after an error of its disk; what is open is written."""
    job, where = scene.job, str(scene.run)
    subprocess.run(["mount", "--bind", where, where], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", where], check=True)
    passed = len(job.steps()) + SAVE_EVERY + scene.random.randint(1, 5)
    await_true(lambda: job.ended() or len(job.steps()) >= passed)
    subprocess.run(["umount", "--lazy", where], check=True)
    if "Read-only file system" not in job.log.read_text() and not job.ended():
        raise Missed
    return "the run's directory read-only", job.ended()


def stop_mlflow(scene: Scene) -> tuple[str, Deadly]:
    assert scene.server
    scene.server.stop()
    return "SIGKILL the MLflow server", False


def cut_link(scene: Scene) -> tuple[str, Deadly]:
    """For a moment, or for longer than a collective waits: then both nodes give up."""
    plug(scene.nodes[1], "down")
    if scene.random.random() < 0.5:
        seconds = scene.random.uniform(0.2, 1.5)
        time.sleep(seconds)
        plug(scene.nodes[1], "up")
        return f"the cable between the nodes cut for {seconds:.1f} s", scene.job.ended()
    ended = await_true(scene.job.ended)
    plug(scene.nodes[1], "up")
    return "the cable between the nodes cut until both gave up", ended


def start_twice(scene: Scene) -> tuple[str, Deadly]:
    """After a power cut the same command twice at once: one waits while the other trains, and follows it."""
    scene.job.kill_all()
    pair = [scene.start(), scene.start()]
    await_true(lambda: any(job.steps() for job in pair) or all(job.ended() for job in pair))
    time.sleep(scene.random.uniform(0, 2))
    training = [job for job in pair if job.steps()]
    if len(training) != 1:
        scene.wrong.append(f"{len(training)} of two attempts train at once")
    doomed = training[0] if training and scene.random.random() < 0.5 else pair[1]
    doomed.kill_all()
    scene.job = pair[0] if doomed is pair[1] else pair[1]
    if doomed in training:
        scene.job.reached = laws.last_journal_step(scene.run)
    return (
        f"the same command twice at once; then SIGKILL the one that {'trains' if doomed in training else 'waits'}",
        False,
    )


KINDS: dict[str, Callable[[Scene], tuple[str, Deadly]]] = {
    "kill rank": kill_rank,
    "kill agent": kill_agent,
    "kill all": kill_all,
    "kill worker": kill_worker,
    "kill in save": kill_in_save,
    "stop a while": stop_a_while,
    "stop for good": stop_for_good,
    "term rank": terminate_rank,
    "term agent": terminate_agent,
    "disk full": fill_disk,
    "read-only": read_only,
    "mlflow gone": stop_mlflow,
    "twice": start_twice,
    "link cut": cut_link,
}
