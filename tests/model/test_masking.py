import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.model.masking import mask_noise, num_kept, split


@given(
    b=st.integers(1, 4), n=st.integers(2, 40), share=st.floats(0, 1), levels=st.integers(1, 50), seed=st.integers(0, 99)
)
def test_split_is_a_stable_sorted_permutation(b, n, share, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(levels, (b, n), generator=generator).float() / levels  # few levels: many ties
    keep = int(share * n)
    ids_keep, ids_mask = split(noise, keep)
    assert ids_keep.dtype == torch.int64
    assert ids_keep.shape == (b, keep) and ids_mask.shape == (b, n - keep)
    for row, ids in zip(noise.tolist(), torch.cat([ids_keep, ids_mask], 1).tolist(), strict=True):
        assert ids == sorted(range(n), key=lambda place: row[place])  # Python's sort is stable


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [(196, 0.75, 49), (256, 0.75, 64), (225, 0.8, 44), (100, 0.8, 19), (100, 0.9, 9), (400, 0.9, 39), (196, 0.9, 19)],
)
def test_num_kept_is_the_papers_expression(patches, ratio, kept):
    assert num_kept(patches, ratio) == kept


@given(
    seed=st.integers(0, 2**63),
    keys=st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**20)), min_size=1, max_size=8),
    n=st.integers(1, 30),
    data=st.data(),
)
def test_noise_depends_on_seed_epoch_and_sample_only(seed, keys, n, data):
    samples, epochs = torch.tensor(keys).T
    noise = mask_noise(seed, epochs, samples, n)
    assert noise.shape == (len(keys), n) and noise.dtype == torch.float32
    assert (noise >= 0).all() and (noise < 1).all()
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1, max_size=8)))
    assert torch.equal(mask_noise(seed, epochs[rows], samples[rows], n), noise[rows])
    assert torch.equal(mask_noise(seed, epochs, samples, n + 3)[:, :n], noise)


def test_noise_golden_values():
    noise = mask_noise(0, torch.tensor([0, 1]), torch.tensor([0, 123456789]), 4)
    assert (noise * 2**24).long().tolist() == [
        [11172852, 4639487, 5918972, 9748731],
        [9672747, 13768483, 12970249, 6160434],
    ]


def test_masks_differ_between_seeds_epochs_and_samples():
    samples = torch.arange(300)
    draws = [mask_noise(seed, torch.full_like(samples, epoch), samples, 16) for seed in (0, 1) for epoch in (0, 1)]
    masks = torch.cat([split(noise, 4)[0].sort(1).values for noise in draws])
    # 1200 draws of 4 out of 16 (1820 ways) leave 879 +- 14 different ones
    assert 815 < len(masks.unique(dim=0)) < 945
    assert len(torch.cat(draws).unique(dim=0)) == 1200


def test_every_patch_and_pair_is_kept_equally_often():
    samples = torch.arange(20_000)
    noise = mask_noise(5, torch.zeros_like(samples), samples, 16)
    kept = torch.zeros(20_000, 16).scatter(1, split(noise, 4)[0], 1.0)
    assert (kept.mean(0) - 1 / 4).abs().max() < 0.0125  # 4 standard errors
    pairs = kept.T @ kept / len(kept)
    apart = ~torch.eye(16, dtype=torch.bool)
    assert (pairs[apart] - 4 * 3 / (16 * 15)).abs().max() < 0.0075  # 4.8 standard errors
