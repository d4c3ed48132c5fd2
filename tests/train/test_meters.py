"""What is logged of the steps between two log lines."""

import math

import pytest
import torch

from mae_dist.engine import World
from mae_dist.engine.base import StepResult
from mae_dist.train.health import Health
from mae_dist.train.meters import Meters

WORLD = World(0, 1, torch.device("cpu"))


def logged(*steps: tuple[float, float, float]) -> dict[str, float]:
    """Of steps of (loss, grad_norm, skipped)."""
    meters = Meters(WORLD, 8, Health(WORLD, None))
    for step in steps:
        meters.add(StepResult(*(torch.tensor(value) for value in step)), 0.0)
    return meters.sync(0.1, 1.0, 0, 0.0).metrics


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_a_skipped_step_is_counted_and_leaves_the_curve_readable(bad):
    found = logged((2.0, 0.5, 0.0), (bad, bad, 1.0), (1.0, 0.25, 0.0))
    assert found["loss/train"] == 1.5
    assert found["loss/train_max"] == (bad if math.isfinite(bad) else 2.0)  # a spike that was vetoed shows here
    assert found["optim/grad_norm"] == 0.25 and found["optim/skipped"] == 1


def test_nothing_but_skipped_steps_have_no_loss():
    found = logged((math.nan, math.nan, 1.0))
    assert math.isnan(found["loss/train"]) and math.isnan(found["loss/train_max"])
