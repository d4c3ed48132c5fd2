"""Real training jobs, faults drawn from a seed, restarts as a scheduler makes them; then the laws, checked from disk.

    python -m tests.cluster.chaos --seeds 1 2 3 [--engine deepspeed --zero 2] [--kinds ...]

prints a line a fault and a table by kind; the exit status is 1 when anything was lost, repeated or different. What is
not the same byte for byte, and what never ends, is a finding; how long something took is only shown.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mae_dist.shards.write import shard
from tests.cluster import laws
from tests.cluster.job import Job, kill
from tests.conftest import TINY, write_images
from tests.track.conftest import Server

STEPS, BATCH, SAVE_EVERY, HELD_OUT, SEED = 60, 14, 5, 1, 0  # 36 images: batches straddle epochs
FAULTS_A_RUN = 6
PATIENCE_S = 100.0  # a job that has not ended by then after a deadly fault never will
TMPFS = "8m"  # about eleven checkpoints
FILLER = "filler"


@dataclass
class Fault:
    """One fault and what came of it."""

    kind: str
    after: int
    """Steps into the attempt, or 0: while it starts."""
    step: int = 0
    """Where it hit."""
    what: str = ""
    seconds: float = 0.0
    """From the fault to the job's end, where it ended it."""
    reached: int = 0
    """The last step in the journal, then."""
    next_attempt: int = 0
    """0: the job went on by itself."""
    resumed: int | None = None
    """The step from which the next attempt went on."""
    lost: int = 0
    """Steps done again."""

    def __str__(self) -> str:
        then = "went on" if self.resumed is None else f"ended after {self.seconds:.1f} s, resumed at {self.resumed}"
        return f"{self.kind:14} step {self.step:3}  {self.what:58}  {then}, lost steps {self.lost}"


@dataclass
class Scene:
    """One run under fire."""

    folder: Path
    shards: Path
    random: random.Random
    ranks: int
    engine: list[str]
    undisturbed: Path
    more: list[str] = field(default_factory=list)
    job: Job = field(init=False)
    jobs: list[Job] = field(default_factory=list)
    server: Server | None = None
    wrong: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "t"

    @property
    def attempts(self) -> int:
        return len(self.jobs)

    def start(self) -> Job:
        """The next attempt: the same command, as always."""
        given = arguments(self.shards, self.folder / "runs", *self.engine, *self.more)
        self.job = Job(self.folder, self.attempts + 1, self.ranks, given)
        self.jobs.append(self.job)
        return self.job

    @contextmanager
    def ready(self, kinds: Sequence[str]) -> Iterator[None]:
        """What these kinds need is there; at the end nothing is, not even a process."""
        checkpoints = self.run / "checkpoints"
        checkpoints.mkdir(parents=True)
        if "disk full" in kinds:
            mount(checkpoints)
        try:
            if "mlflow gone" in kinds:
                self.server = Server(self.folder)
                self.server.start()
                self.more += ["--track.mlflow=true", f"--track.tracking_uri={self.server.url}"]
            yield
        finally:
            for job in self.jobs:
                job.kill_all()
            if self.server:
                self.server.stop()
            if "disk full" in kinds:
                subprocess.run(["umount", "--lazy", checkpoints], check=True)

    def await_steps(self, count: int) -> bool:
        """Whether the job got that far into its attempt; it may have ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self.job.steps()) < count and not self.job.ended():
            if time.monotonic() > deadline:
                self.wrong.append(f"attempt {self.attempts} hung at step {self.job.step()}\n{self.job.tail()}")
                self.job.kill_all()
            time.sleep(0.005)
        return not self.job.ended()


def mount(place: Path) -> None:
    """A small file system there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS}", "chaos", place], check=True, capture_output=True)


def can_mount() -> bool:
    """Whether this user may mount file systems here."""
    with tempfile.TemporaryDirectory() as place:
        try:
            mount(Path(place))
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", place], check=True)
        return True


def arguments(shards: Path, runs: Path, *more: str) -> list[str]:
    return [
        "pretrain", *TINY, f"--data.shards={shards}", f"--data.val_shards={HELD_OUT}", f"--train.seed={SEED}",
        f"--train.runs_dir={runs}", "--train.name=t", f"--train.global_batch_size={BATCH}", f"--train.steps={STEPS}",
        "--train.eval_every=20", f"--train.save_every={SAVE_EVERY}", *more,
    ]  # fmt: skip


# --- the faults: each does its worst to `scene.job`, says what it did, and whether the job must end of it -------------

Deadly = bool


def kill_rank(scene: Scene) -> tuple[str, Deadly]:
    rank = scene.random.choice(scene.job.ranks())
    kill(rank.pid)
    return f"SIGKILL rank {rank.environment['RANK']}", True


def kill_agent(scene: Scene) -> tuple[str, Deadly]:
    """The scheduler sees the job's end at once, and starts the next attempt while ranks may still be there."""
    kill(scene.job.agent.pid)
    return f"SIGKILL torchrun, {len(scene.job.ranks())} ranks without a parent", True


def kill_all(scene: Scene) -> tuple[str, Deadly]:
    count = len(scene.job.trainers())
    scene.job.kill_all()
    return f"SIGKILL all {count} processes", True


def kill_worker(scene: Scene) -> tuple[str, Deadly]:
    workers = scene.job.workers()
    if not workers:
        return "no worker there", False
    worker = scene.random.choice(workers)
    kill(worker.pid)
    return f"SIGKILL loader worker of rank {worker.environment['RANK']}", True


def kill_in_save(scene: Scene) -> tuple[str, Deadly]:
    """One rank, or the whole node, while `.step-N` is being written."""
    checkpoints, deadline = scene.run / "checkpoints", time.monotonic() + PATIENCE_S
    while not (aside := [path.name for path in checkpoints.glob(".step-*")]):
        if scene.job.ended() or time.monotonic() > deadline:
            return "no save came", False
        time.sleep(0.002)
    time.sleep(scene.random.uniform(0, 0.12))
    whole = scene.random.random() < 0.5
    said = kill_all(scene)[0] if whole else kill_rank(scene)[0]
    return f"{said} while {aside[0]} was written" + (", left there" if any(checkpoints.glob(".step-*")) else ""), True


def stop_a_while(scene: Scene) -> tuple[str, Deadly]:
    rank, seconds = scene.random.choice(scene.job.ranks()), scene.random.uniform(0.5, 3)
    kill(rank.pid, signal.SIGSTOP)
    time.sleep(seconds)
    kill(rank.pid, signal.SIGCONT)
    return f"SIGSTOP rank {rank.environment['RANK']} for {seconds:.1f} s", False


def stop_for_good(scene: Scene) -> tuple[str, Deadly]:
    """The scheduler loses patience: SIGTERM to the job, and SIGKILL to all of it a little later."""
    rank = scene.random.choice(scene.job.ranks())
    kill(rank.pid, signal.SIGSTOP)
    time.sleep(scene.random.uniform(0.5, 2))
    kill(scene.job.agent.pid, signal.SIGTERM)
    scene.job.wait(2)
    scene.job.kill_all()
    return f"SIGSTOP rank {rank.environment['RANK']}; the scheduler ends the job", True


def terminate_rank(scene: Scene) -> tuple[str, Deadly]:
    rank = scene.random.choice(scene.job.ranks())
    kill(rank.pid, signal.SIGTERM)
    return f"SIGTERM rank {rank.environment['RANK']}", True


def terminate_agent(scene: Scene) -> tuple[str, Deadly]:
    kill(scene.job.agent.pid, signal.SIGTERM)
    return "SIGTERM torchrun", True


def fill_disk(scene: Scene) -> tuple[str, Deadly]:
    """Too little room for one more checkpoint, until the scheduler has cleaned up."""
    checkpoints = scene.run / "checkpoints"
    size = max((path.stat().st_size for path in checkpoints.glob("*/model.safetensors")), default=200_000)
    free = shutil.disk_usage(checkpoints).free
    leave = scene.random.randrange(size)
    with suppress(OSError), (checkpoints / FILLER).open("wb", buffering=0) as file:
        file.write(bytes(max(0, free - leave)))
    return f"{shutil.disk_usage(checkpoints).free} bytes free in checkpoints/", True


def stop_mlflow(scene: Scene) -> tuple[str, Deadly]:
    assert scene.server
    scene.server.stop()
    return "SIGKILL the MLflow server", False


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
    "mlflow gone": stop_mlflow,
    "twice": start_twice,
}


# --- one run ----------------------------------------------------------------------------------------------------------


def disturb(scene: Scene, fault: Fault) -> bool:
    """Let one fault happen to the running job; if it ends the job, start the next attempt. False: it came too late."""
    job = scene.job
    if fault.after:
        if not scene.await_steps(fault.after):
            return False
    else:
        if not await_true(lambda: len(job.ranks()) == scene.ranks or job.ended()) or job.ended():
            return False
        time.sleep(scene.random.uniform(0, 4))
    if job.ended():
        return False
    fault.step = job.step()
    fault.what, deadly = KINDS[fault.kind](scene)
    began = time.monotonic()
    if deadly:
        if job.wait(PATIENCE_S) is None:
            scene.wrong.append(f"{fault.kind}: {PATIENCE_S:.0f} s later the job is still there\n{job.tail()}")
            job.kill_all()
        fault.seconds = time.monotonic() - began
        (scene.run / "checkpoints" / FILLER).unlink(missing_ok=True)
        if fault.kind != "kill agent":
            scene.wrong += laws.law_4(scene.run, scene.undisturbed / "runs" / "t")
    if deadly or scene.job is not job:
        fault.reached = laws.last_journal_step(scene.run)
        fault.next_attempt = (scene.start() if deadly else scene.job).attempt
    return True


def await_true(what: Callable[[], bool]) -> bool:
    """Whether `what` came true in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def finish(scene: Scene) -> None:
    """Let the run end; a job that ends early by itself is started again, and written down."""
    for _ in range(5):
        if scene.job.wait(PATIENCE_S) is None:
            scene.wrong.append(f"attempt {scene.job.attempt} hung at step {scene.job.step()}\n{scene.job.tail()}")
            scene.job.kill_all()
        if laws.complete(scene.run, STEPS):
            return
        scene.wrong.append(f"attempt {scene.job.attempt} ended by itself\n{scene.job.tail()}")
        scene.start()
    scene.wrong.append("the run was never complete")


def check(scene: Scene) -> list[str]:
    """All that is wrong with a run that has ended."""
    whole = scene.undisturbed / "runs" / "t"
    wrong = laws.law_1(scene.run, whole) + laws.law_4(scene.run, whole) + laws.tidy(scene.run)
    audits = scene.folder / "audit", scene.undisturbed / "audit"
    wrong += laws.law_3(*audits, scene.shards, HELD_OUT, SEED, BATCH, STEPS)
    if scene.server:
        scene.server.stop()
        scene.server.start()
        wrong += laws.law_5(scene.run, scene.server.url)
    return scene.wrong + wrong


def chaos(scene: Scene, kinds: Sequence[str]) -> tuple[list[Fault], list[str]]:
    """One run with faults of these kinds, one after the other. Returns those that hit, and what is wrong."""
    draw, faults = scene.random, []
    with scene.ready(kinds):
        scene.start()
        for kind in kinds:
            waits = kind in ("kill worker", "kill in save", "mlflow gone")  # they need a job that trains
            fault = Fault(kind, draw.randint(0 if draw.random() < 0.3 and not waits else 1, 9))
            if laws.complete(scene.run, STEPS) or not disturb(scene, fault):
                break
            faults.append(fault)
        finish(scene)
        for fault in faults:
            if fault.next_attempt:
                fault.resumed = laws.resumed_at(scene.folder / f"attempt-{fault.next_attempt:03d}.log")
                fault.lost = max(0, fault.reached - fault.resumed)
        return faults, check(scene)


def undisturbed(folder: Path, shards: Path, ranks: int, engine: list[str]) -> Path:
    """The run that nothing happens to, with a checkpoint of every step."""
    more = ["--train.save_every=1", "--train.keep_checkpoints=1000"]
    scene = Scene(folder / "undisturbed", shards, random.Random(0), ranks, engine, folder, more=more)
    with scene.ready([]):
        job = scene.start()
        code = job.wait(PATIENCE_S * 3)
        assert code == 0 and laws.complete(scene.run, STEPS), job.tail()
    return scene.folder


def make_shards(folder: Path) -> Path:
    """46 images in five shards, of which the last is held out."""
    shard(write_images(folder / "images", classes=2, each=23), folder / "shards", shard_size=10)
    return folder / "shards"


# --- the command line -------------------------------------------------------------------------------------------------


def table(faults: Sequence[Fault]) -> str:
    """By kind: how often, what it cost."""
    lines = [f"{'kind':14} {'faults':>6} {'restarts':>8} {'worst steps lost':>16} {'slowest end':>11}"]
    for kind in KINDS:
        these = [fault for fault in faults if fault.kind == kind]
        if these:
            restarts = sum(fault.resumed is not None for fault in these)
            lost, slowest = max(f.lost for f in these), max(f.seconds for f in these)
            lines.append(f"{kind:14} {len(these):6} {restarts:8} {lost:16} {slowest:9.1f} s")
    restarts = sum(fault.resumed is not None for fault in faults)
    worst = max((fault.lost for fault in faults), default=0)
    return "\n".join([*lines, f"{'all':14} {len(faults):6} {restarts:8} {worst:16}"])


def draw_kinds(draw: random.Random, among: Sequence[str], count: int) -> list[str]:
    """Each kind once before any comes again; one run in four has an MLflow server, which is half of its work."""
    among = among if draw.random() < 0.25 else [kind for kind in among if kind != "mlflow gone"] or among
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += draw.sample(among, min(len(among), count - len(drawn)))
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description="Training under fire.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a run each (%(default)s)")
    parser.add_argument("--faults", type=int, default=FAULTS_A_RUN, help="faults a run (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS], help="of fault (all)")
    parser.add_argument("--engine", help="engine.name; left out: the default engine")
    parser.add_argument("--zero", type=int, help="engine.zero_stage")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where everything stays (a temporary directory)")
    given = parser.parse_args()
    engine = [f"--engine.name={given.engine}"] if given.engine else []
    engine += [f"--engine.zero_stage={given.zero}"] if given.zero is not None else []
    folder = given.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    kinds = [kind for kind in given.kinds if kind != "disk full" or can_mount()]
    faults, failed = [], 0
    try:
        shards = make_shards(folder)
        whole = undisturbed(folder, shards, given.ranks, engine)
        for seed in given.seeds:
            draw = random.Random(seed)
            scene = Scene(folder / f"seed-{seed}", shards, draw, given.ranks, engine, whole)
            these, wrong = chaos(scene, draw_kinds(draw, kinds, given.faults))
            faults += these
            failed += bool(wrong)
            print(f"seed {seed}: {len(these)} faults, {scene.attempts} attempts, ", end="")
            print("as if undisturbed" if not wrong else f"{len(wrong)} findings")
            print(
                "".join(f"  {fault}\n" for fault in these) + "".join(f"  WRONG {text}\n" for text in wrong), flush=True
            )
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(faults))
    print(f"{len(given.seeds)} runs, {len(given.seeds) - failed} of them as if undisturbed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
