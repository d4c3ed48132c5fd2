"""Every number of every config: in its range it is taken, and NaN, infinity and all else are refused by its name."""

import dataclasses
import math
from itertools import cycle
from typing import Any

import pytest

from mae_dist import config
from mae_dist.config import Config
from mae_dist.errors import UserError
from mae_dist.evaluate.knn import Question
from mae_dist.evaluate.options import FinetuneConfig, LinearConfig
from mae_dist.ranges import ends, kinds_of, numeric_keys, within

FLOATS = [math.nan, math.inf, -math.inf, 1e300, -1e300]
WHOLE = [10**30, -(10**30), True, "three"]
KINDS = (Config, FinetuneConfig, LinearConfig)


def sections(kind):
    return [(f.name, getattr(kind(), f.name)) for f in dataclasses.fields(kind)]


def every_key():
    found = {(type(s), key): name for kind in KINDS for name, s in sections(kind) for key in numeric_keys(type(s))}
    return [pytest.param(section, kind, key, id=f"{kind.__name__}.{key}") for (kind, key), section in found.items()]


def refuse(section, made):
    """The message of the check that this section goes through."""
    kind = next(kind for kind in KINDS if any(type(s) is type(made) for _, s in sections(kind)))
    whole: Any = dataclasses.replace(kind(), **{section: made})
    if section != "data":
        whole = dataclasses.replace(whole, data=dataclasses.replace(whole.data, shards="x", val_shards="y"))
    with pytest.raises(UserError) as caught:
        whole.check(*() if kind is Config else (3,))
    return str(caught.value)


@pytest.mark.parametrize(("section", "kind", "key"), every_key())
def test_no_number_is_without_a_range_and_what_is_outside_is_refused_by_name(section, kind, key):
    assert key in kind.RANGES, f"{kind.__name__}.{key} needs a range"
    kinds, (low, high, _, _) = kinds_of(kind, key), ends(kind.RANGES[key])
    whole = float not in kinds
    outside = [low - 1, high + 1, *WHOLE] if whole else [low - 1, high * 2 + 1, *FLOATS, *WHOLE]
    for value in outside:
        if isinstance(value, str) and str in kinds:
            continue
        many = isinstance(getattr(kind(), key), tuple)
        message = refuse(section, dataclasses.replace(kind(), **{key: (value, value) if many else value}))
        assert message.startswith(f"{section}.{key}: ") and "\n" not in message, message
        assert "write a" in message and str(value) in message


def test_the_command_line_ends_in_one_line_or_a_sound_config():
    """Whatever the parser makes of a value, and whatever the key."""
    values = cycle(["-1", "0", ".nan", ".inf", "1e18", "10000000000000000000", "[1,2]", "three"])
    for key in [f"{name}.{k}" for name, s in sections(Config) for k in numeric_keys(type(s))]:
        try:
            config.load([f"--{key}={next(values)}", "--data.fake=true"]).check()
        except UserError as error:
            assert "\n" not in str(error), key


def test_a_number_in_its_range_is_taken():
    assert within(0.5, "(0, 1)") and not within(0, "(0, 1)") and not within(1, "[0, 1)") and within(0, "[0, 1)")
    assert not within(2**63, "[0, 9223372036854775807]") and within(2**63 - 1, "[0, 9223372036854775807]")


@pytest.mark.parametrize(
    "wrong", [{"ks": (0,)}, {"ks": (-1,)}, {"fraction": math.nan}, {"fraction": 0.0}, {"per_class": 0}, {"ks": ()}]
)
def test_what_knn_is_asked_has_ranges_too(wrong):
    with pytest.raises(UserError, match=f"^knn: {next(iter(wrong))}: "):
        Question(**wrong).check()
