"""Law 2: how a global batch is cut is derived, and what does not divide is said before the first step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.errors import UserError
from mae_dist.train import TrainConfig
from mae_dist.train.progress import duration


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_accumulation_is_derived(world_size, accumulate, micro):
    config = TrainConfig(global_batch_size=world_size * accumulate * micro, micro_batch_size=micro)
    assert config.accumulate(world_size) == accumulate


@given(st.integers(1, 500), st.integers(1, 32), st.integers(1, 64), st.integers(1, 5))
def test_what_does_not_divide_is_an_error_with_sizes_that_do(batch, world_size, micro, views):
    """Nor may a micro-batch end between two views of a sample."""
    config = TrainConfig(global_batch_size=batch, micro_batch_size=micro)
    if batch % (world_size * micro) == micro % views == 0:
        config.accumulate(world_size, views)
        return
    with pytest.raises(UserError) as caught:
        config.accumulate(world_size, views)
    assert ("data.repeated_aug" in str(caught.value)) == (views > 1)
    key, _, advice = str(caught.value).partition("the nearest that do are ")
    for number in advice.split(" and "):
        if "global_batch_size" in key:
            TrainConfig(global_batch_size=int(number)).accumulate(world_size, views)
        else:
            TrainConfig(global_batch_size=batch, micro_batch_size=int(number)).accumulate(world_size, views)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59, "59s"), (70, "1m10s"), (3700, "1h01m"), (93600, "1d02h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
