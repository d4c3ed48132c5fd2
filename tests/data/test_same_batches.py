"""Laws 1 and 3 with pictures of uneven shards: the same batches however an epoch is read, and each image once.

pytest -s tests/data/test_same_batches.py     # prints the hashes
"""

import dataclasses
import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from mae_dist.data import DataConfig, ImageStream, ShardSource
from mae_dist.shards.manifest import Manifest, table_bytes

SIZE, BATCH, SEED = (16, 16), 12, 5
COUNTS = (10, 3, 7, 1, 6)  # 27 samples: batches straddle epochs, every fourth ends one


@pytest.fixture(scope="module")
def uneven(shards, tmp_path_factory) -> ShardSource:
    """The shards with the first so many rows of each index."""
    whole, folder = Manifest.load(shards), tmp_path_factory.mktemp("uneven")
    kept = []
    for i, (shard, n) in enumerate(zip(whole.shards, COUNTS, strict=True)):
        (folder / shard.name).symlink_to(whole.tar_path(i))
        content = table_bytes(np.load(whole.index_path(i))[:n])
        (folder / whole.index_path(i).name).write_bytes(content)
        kept.append(dataclasses.replace(shard, count=n, index_sha256=hashlib.sha256(content).hexdigest()))
    return ShardSource(Manifest(folder, kept), 3)


def batches(source, world_size, workers, start=0, count=9, lanes=1, window=0, views=1, accumulate=1):
    """[(ids, epochs, pixels)] of global batches, put together from all ranks."""
    config = DataConfig(workers=workers, lanes=lanes, window=window, repeated_aug=views)
    streams = [
        iter(ImageStream(source, SIZE, config, SEED, BATCH, accumulate, start, r, world_size))
        for r in range(world_size)
    ]
    whole = []
    for _ in range(count):
        parts = [[torch.cat(f) for f in zip(*(next(s) for _ in range(accumulate)), strict=True)] for s in streams]
        fields = [[part[n].unflatten(0, (-1, views)) for part in parts] for n in (1, 2, 0)]
        whole.append([torch.stack(each, dim=1).flatten(0, 2).numpy() for each in fields])  # ranks r, r + W, ...
    for stream in streams:
        stream.close()
    return whole


def digest(batch) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(field).tobytes() for field in batch)).hexdigest()[:8]


@pytest.mark.parametrize(("lanes", "window"), [(1, 0), (4, 5)])
def test_the_same_hash_of_every_batch_at_any_world_size_with_any_workers(uneven, lanes, window):
    """Ids, epochs and pixels of 9 batches: 4 epochs of 27 samples."""
    table = {}
    for world_size in (1, 2, 4, 3):
        for workers in (0, 1, 2):
            read = batches(uneven, world_size, workers, lanes=lanes, window=window)
            table[world_size, workers] = [digest(batch) for batch in read]
            print(f"\n{lanes=} {window=} {world_size=} {workers=}: {' '.join(table[world_size, workers])}", end="")
            ids = np.concatenate([batch[0] for batch in read])
            epochs = np.concatenate([batch[1] for batch in read])
            for epoch in range(4):
                assert sorted(ids[epochs == epoch]) == list(range(sum(COUNTS)))
    assert len(set(map(tuple, table.values()))) == 1
    assert len(set(table[1, 0])) == 9


def test_resumed_at_random_steps_at_other_world_sizes(uneven):
    """5 random stops in 4 epochs; what was prefetched and never used does not count."""
    rng = np.random.default_rng()
    expected = batches(uneven, 1, 0)
    for _ in range(3):
        stops = [0, *sorted(rng.choice(np.arange(1, 9), 5, replace=False).tolist()), 9]
        read, said = [], []
        for (begin, end), world_size in zip(
            pairwise(stops), rng.permutation([1, 2, 3, 4, 6, 12]).tolist(), strict=True
        ):
            workers = int(rng.integers(0, 3))
            read += batches(uneven, world_size, workers, start=begin, count=end - begin)
            said.append(f"[{begin}, {end}) world {world_size} workers {workers}")
        print("\n" + "; ".join(said), end="")
        ids, epochs = (np.concatenate([batch[n] for batch in read]) for n in (0, 1))
        assert all(sorted(ids[epochs == epoch]) == list(range(sum(COUNTS))) for epoch in range(4))
        assert [digest(batch) for batch in read] == [digest(batch) for batch in expected]


@pytest.mark.parametrize(("lanes", "window"), [(1, 0), (4, 5)])
def test_three_views_of_each_sample_are_the_same_however_they_are_read(uneven, lanes, window):
    """4 samples a batch, at four world sizes, in micro-batches, with tasks that a worker could cut inside a sample."""
    cuts = [(1, 0, 1), (1, 2, 1), (2, 0, 1), (2, 2, 1), (4, 0, 1), (4, 2, 1), (2, 1, 2)]
    order = {"lanes": lanes, "window": window, "views": 3}
    read = [[digest(b) for b in batches(uneven, w, n, accumulate=a, **order)] for w, n, a in cuts]
    assert all(other == read[0] for other in read)
    resumed = [
        digest(batch)
        for (begin, end), world_size in zip([(0, 2), (2, 7), (7, 9)], [4, 1, 2], strict=True)
        for batch in batches(uneven, world_size, 2, start=begin, count=end - begin, **order)
    ]
    assert resumed == read[0] and len(set(read[0])) == 9


@pytest.mark.parametrize("views", [2, 3, 4])
def test_repeated_views_are_those_of_as_many_epochs_side_by_side_from_one_decode_a_sample(uneven, views, monkeypatch):
    """27 batches are 12 epochs of 27 views, each whole; every view is the one of an ordinary run in that epoch."""
    ordinary = batches(uneven, 1, 0, count=27)
    expected = {
        (epoch, sample): pixels
        for ids, epochs, images in ordinary
        for sample, epoch, pixels in zip(ids, epochs, images, strict=True)
    }
    reads = []
    read, pixels = uneven.store.read, uneven.pixels
    monkeypatch.setattr(uneven.store, "read", lambda *where: reads.append("read") or read(*where))
    monkeypatch.setattr(uneven, "pixels", lambda *sample: reads.append("decode") or pixels(*sample))
    repeated = batches(uneven, 1, 0, count=27, views=views)
    assert reads.count("read") == reads.count("decode") == 27 * BATCH // views
    ids, epochs = (np.concatenate([batch[n] for batch in repeated]) for n in (0, 1))
    assert (ids.reshape(-1, views) == ids[::views, None]).all()
    assert (epochs.reshape(-1, views) == epochs[::views, None] + np.arange(views)).all()
    for epoch in range(12 // views * views):
        assert sorted(ids[epochs == epoch]) == list(range(sum(COUNTS)))
    for sample, epoch, image in zip(ids, epochs, np.concatenate([batch[2] for batch in repeated]), strict=True):
        np.testing.assert_array_equal(image, expected[epoch, sample])
    plain = order_of(ordinary)[: len(ids) // views]
    assert [(sample, epoch // views) for sample, epoch in zip(ids[::views], epochs[::views], strict=True)] == plain


def order_of(read) -> list[tuple[int, int]]:
    """(id, epoch) of every image in turn."""
    return [pair for ids, epochs, _ in read for pair in zip(ids, epochs, strict=True)]
