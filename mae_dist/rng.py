"""One counter-based generator for everything random: order, crops, flips, masks.

Written with operators only, so each function takes int64 NumPy arrays and int64 torch tensors alike and gives the same
bits for both, on any device. There is no state: a number depends only on its key, for example (seed, epoch, sample).
The mixer is the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)
in wrapping int64 arithmetic.
"""

from typing import Any

GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, odd, as int64


def int64(value: int) -> int:
    """`value` modulo 2**64, as the signed integer of the same bits."""
    return (value + 2**63) % 2**64 - 2**63


def mix(x: Any) -> Any:
    """A bijection of int64 that flips every output bit with probability 1/2 when any input bit flips.

    `x`: int64 array or tensor with at least one dimension (NumPy scalars would warn about the wanted overflow).
    """
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def fold(seed: int, *keys: Any) -> Any:
    """Hash (seed, key, key, ...) to int64. Keys are int64 arrays or tensors that broadcast; order matters.

    The result has the shape of the keys broadcast together. A Python int may stand for any key but the first.
    """
    hashed = mix(keys[0] + int64((seed + 1) * GOLDEN))
    for key in keys[1:]:
        hashed = mix(hashed ^ (int64(key * GOLDEN) if isinstance(key, int) else key * GOLDEN))
    return hashed


def uniform(hashed: Any) -> Any:
    """The top 24 bits of a hash as a float in [0, 1), exact in float32: (k + 0) / 2**24."""
    return ((hashed >> 40) & 0xFFFFFF) * 2.0**-24
