"""Every number of a config has a range, said once beside its field; one check refuses all others by name.

A config dataclass says them as `RANGES = {"mask_ratio": "(0, 1)", ...}`: a round bracket leaves its end out. NaN and
infinity are in no range. The upper ends are far beyond what is ever useful: they catch a slip of the finger.
"""

import dataclasses
import math
import re
from functools import lru_cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from mae_dist.errors import UserError

SEED = "[-9223372036854775808, 9223372036854775807]"
COUNT, COUNT_OR_NONE, AMOUNT = "[1, 1000000000]", "[0, 1000000000]", "(0, 1e9]"


@lru_cache
def ends(interval: str) -> tuple[float, float, bool, bool]:
    """(low, high, low is left out, high is left out) of `[0, 1)`. Whole numbers stay exact."""
    found = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", interval)
    if not found:
        raise ValueError(f"{interval!r} is no interval such as '[0, 1)'")
    low, high = (int(text) if re.fullmatch(r"-?\d+", text) else float(text) for text in found.group(2, 3))
    return low, high, found[1] == "(", found[4] == ")"


def within(value: float, interval: str) -> bool:
    low, high, above, below = ends(interval)
    return low <= value <= high and not (above and value == low) and not (below and value == high)


def wanted(value: float, interval: str, whole: bool = False) -> str:
    """What to write instead of a number outside."""
    low, high, above, _ = ends(interval)
    number = "a whole number" if whole else "a number"
    if high < 1e6:
        return f"{number} in {interval}"
    if value > high:
        return f"{number} of at most {high:g}"
    return f"{number} above {low:g}" if above else f"{number} of at least {low:g}"


def check_numbers(config: Any, section: str) -> None:
    """Raise UserError naming the first number of a config dataclass that is outside its range, or no number.

    `section`: what its keys begin with, such as "optim.".
    """
    for key, interval in config.RANGES.items():
        kinds = kinds_of(type(config), key)
        value: Any = getattr(config, key)
        if (value is None and NoneType in kinds) or (isinstance(value, str) and str in kinds):
            continue
        many = isinstance(value, tuple | list)
        numbers: Any = value if many else (value,)
        for number in numbers:
            right = type(number) in (int, float) if float in kinds else type(number) is int
            if not right or not within(number, interval):
                instead = wanted(number if right else math.nan, interval, float not in kinds)
                found = list(value) if many else repr(value)
                raise UserError(f"{section}{key}: {found}: write {instead}{', or null' * (NoneType in kinds)}")


@lru_cache
def kinds_of(config: type, key: str) -> set[type]:
    """Every type that the annotation of a field names: {float, NoneType} of `float | None`."""

    def spread(hint: Any) -> set[type]:
        return set().union(*map(spread, get_args(hint))) if get_args(hint) else {hint}

    return spread(get_type_hints(config)[key])


def numeric_keys(config: type) -> list[str]:
    """The fields of a config dataclass that can hold a number."""
    return [f.name for f in dataclasses.fields(config) if {int, float} & kinds_of(config, f.name)]
