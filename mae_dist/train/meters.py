"""What is measured between two log lines, on the device until the line is due."""

import math
import time
from typing import NamedTuple

import torch

from mae_dist.engine.base import StepResult
from mae_dist.engine.world import World
from mae_dist.train.health import Health


class Reading(NamedTuple):
    """What all ranks agree on after a sync."""

    metrics: dict[str, float]
    skipped_in_row: int
    bad_samples: int
    """Found by the whole run so far, each once."""
    save_due: bool
    """Rank 0's clock asks for a checkpoint."""


class Meters:
    """Sums over the steps since the last sync. `add` never waits for the device; `sync` does, once."""

    def __init__(self, world: World, global_batch_size: int, health: Health):
        self.world, self.global_batch_size, self.health = world, global_batch_size, health
        self._restart()

    def _restart(self) -> None:
        zero = torch.zeros((), device=self.world.device)
        self.loss, self.loss_max, self.grad_norm, self.worst_row = zero, zero - math.inf, zero, zero
        self.good = zero
        self.steps, self.waited, self.since = 0, 0.0, time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (an evaluation, a save) out of the throughput."""
        self.since += seconds

    def add(self, result: StepResult, waited: float) -> None:
        """One update, and the seconds it waited for data. What was skipped is counted, and is part of no mean."""
        good = result.skipped == 0
        self.good = self.good + good
        self.loss = self.loss + torch.where(good, result.loss, 0.0)
        self.loss_max = torch.maximum(self.loss_max, torch.where(result.loss.isfinite(), result.loss, -math.inf))
        self.grad_norm = torch.where(good, result.grad_norm, self.grad_norm)
        self.health.note(result)
        self.worst_row = torch.maximum(self.worst_row, self.health.counters["skipped_in_row"])
        self.steps += 1
        self.waited += waited

    def sync(self, lr: float, epoch: float, bad_samples: int, worker_rate: float, save_due: bool = False) -> Reading:
        """Agree over all ranks and start again. Losses are means (and the largest) over ranks and good steps."""
        elapsed = time.perf_counter() - self.since
        data = torch.tensor([self.waited / elapsed, worker_rate], device=self.world.device)
        means = self.world.sum(torch.cat([(self.loss / self.good)[None], data])) / self.world.size
        counts = torch.tensor([float(bad_samples), float(save_due)], device=self.world.device)
        worst = self.world.max(torch.cat([torch.stack([self.loss_max, self.worst_row]), counts]))
        loss, wait, worker_rate, loss_max, row, bad, due, norm, skipped = torch.cat(
            [means, worst, torch.stack([self.grad_norm, self.health.counters["skipped"]])]
        ).tolist()
        metrics = {
            "loss/train": loss,
            "loss/train_max": loss_max if math.isfinite(loss_max) else math.nan,
            "optim/lr": lr,
            "optim/grad_norm": norm,
            "optim/skipped": skipped,
            "perf/images_per_s": self.steps * self.global_batch_size / elapsed,
            "perf/data_wait": wait,
            "perf/images_per_s_per_worker": worker_rate,
            "progress/bad_samples": bad,
            "progress/epoch": epoch,
        }
        self._restart()
        return Reading(metrics, int(row), int(bad), bool(due))
