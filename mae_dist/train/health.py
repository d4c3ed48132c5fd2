"""When an update is left out, and when numbers are too bad to go on. Decided on the device, the same on every rank."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mae_dist.engine.base import StepResult
from mae_dist.engine.world import World
from mae_dist.errors import Ended
from mae_dist.train.checkpoint import committed, step_of

WINDOW = 128  # updates that "recent" means
WARM_UP = 32  # losses seen before one can be called a spike


class TrainingDiverged(Ended):
    """The run stopped itself: too many updates in a row were skipped."""

    status = 3


def check_skipped(
    in_row: int, limit: int, step: int, last: bool, health: "Health", look: Callable[[], str], root: Path
) -> None:
    """Raise TrainingDiverged when `limit` updates in a row were skipped by `step`, or fewer by the `last` one and the
    weights are ruined. Collective.

    `look()`, collective, says what is wrong with the weights, the same on all ranks; empty: nothing. `root`: of the
    checkpoints.
    """
    if in_row < limit and not (last and health.streak()):
        return
    harm, streak = look(), health.streak()
    if in_row < limit and not harm:
        return
    found = (
        f"{max(in_row, streak)} updates in a row up to step {step} were skipped: loss or gradient not finite, or a "
        "loss beyond train.spike_sigma. "
    )
    if not harm:
        raise TrainingDiverged(
            f"{found}The weights are unharmed: all finite, and so are loss and gradient in float32 (none of these "
            "updates was applied). Lower optim.blr, set optim.clip_grad (1.0), or use train.precision bf16 or fp32 "
            "and resume"
        )
    raise TrainingDiverged(found + go_back(harm, step - streak, root))


def go_back(harm: str, applied: int, root: Path) -> str:
    """What to do about weights that the update number `applied` ruined, 0: that never were good."""
    if not applied:
        return f"No update was ever applied, and {harm}: look at data.mean, data.std and the model's settings"
    good = [path.name for path in committed(root) if step_of(path) < applied]
    gentle = "a lower optim.blr or with optim.clip_grad (1.0)"
    if not good:
        advice = f"No checkpoint is older: begin another run (--train.name) with {gentle}"
    else:
        advice = f"Go back to {root / good[-1]}: remove the later ones, and resume with {gentle} and "
        advice += "--train.accept_changes true"
    return f"The weights are ruined since update {applied}: {harm}. {advice}"


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

    def streak(self) -> int:
        """Updates skipped in a row up to now. Waits for the device."""
        return int(self.counters["skipped_in_row"])

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
