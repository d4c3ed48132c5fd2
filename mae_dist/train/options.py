"""How long a run is, how its batches are cut, and what it keeps."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from mae_dist.engine.base import Precision
from mae_dist.errors import UserError
from mae_dist.local import check_local
from mae_dist.ranges import AMOUNT, COUNT, SEED, check_numbers


@dataclass(frozen=True)
class TrainConfig:
    """How long a run is, how its batches are cut, and what it keeps."""

    name: str = "mae"
    """The run's name: its directory is RUNS_DIR/NAME. Starting the same name again resumes it."""
    runs_dir: str = "runs"
    """Directory of the runs."""
    seed: int = 0
    """Of initialisation, order, crops and masks: with the data it decides the whole run."""
    global_batch_size: int = 4096
    """Images an update. Cut over ranks and micro-batches; the result does not depend on how."""
    micro_batch_size: int | None = None
    """Images a rank takes at once; null: all of its share. Fewer need less memory, and gradients are accumulated."""
    epochs: float = 800.0
    """Times that every training image is seen."""
    steps: int | None = None
    """Updates of the whole run; replaces `epochs`."""
    precision: Precision = "bf16"
    """Of the forward and backward pass; weights and moments are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: on CUDA where there is any."""
    log_every: int = 20
    """Steps between lines and journal entries."""
    eval_every: int = 1000
    """Steps between validation losses and reconstruction pictures; the last step always has them."""
    knn_every: float | None = None
    """Epochs between k-NN accuracies (k=20) on labelled data.val_shards, of at most 10,000 training and held-out images
    each; the last step then has one too. null: none."""
    save_every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    save_minutes: float | None = None
    """Minutes between checkpoints, besides: seen at log steps, by rank 0's clock."""
    async_save: bool = True
    """Write checkpoints while the training goes on; it waits for the copy into host memory, and for the last one."""
    keep_checkpoints: int = 3
    """The last so many, and on disk one more while it is written."""
    keep_every: int | None = None
    """Besides, for ever: checkpoints whose step is a multiple of this."""
    max_skipped: int = 20
    """Updates in a row that may be skipped for non-finite numbers or spikes before the run stops."""
    spike_sigma: float | None = None
    """Skip an update whose loss is so many standard deviations above the recent mean (6, say); null: none is."""
    timeout: float = 300.0
    """Seconds that a rank waits for the others in a step before it gives the run up, to be started again."""
    watchdog: float | None = 60.0
    """Seconds after which a step that hangs is told of, with the stacks of all ranks in logs/; null: never."""
    accept_changes: bool = False
    """Resume although the config or the data changed (a lower learning rate after a divergence, say)."""

    RANGES: ClassVar = {
        "seed": SEED, "global_batch_size": COUNT, "micro_batch_size": COUNT, "epochs": AMOUNT, "steps": COUNT,
        "log_every": COUNT, "eval_every": COUNT, "knn_every": AMOUNT, "save_every": COUNT, "save_minutes": AMOUNT,
        "keep_checkpoints": COUNT, "keep_every": COUNT, "max_skipped": COUNT, "spike_sigma": AMOUNT, "timeout": AMOUNT,
        "watchdog": AMOUNT,
    }  # fmt: skip

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    def check(self) -> None:
        """Raise UserError for a name or place that is none for a directory, and a number out of its range."""
        if not self.name.isprintable() or not self.name or self.name.startswith(".") or "/" in self.name:
            raise UserError(f"train.name: {self.name!r} is not a name for a directory; write one such as vit_b16")
        check_local(self.runs_dir, "train.runs_dir")
        if str(self.run_dir).encode(errors="ignore").decode() != str(self.run_dir):
            raise UserError(f"train.runs_dir, train.name: {str(self.run_dir)!r} is not UTF-8, and safetensors opens no "
                            "such file; write another name")  # fmt: skip
        check_numbers(self, "train.")

    def accumulate(self, world_size: int, views: int = 1) -> int:
        """Micro-batches a rank makes of its share of one global batch. `views` of each sample stay in one of them.

        Raises UserError, with the nearest sizes that work, when the batch does not divide.
        """
        batch, micro = self.global_batch_size, self.micro_batch_size
        whole = f" by whole samples of {views} views (data.repeated_aug)" if views > 1 else ""
        if batch % (world_size * views):
            raise UserError(
                f"train.global_batch_size: {batch} does not divide over {world_size} processes{whole}; "
                f"the nearest that do are {nearest(batch, world_size * views)}"
            )
        share = batch // world_size
        micro = share if micro is None else micro
        if micro < 1 or share % micro or micro % views:
            divisors = [d for d in range(views, share + 1, views) if share % d == 0]
            near = sorted(sorted(divisors, key=lambda d: abs(d - micro))[:2])
            raise UserError(
                f"train.micro_batch_size: {micro} does not divide the {share} images a process takes of each global "
                f"batch of {batch} ({world_size} processes){whole}; the nearest that do are "
                f"{' and '.join(map(str, near))}"
            )
        return share // micro


def nearest(value: int, divisor: int) -> str:
    low = value // divisor * divisor
    return " and ".join(str(v) for v in (low, low + divisor) if v > 0)
