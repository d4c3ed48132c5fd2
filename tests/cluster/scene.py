"""One run that faults happen to: its attempts, its small disk, its MLflow server, and the end of them all."""

import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mae_dist.shards.write import shard
from tests.cluster import laws
from tests.cluster.job import Job
from tests.cluster.nodes import two_nodes
from tests.conftest import TINY, write_images
from tests.track.conftest import Server

STEPS, BATCH, SAVE_EVERY, HELD_OUT, SEED = 60, 12, 5, 1, 0  # 40 images: batches straddle epochs
PEAK_LR, WARMUP_EPOCHS = 1e-3, 0.5  # as TINY has them
PATIENCE_S = 100.0  # a job that has not ended by then after a deadly fault never will
TIMEOUT_S = 8  # of a collective, where a cable is cut
TMPFS = "8m"  # about eleven checkpoints, or fewer and the rest of a run's directory


@dataclass
class Scene:
    """One run under fire."""

    folder: Path
    shards: Path
    random: random.Random
    ranks: int
    engine: list[str]
    undisturbed: Path
    elastic: bool = False
    """Each attempt has a number of ranks and a micro-batch of its own."""
    more: list[str] = field(default_factory=list)
    job: Job = field(init=False)
    jobs: list[Job] = field(default_factory=list)
    server: Server | None = None
    wrong: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    """Network namespaces that the ranks are in, if any."""

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "t"

    @property
    def batch(self) -> int:
        """BATCH, or a little more, so that the ranks have equal shares."""
        return -(-BATCH // self.ranks) * self.ranks

    @property
    def attempts(self) -> int:
        return len(self.jobs)

    def start(self) -> Job:
        """The next attempt: the same command, as always."""
        given = arguments(self.shards, self.folder / "runs", self.batch, *self.engine, *self.more)
        if self.elastic:
            self.ranks = self.random.choice([n for n in (1, 2, 3) if self.batch % n == 0])
            share = self.batch // self.ranks
            micro = self.random.choice([n for n in range(1, share + 1) if share % n == 0 and n * 4 >= share])
            given.append(f"--train.micro_batch_size={micro}")
        self.job = Job(self.folder, self.attempts + 1, self.ranks, given, self.nodes)
        self.jobs.append(self.job)
        self.job.reached = laws.last_journal_step(self.run)
        return self.job

    def start_server(self) -> None:
        """Return when it answers; a busy machine may need more than one try."""
        assert self.server
        for _ in range(3):
            with suppress(TimeoutError):
                self.server.start()
                return
            self.server.stop()
        raise TimeoutError("no MLflow server")

    @contextmanager
    def ready(self, kinds: Sequence[str]) -> Iterator[None]:
        """What these kinds need is there; at the end nothing is, not even a process."""
        self.run.mkdir(parents=True)
        small = bool({"disk full", "read-only"} & set(kinds))
        if small:
            mount(self.run)
        stack = ExitStack()
        try:
            if "link cut" in kinds:
                self.nodes = stack.enter_context(two_nodes())
                self.more += [f"--train.timeout={TIMEOUT_S}"]
            if "mlflow gone" in kinds:
                self.server = Server(self.folder)
                self.start_server()
                self.more += ["--track.mlflow=true", f"--track.tracking_uri={self.server.url}"]
            yield
        finally:
            for job in self.jobs:
                job.kill_all()
            stack.close()
            if self.server:
                self.server.stop()
            if small:
                subprocess.run(["umount", "--lazy", self.run], check=True)

    def await_steps(self, count: int) -> bool:
        """Whether the job got that far into its attempt; it may have ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while len(self.job.steps()) < count and not self.job.ended():
            if time.monotonic() > deadline:
                self.wrong.append(f"attempt {self.attempts} hung at step {self.job.step()}\n{self.job.tail()}")
                self.job.kill_all()
            time.sleep(0.005)
        return not self.job.ended()


def arguments(shards: Path, runs: Path, batch: int, *more: str) -> list[str]:
    return [
        "pretrain", *TINY, f"--data.shards={shards}", f"--data.val_shards={HELD_OUT}", f"--train.seed={SEED}",
        f"--train.runs_dir={runs}", "--train.name=t", f"--train.global_batch_size={batch}", f"--train.steps={STEPS}",
        "--train.eval_every=20", f"--train.save_every={SAVE_EVERY}", "--data.decoder=pil", *more,
    ]  # fmt: skip


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


def make_shards(folder: Path) -> Path:
    """46 images in five shards, of which the last is held out."""
    shard(write_images(folder / "images", classes=2, each=23), folder / "shards", shard_size=10)
    return folder / "shards"


def await_true(what: Callable[[], bool]) -> bool:
    """Whether `what` came true in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
