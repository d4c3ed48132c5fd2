"""The learning rate of every step is the paper's."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.train.schedule import CosineSchedule


def test_every_step_of_the_papers_schedule():
    """Per-iteration warm-up and cosine in units of epochs, written out as in appendix A.1."""
    steps_per_epoch, epochs, warmup, peak = 7, 100, 40, 2.4e-3
    schedule = CosineSchedule(peak, 0.0, warmup * steps_per_epoch, epochs * steps_per_epoch)
    for step in range(epochs * steps_per_epoch):
        epoch = step / steps_per_epoch
        if epoch < warmup:
            expected = peak * epoch / warmup
        else:
            expected = peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))
        assert schedule.lr(step) == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert schedule.lr(0) == 0.0


@given(st.floats(0, 500), st.integers(1, 1000), st.floats(1e-6, 1), st.floats(0, 1e-6))
def test_the_rate_stays_between_its_bounds(warmup, total, peak, low):
    schedule = CosineSchedule(peak, low, min(warmup, total), total)
    rates = [schedule.lr(step) for step in range(total + 5)]
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
    assert schedule.lr(total) == pytest.approx(low, abs=1e-15) or warmup >= total
