"""When an update is left out, and when numbers are too bad to go on. Decided on the device, the same on every rank."""

import torch
from torch import Tensor

from mae_dist.engine.base import StepResult
from mae_dist.engine.world import World
from mae_dist.errors import Ended

WINDOW = 128  # updates that "recent" means
WARM_UP = 32  # losses seen before one can be called a spike


class TrainingDiverged(Ended):
    """The run stopped itself: too many updates in a row were skipped."""

    status = 3


def check_skipped(in_row: int, limit: int, step: int) -> None:
    """Raise TrainingDiverged when `limit` updates in a row were skipped by `step`. The weights are still good."""
    if in_row >= limit:
        raise TrainingDiverged(
            f"{in_row} updates in a row up to step {step} were skipped: loss or gradient not finite, or a loss beyond "
            "train.spike_sigma. The weights are unharmed (none of these was applied). Lower optim.blr, set "
            "optim.clip_grad (1.0), or use train.precision bf16 or fp32, and resume"
        )


class Health:
    """Counts skipped updates, and vetoes those whose loss is a spike. Its numbers are part of every checkpoint.

    A spike is `sigma` standard deviations above the mean of the last losses or more, where a spike counts as the limit
    that it broke: what was no accident but a new level is learnt in the end. None: nothing is a spike.
    """

    def __init__(self, world: World, sigma: float | None):
        self.world, self.sigma = world, sigma
        names = ("skipped", "skipped_in_row", "losses", "loss_mean", "loss_variance")
        self.counters = {name: torch.zeros((), device=world.device) for name in names}

    def restore(self, counters: dict[str, Tensor]) -> None:
        """Take what is ours of a checkpoint's counters."""
        self.counters |= {name: counters[name].to(self.world.device) for name in self.counters if name in counters}

    @torch.no_grad()
    def veto(self, loss: Tensor) -> Tensor | None:
        """() bool, the same on every rank: leave this update out. `loss`: () float32, mean over this rank's samples."""
        if self.sigma is None:
            return None
        mean_loss = self.world.sum(loss.detach().clone()) / self.world.size
        count, mean, variance = (self.counters[name] for name in ("losses", "loss_mean", "loss_variance"))
        limit = torch.where(count >= WARM_UP, mean + self.sigma * variance.sqrt(), float("inf"))
        good = mean_loss.isfinite()
        step = torch.minimum(mean_loss, limit) - mean
        weight = 1 / (count + 1).clamp(max=WINDOW)  # the mean of all, then of the recent ones
        self.counters["losses"] = torch.where(good, count + 1, count)
        self.counters["loss_mean"] = torch.where(good, mean + weight * step, mean)
        self.counters["loss_variance"] = torch.where(good, (1 - weight) * (variance + weight * step**2), variance)
        return mean_loss > limit

    def note(self, result: StepResult) -> None:
        skipped, in_row = self.counters["skipped"], self.counters["skipped_in_row"]
        self.counters["skipped"] = skipped + result.skipped
        self.counters["skipped_in_row"] = torch.where(result.skipped > 0, in_row + 1, 0.0)
