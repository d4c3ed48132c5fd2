"""Laws 1 to 3: every sample once an epoch, whatever the shards, lanes, windows, ranks and batches."""

import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mae_dist.shards import SampleOrder
from mae_dist.shards.order import FileOrder, permute

counts = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
orders = st.builds(SampleOrder, counts, seed=st.integers(0, 2**62), lanes=st.integers(1, 20), window=st.integers(0, 50))


@given(st.integers(1, 5000), st.integers(-(2**63), 2**63 - 1))
def test_permute_is_a_permutation(size, key):
    out = permute(np.arange(size), np.full(size, size), np.full(size, key))
    assert sorted(out) == list(range(size))


@given(st.integers(1, 2**40), st.integers(-(2**63), 2**63 - 1))
@example(2**33, 1)
@example(2**33 + 1, 2)
def test_permute_stays_inside_and_apart_at_any_size(size, key):
    """The ends of the range too, where a domain one bit short would show."""
    values = np.unique(np.concatenate([np.linspace(0, size - 1, 500).astype(np.int64), [size - 1]]))
    out = permute(values, np.full(len(values), size), np.full(len(values), key))
    assert len(np.unique(out)) == len(values)
    assert out.min() >= 0 and out.max() < size


def test_permutations_differ_by_key_and_reach_everywhere():
    size, keys = 10, 4000
    rows = permute(np.tile(np.arange(size), keys), np.full(size * keys, size), np.repeat(np.arange(keys), size))
    where = rows.reshape(keys, size)
    assert len({tuple(row) for row in where}) > 0.99 * keys
    for value in range(size):  # each place is reached from each place about equally often: 400 +- 5 sigma
        times = np.bincount(where[:, value], minlength=size)
        assert abs(times - keys / size).max() < 5 * np.sqrt(keys / size)


@given(orders, st.integers(0, 5))
def test_each_epoch_holds_every_sample_once(order, epoch):
    n = order.num_samples
    samples = order.lookup(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(samples.id) == list(range(n))
    assert set(samples.epoch) == {epoch}
    assert (samples.row >= 0).all()
    assert (samples.row < order.counts[samples.shard]).all()


@given(orders, st.integers(1, 60), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 4))
def test_ranks_share_the_same_global_batches_and_lose_nothing(order, share, world_size, epochs):
    """Rank r of W reads positions r, r + W, ...; batches straddle epochs; any W gives the same batch."""
    batch = share * world_size
    batches = -(-epochs * order.num_samples // batch)
    seen = []
    for k in range(batches):
        whole = order.batch(k, batch)
        parts = [order.lookup(np.arange(k * batch + rank, (k + 1) * batch, world_size)) for rank in range(world_size)]
        for rank, part in enumerate(parts):
            assert len(part.id) == share
            np.testing.assert_array_equal(np.stack([part.shard, part.row], 1), whole[rank::world_size])
        seen.append(np.stack([part.id for part in parts], axis=1).reshape(-1))  # interleaved: the global batch
    ids = np.concatenate(seen)[: epochs * order.num_samples]
    assert (np.bincount(ids, minlength=order.num_samples) == epochs).all()


DIVISORS = [1, 2, 3, 4, 6, 12]
legs = st.lists(st.tuples(st.sampled_from(DIVISORS), st.integers(0, 15), st.integers(0, 3)), max_size=6)


@given(orders, st.integers(1, 4), legs, st.integers(1, 3))
def test_kills_and_other_world_sizes_lose_and_repeat_nothing(order, twelfths, legs, epochs):
    """Legs of (world size, updates, updates lost by the kill); each goes on from what the last one committed."""
    batch = 12 * twelfths
    total, done, seen = -(-epochs * order.num_samples // batch), 0, {}
    for world_size, updates, lost in [*legs, (1, total, 0)]:
        alive = SampleOrder(order.counts, order.seed, order.lanes, order.window)  # nothing survives but the step
        end = min(total, done + updates)
        for k in range(done, end):
            ranks = [np.arange(k * batch + rank, (k + 1) * batch, world_size) for rank in range(world_size)]
            ids = np.stack([alive.lookup(mine).id for mine in ranks], axis=1).reshape(-1)
            assert k not in seen or (seen[k] == ids).all()  # an update made again is the same update
            seen[k] = ids
        done = max(done, end - lost)
    ids = np.concatenate([seen[k] for k in range(total)])[: epochs * order.num_samples]
    assert (np.bincount(ids, minlength=order.num_samples) == epochs).all()


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=40).filter(any),
    st.integers(1, 300),
    st.integers(0, 5000),
    st.integers(0, 2**31),
)
def test_long_uneven_shards_are_whole_in_each_epoch(sizes, lanes, window, seed):
    order = SampleOrder(sizes, seed, lanes, window)
    n = order.num_samples
    for epoch in (0, 1, 799):
        samples = order.lookup(np.arange(epoch * n, (epoch + 1) * n))
        assert (np.bincount(samples.id, minlength=n) == 1).all()
        assert (order.starts[samples.shard] + samples.row == samples.id).all()


@given(orders)
def test_an_order_sent_to_another_process_is_the_same(order):
    again = pickle.loads(pickle.dumps(order))
    np.testing.assert_array_equal(again.batch(3, 16), order.batch(3, 16))


@given(orders, st.lists(st.integers(0, 10_000), min_size=1, max_size=50))
def test_a_position_means_the_same_whoever_asks(order, positions):
    together = order.lookup(positions)
    fresh = SampleOrder(order.counts, order.seed, order.lanes, order.window)
    for i, position in enumerate(positions):
        assert [field[0] for field in fresh.lookup([position])] == [field[i] for field in together]


@given(counts, st.integers(0, 1000))
def test_epochs_and_seeds_differ(sizes, seed):
    n = sum(sizes)
    if n < 20:
        return
    a, b = SampleOrder(sizes, seed), SampleOrder(sizes, seed + 1)
    first, second, other = a.lookup(np.arange(n)), a.lookup(np.arange(n, 2 * n)), b.lookup(np.arange(n))
    assert (first.id != second.id).any()
    assert (first.id != other.id).any()


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_a_rank_stays_on_its_own_lanes(world_size, lanes_each, batches_of_lanes):
    """world | lanes | batch: in an epoch that starts on a batch border, a rank reads only its share of the shards."""
    lanes = world_size * lanes_each
    shards_each, size = 4, 8
    batch = lanes * batches_of_lanes
    order = SampleOrder([size] * (lanes * shards_each), seed=1, lanes=lanes, window=5)
    k = np.arange(order.num_samples // batch)
    for rank in range(world_size):
        positions = (k[:, None] * batch + np.arange(rank, batch, world_size)).reshape(-1)
        shards = {int(shard) for shard in order.lookup(positions).shard}
        assert len(shards) <= lanes_each * (shards_each + 1)


def test_the_order_is_frozen():
    """A change here breaks the resume of every run that anyone has started."""
    order = SampleOrder([5, 0, 3, 7], seed=42)
    assert order.lookup(np.arange(16)).id.tolist() == FROZEN_FULL
    laned = SampleOrder([5, 0, 3, 7], seed=42, lanes=3, window=2)
    assert laned.lookup(np.arange(16)).id.tolist() == FROZEN_LANES


FROZEN_FULL = [3, 8, 11, 6, 14, 9, 12, 10, 5, 1, 4, 0, 2, 13, 7, 10]
FROZEN_LANES = [8, 13, 3, 10, 14, 4, 9, 1, 6, 11, 0, 5, 12, 2, 7, 0]


def test_billions_of_samples_cost_little():
    """10^9 samples in 10^5 shards: any batch at once, no table of samples."""
    order = SampleOrder(np.full(100_000, 10_000), lanes=256, window=4096)
    batch = order.batch(200_000, 4096)
    assert batch.shape == (4096, 2)
    assert len({tuple(row) for row in batch.tolist()}) == 4096


@pytest.mark.parametrize("arguments", [([],), ([0, 0],), ([3, -1],), ([3], 0, 0), ([3], 0, 1, -1)])
def test_what_is_no_order(arguments):
    with pytest.raises(ValueError):
        SampleOrder(*arguments)


@given(counts)
def test_file_order(sizes):
    order = FileOrder(sizes)
    samples = order.lookup(np.arange(order.num_samples))
    flat = [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]
    assert list(zip(samples.shard.tolist(), samples.row.tolist(), strict=True)) == flat
    assert samples.id.tolist() == list(range(len(flat)))
