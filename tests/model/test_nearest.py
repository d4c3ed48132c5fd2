"""k nearest neighbours: exact, however the keys are cut into blocks, and ties fall the same way every time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from mae_dist.model.nearest import TEMPERATURE, knn_right, stable_topk


def data(n, m, dim=6, classes=4, seed=0, levels=None):
    """Keys, labels, queries, truth; `levels`: coordinates are few whole numbers, so that many similarities tie."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(n + m, dim, generator=generator)
    if levels:
        draw = draw.mul(levels).round().clamp(-levels, levels) / levels
    labels = torch.randint(classes, (n + m,), generator=generator)
    return draw[:n], labels[:n], draw[n:], labels[n:]


def brute_force(keys, labels, queries, truth, k, classes=4):
    """By the definition, one query at a time, with a full stable sort in float64."""
    centre = keys.mean(0)
    keys, queries = F.normalize(keys - centre, dim=1).double(), F.normalize(queries - centre, dim=1).double()
    right = 0
    for query, label in zip(queries, truth, strict=True):
        similarity, order = (keys @ query).sort(descending=True, stable=True)
        votes = torch.zeros(classes, dtype=torch.float64)
        votes.index_add_(0, labels[order[:k]], (similarity[:k] / TEMPERATURE).exp())
        right += int(votes.argmax() == label)
    return right


def blocks(keys, labels, size):
    return list(zip(keys.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_accuracy_is_that_of_brute_force(size):
    keys, labels, queries, truth = data(300, 90)
    ks = [1, 3, 20, 299, 300]
    found = knn_right(blocks(keys, labels, size), keys.mean(0), queries, truth, ks, 4)
    assert found.tolist() == [brute_force(keys, labels, queries, truth, k) for k in ks]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_topk_is_a_stable_sort_cut_off(columns, k, levels, seed):
    values = torch.randint(levels, (5, columns), generator=torch.Generator().manual_seed(seed)).float()
    expected = values.sort(dim=1, descending=True, stable=True)
    found, places = stable_topk(values, k)
    assert torch.equal(found, expected.values[:, :k])
    assert torch.equal(places, expected.indices[:, :k])


@given(st.integers(1, 50), st.integers(0, 10**6))
@example(1, 644759)  # in float32, a block of one key had other last bits
def test_of_equal_neighbours_the_first_votes(size, seed):
    """Equal keys with other labels: cutting them into blocks, or the queries over ranks, changes nothing."""
    keys, labels, queries, truth = data(60, 31, dim=2, seed=seed, levels=1)
    centre = torch.zeros(2)
    whole = knn_right([(keys, labels)], centre, queries, truth, [1, 5, 20], 4)
    cut = knn_right(blocks(keys, labels, size), centre, queries, truth, [1, 5, 20], 4)
    shared = sum(
        knn_right(blocks(keys, labels, size), centre, queries[rank::3], truth[rank::3], [1, 5, 20], 4)
        for rank in range(3)
    )
    assert whole.tolist() == cut.tolist() == shared.tolist()


def test_a_query_without_neighbours_to_spare_uses_all():
    keys, labels, queries, truth = data(5, 9)
    assert knn_right([(keys, labels)], keys.mean(0), queries, truth, [50], 4).tolist() == [
        brute_force(keys, labels, queries, truth, 5)
    ]
