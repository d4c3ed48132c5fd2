"""The learning rate of every step is the paper's."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.engine.optim import OptimConfig
from mae_dist.errors import UserError
from mae_dist.train.options import TrainConfig
from mae_dist.train.schedule import CosineSchedule, Plan


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


def plan(images: int, batch: int, warmup: float, start: int = 0, seen: int = 0, **length: float) -> Plan:
    train = TrainConfig(global_batch_size=batch, **length)  # type: ignore[arg-type]
    return Plan(train, OptimConfig(warmup_epochs=warmup), 1.0, images, start, seen)


@pytest.mark.parametrize(
    ("images", "batch", "warmup", "length", "says"),
    [
        (100, 16384, 10, {"epochs": 90}, "are 1 update, too few to learn from"),
        (100, 1024, 5, {"epochs": 100}, "are 10 updates, too few to learn from"),
        (1000, 100, 40, {"epochs": 10}, "is 400 updates, and the whole run 100: write"),
        (1000, 100, 10, {"epochs": 10}, "is 100 updates, and the whole run 100: write"),
        (1000, 10, 40, {"steps": 1}, "one update: its learning rate is 0"),
        (1000, 10, 1e-6, {"steps": 1}, "one update: its learning rate is 0"),
    ],
)
def test_a_run_that_would_learn_nothing_is_refused(images, batch, warmup, length, says):
    with pytest.raises(UserError) as caught:
        plan(images, batch, warmup, **length).check()
    assert says in str(caught.value) and "write" in str(caught.value) and "\n" not in str(caught.value)


def test_a_rate_that_would_rise_to_its_end_is_refused():
    with pytest.raises(UserError, match=r"optim\.min_lr: 2 is above the peak learning rate, 1 "):
        Plan(TrainConfig(global_batch_size=10), OptimConfig(min_lr=2, warmup_epochs=0), 1.0, 1000).check()


def test_a_run_of_few_steps_that_says_so_is_told_what_its_warm_up_does(capsys):
    plan(1000, 10, 40, steps=20).check()
    assert "is 4e+03 updates, and the whole run 20: the learning rate rises to the end" in capsys.readouterr().err
    for well in (
        plan(1000, 10, 0, steps=1),
        plan(1000, 10, 0.1, steps=20),
        plan(1000, 10, 1, epochs=2),
        plan(450, 64, 0.1, epochs=1),
    ):
        well.check()
    assert not capsys.readouterr().err


@given(
    st.integers(1, 10_000), st.integers(1, 64), st.integers(1, 64), st.floats(0, 3), st.floats(0.1, 20),
    st.integers(0, 99),
)  # fmt: skip
def test_after_another_batch_size_the_plan_goes_on_by_images(images, before, after, warmup, epochs, start):
    """At the same epoch and share of the schedule; it ends when all images are seen, and is never "7 of 4"."""
    old = plan(images, before, warmup, epochs=epochs)
    start = min(start, old.total)
    new = plan(images, after, warmup, start, old.images(start), epochs=epochs)
    assert new.epoch(start) == old.epoch(start)
    assert new.total >= start
    assert new.images(new.total) >= epochs * images * (1 - 1e-9)
    assert new.total == start or new.images(new.total - 1) < epochs * images
    same = plan(images, before, warmup, start, old.images(start), epochs=epochs)
    assert same.total == old.total
    assert all(same.lr(k) == old.lr(k) for k in range(start, min(old.total, start + 5)))
