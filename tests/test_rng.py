"""The generator: same bits everywhere, frozen for good (another generator would break the resume of every run)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_dist import rng

INT64 = st.integers(-(2**63), 2**63 - 1)
SEEDS = st.integers(-(2**63), 2**64)


def splitmix64(x: int) -> int:
    """The finaliser on unbounded Python integers, as published; returned as a signed integer."""
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return x - 2**64 if x >= 2**63 else x


@given(st.lists(INT64, min_size=1, max_size=20))
def test_mix_is_the_published_finaliser(values):
    assert rng.mix(np.array(values)).tolist() == [splitmix64(value) for value in values]


def test_stream_is_splitmix64_of_seed_zero():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    drawn = rng.mix(np.array([rng.int64((k + 1) * rng.GOLDEN) for k in range(3)]))
    assert [value % 2**64 for value in drawn.tolist()] == published


def test_golden_values():
    assert rng.fold(0, np.arange(4)).tolist() == [
        -2152535657050944081,
        -7995527694508729151,
        -7541218347953203506,
        2092789425003139053,
    ]
    assert rng.fold(1, np.arange(3), 2).tolist() == [8702711221455955905, 555403030026165240, 1061896215852225767]
    keys = np.array([2**62, -5]), np.array([7, 8])
    assert rng.fold(-3, *keys).tolist() == [-3908244420459366718, 8238483368374058589]
    assert (rng.uniform(rng.fold(0, np.arange(2))) * 2**24).tolist() == [14819496.0, 9505325.0]


@given(SEEDS, st.lists(INT64, min_size=1, max_size=6), st.lists(INT64, min_size=1, max_size=6), INT64)
def test_numpy_and_torch_give_the_same_bits(seed, rows, columns, last):
    row, column = np.array(rows)[:, None], np.array(columns)
    hashed = rng.fold(seed, row, column, last)
    same = rng.fold(seed, torch.from_numpy(row), torch.from_numpy(column), last)
    assert hashed.dtype == np.int64 and same.dtype == torch.int64
    assert hashed.shape == tuple(same.shape) == (len(rows), len(columns))
    assert np.array_equal(hashed, same.numpy())
    assert np.array_equal(rng.uniform(hashed), rng.uniform(same).double().numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits():
    keys = torch.arange(-5000, 5000) * 12345678910111
    on_device = rng.fold(7, keys.cuda(), 3)
    assert torch.equal(on_device.cpu(), rng.fold(7, keys, 3))
    assert torch.equal(rng.uniform(on_device).cpu(), rng.uniform(rng.fold(7, keys, 3)))


@given(SEEDS, INT64, st.lists(INT64, min_size=2, max_size=2))
def test_a_python_int_stands_for_a_constant_key(seed, number, values):
    keys = np.array(values)
    assert np.array_equal(rng.fold(seed, keys, number), rng.fold(seed, keys, np.full_like(keys, number)))


@given(SEEDS, st.tuples(INT64, INT64, INT64), st.integers(0, 2), INT64)
def test_changing_any_key_changes_the_value(seed, keys, place, other):
    changed = list(keys)
    changed[place] = other
    same = rng.fold(seed, *(np.array([key]) for key in keys)) == rng.fold(seed, *(np.array([key]) for key in changed))
    assert bool(same[0]) == (other == keys[place])  # every step of a fold is a bijection of each key


@given(SEEDS, INT64, INT64)
def test_changing_the_seed_or_the_order_changes_the_value(seed, a, b):
    first, second = np.array([a]), np.array([b])
    assert rng.fold(seed, first, second) != rng.fold(seed + 1, first, second)
    if a != b:
        assert rng.fold(seed, first, second) != rng.fold(seed, second, first)


def test_mix_does_not_collide():
    drawn = np.concatenate([rng.mix(np.arange(-50_000, 50_000)), rng.mix(np.arange(50_000) << 40)])
    assert len(np.unique(drawn)) == 150_000 - 1  # 0 is in both ranges


def test_small_keys_do_not_collide():
    sample, epoch, patch = np.ogrid[:60, :20, :100]
    assert len(np.unique(rng.fold(0, sample, epoch, patch))) == 60 * 20 * 100


def test_every_input_bit_moves_half_of_the_output_bits():
    keys = rng.mix(np.arange(2000))
    for bit in range(64):
        flipped = rng.mix(keys) ^ rng.mix(keys ^ np.int64(rng.int64(1 << bit)))
        share = np.unpackbits(flipped.view(np.uint8)).mean()
        assert abs(share - 0.5) < 0.01, bit


@given(st.lists(INT64, min_size=1, max_size=50))
def test_uniform_is_in_the_unit_interval_and_exact_in_float32(values):
    drawn = rng.uniform(np.array(values))
    assert ((drawn >= 0) & (drawn < 1)).all()
    assert np.array_equal(drawn.astype(np.float32).astype(np.float64), drawn)


def test_uniform_moments_and_independence_of_neighbours():
    drawn = rng.uniform(rng.fold(3, np.arange(400)[:, None], np.arange(500)))  # (400, 500)
    assert abs(drawn.mean() - 1 / 2) < 0.003  # 4.6 standard errors
    assert abs(drawn.var() - 1 / 12) < 0.001
    assert abs(np.histogram(drawn, bins=20, range=(0, 1))[0] / drawn.size - 0.05).max() < 0.003
    for a, b in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.012


@given(st.integers())
def test_int64_keeps_the_bits(value):
    signed = rng.int64(value)
    assert -(2**63) <= signed < 2**63 and (signed - value) % 2**64 == 0
