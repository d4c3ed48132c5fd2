import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.model.masking import mask_noise, num_kept, shaped_noise, split


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


KINDS = ("random", "block", "grid")
grids = st.tuples(st.integers(2, 16), st.integers(2, 16))


def masks(kind, grid, keep, count, seed=0):
    """(count, rows, columns), 1 where hidden."""
    samples = torch.arange(count)
    noise = shaped_noise(seed, torch.zeros_like(samples), samples, grid, keep, kind)
    return torch.zeros_like(noise).scatter(1, split(noise, keep)[1], 1.0).unflatten(1, grid)


@given(
    kind=st.sampled_from(KINDS),
    grid=grids,
    share=st.floats(0, 1),
    seed=st.integers(0, 2**63),
    keys=st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 2**20)), min_size=1, max_size=5),
)
def test_every_kind_is_a_pure_function_with_exact_counts(kind, grid, share, seed, keys):
    patches = grid[0] * grid[1]
    keep = 1 + int(share * (patches - 2))
    samples, epochs = torch.tensor(keys).T
    noise = shaped_noise(seed, epochs, samples, grid, keep, kind)
    assert noise.shape == (len(keys), patches) and noise.dtype == torch.float32
    assert (noise >= 0).all() and (noise < 1).all()
    if kind != "random":  # the two halves are what is kept and what is hidden
        assert ((noise < 0.5).sum(1) == keep).all()
    for i in range(len(keys)):  # one sample alone is the same as in a batch
        alone = shaped_noise(seed, epochs[i : i + 1], samples[i : i + 1], grid, keep, kind)
        assert torch.equal(alone[0], noise[i])


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_grid_keeps_the_same_corner_of_every_four(rows, columns, seed):
    hidden = masks("grid", (2 * rows, 2 * columns), rows * columns, 6, seed)
    for mask in hidden:
        corners = mask.unflatten(0, (rows, 2)).unflatten(2, (columns, 2))  # (rows, 2, columns, 2)
        (kept,) = (1 - corners).permute(1, 3, 0, 2).flatten(2).flatten(0, 1).all(dim=1).nonzero().T.tolist()
        assert len(kept) == 1 and mask.sum() == 3 * rows * columns


def test_grid_takes_each_corner_as_often_and_block_each_patch():
    first = 1 - masks("grid", (4, 4), 4, 4000)[:, :2, :2].flatten(1)
    assert (first.mean(0) - 1 / 4).abs().max() < 5 * (3 / 16 / 4000) ** 0.5
    hidden = masks("block", (14, 14), 49, 3000).mean(0)
    assert (hidden.flip(1) - hidden).abs().max() < 5 * (2 * 0.25 / 3000) ** 0.5
    assert 0.1 < hidden.min() and hidden.max() < 0.995  # corners least, as with any blocks; but no patch always


def neighbours(mask: torch.Tensor) -> float:
    """Share of horizontal neighbours of hidden patches that are hidden too."""
    return float((mask[:, :, 1:] * mask[:, :, :-1]).sum() / mask[:, :, 1:].sum())


def test_blocks_hang_together():
    """Of the neighbours of a hidden patch, about 3/4 are hidden at random, and nearly all in blocks."""
    found = {kind: neighbours(masks(kind, (14, 14), 49, 500)) for kind in KINDS}
    assert abs(found["random"] - 0.75) < 0.02
    assert found["block"] > 0.9
    assert abs(found["grid"] - 0.66) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_order_among_the_hidden_is_random(kind):
    """So that the first of them are a random part: `predict_ratio` takes those."""
    samples = torch.arange(2000)
    noise = shaped_noise(3, torch.zeros_like(samples), samples, (6, 6), 9, kind)
    _, hidden = split(noise, 9)
    whole = torch.zeros(2000, 36).scatter(1, hidden, 1.0).mean(0)
    part = torch.zeros(2000, 36).scatter(1, hidden[:, :9], 1.0).mean(0)
    assert (part - whole / 3).abs().max() < 5 * (0.25 / 2000) ** 0.5


GOLDEN = ["...#####", ".#.####.", ".#.#####", ".#.#####", "...#####", "...#####"]


def test_block_golden_mask():
    assert ["".join("#" if hidden else "." for hidden in row) for row in masks("block", (6, 8), 16, 1)[0]] == GOLDEN
