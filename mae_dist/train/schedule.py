"""How far a run is and what its learning rate is: in images seen, so that both are the same at any batch size."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from mae_dist.errors import UserError, note
from mae_dist.train.options import TrainConfig

FEW = 25  # updates: fewer, of batches that are larger than all images, come of a recipe made for more of them


class Optim(Protocol):
    """What a schedule needs of the options of an optimizer."""

    @property
    def min_lr(self) -> float: ...
    @property
    def warmup_epochs(self) -> float: ...


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from exactly 0, then half a cosine to `min_lr` (paper appendix A.1, per update)."""

    peak_lr: float
    min_lr: float
    warmup_steps: float
    total_steps: float

    def lr(self, step: float) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1e-9, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Plan:
    """The updates of a run from `start` on, which has seen `seen` images.

    With another batch size than before it goes on with the next image, at the same epoch, and at the same share of its
    schedule: all follow from the images seen.
    """

    train: TrainConfig
    optim: Optim
    peak_lr: float
    epoch_images: int
    start: int = 0
    seen: int = 0

    @property
    def batch(self) -> int:
        return self.train.global_batch_size

    @cached_property
    def total(self) -> int:
        """Updates of the whole run."""
        if self.train.steps:
            return max(self.train.steps, self.start)
        batches = self.train.epochs * self.epoch_images / self.batch - self.seen / self.batch
        return self.start + max(0, math.ceil(batches))

    @cached_property
    def schedule(self) -> CosineSchedule:
        """As if all batches had been of this size."""
        total = self.images(self.total) / self.batch
        return CosineSchedule(self.peak_lr, self.optim.min_lr, min(self.warmup, total), total)

    @property
    def warmup(self) -> float:
        """In updates of this size."""
        return self.optim.warmup_epochs * (self.epoch_images / self.batch)

    def images(self, step: int) -> int:
        """Seen after `step` updates."""
        return self.seen + (step - self.start) * self.batch

    def batches(self, views: int) -> tuple[int, int]:
        """The global batch to go on with, and the samples before batch 0, were all of this size and `views` a sample.

        In mode exact; a batch that is not of the size of those before need not begin at a multiple of it.
        """
        return divmod(self.seen // views, self.batch // views)

    def epoch(self, step: int) -> float:
        return self.images(step) / self.epoch_images

    def lr(self, k: int) -> float:
        """Of update `k`, counted from 0."""
        return self.schedule.lr(self.images(k) / self.batch)

    def completes(self, step: int, epochs: float) -> bool:
        """Whether another so many epochs were completed by update `step`."""
        size, after = epochs * self.epoch_images, self.images(step)
        return after // size > (after - self.batch) // size

    def check(self) -> None:
        """Raise UserError when a run with this plan would learn nothing: it has next to no updates, or only warms up.

        With `train.steps`, which says how few there are, the latter is only noted.
        """
        t, total, warmup = self.train, self.total, self.warmup
        what = f"{self.epoch_images} images in batches of {self.batch}"
        few = f"a smaller --train.global_batch_size, fewer --optim.warmup_epochs ({0.1 * self.epoch(total):.2g}, say)"
        rising = f"the warm-up, optim.warmup_epochs {self.optim.warmup_epochs:g}, is {warmup:.3g} updates"
        if not t.steps and (total == 1 or (total < FEW and self.batch > self.epoch_images)):
            raise UserError(
                f"{what} for {t.epochs:g} epochs are {total} update{'s' * (total > 1)}, too few to learn from: write a "
                f"smaller --train.global_batch_size, more --train.epochs, or --train.steps {total} if that is meant"
            )
        if self.peak_lr < self.optim.min_lr:
            raise UserError(
                f"optim.min_lr: {self.optim.min_lr:g} is above the peak learning rate, {self.peak_lr:g} (optim.lr, or "
                "optim.blr * train.global_batch_size / 256): write a lower one"
            )
        if warmup and total == 1:
            raise UserError(f"{what}, one update: its learning rate is 0, as the first of a warm-up; write {few}")
        if warmup >= total and not t.steps:
            raise UserError(f"{what}: {rising}, and the whole run {total}: write {few}, or more --train.epochs")
        if warmup >= total:
            note(f"{rising}, and the whole run {total}: the learning rate rises to the end, and not to its peak")
