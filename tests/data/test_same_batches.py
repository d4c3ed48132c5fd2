"""Laws 1 and 3 with pictures of uneven shards: the same batches however an epoch is read, and each image once.

pytest -s tests/data/test_same_batches.py     # prints the hashes
"""

import dataclasses
import hashlib
from itertools import pairwise

import numpy as np
import pytest

from mae_dist.data import DataConfig, ImageStream, ShardSource
from mae_dist.shards.manifest import Manifest

SIZE, BATCH, SEED = (16, 16), 12, 5
COUNTS = (10, 3, 7, 1, 6)  # 27 samples: batches straddle epochs, every fourth ends one


@pytest.fixture(scope="module")
def uneven(shards) -> ShardSource:
    manifest = Manifest.load(shards)
    kept = [dataclasses.replace(shard, count=n) for shard, n in zip(manifest.shards, COUNTS, strict=True)]
    return ShardSource(Manifest(manifest.directory, kept), 3)


def batches(source, world_size, workers, start=0, count=9, lanes=1, window=0):
    """[(ids, epochs, pixels)] of global batches, put together from all ranks."""
    config = DataConfig(workers=workers, lanes=lanes, window=window)
    streams = [
        iter(ImageStream(source, SIZE, config, SEED, BATCH, start=start, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    whole = []
    for _ in range(count):
        parts = [next(stream) for stream in streams]
        fields = [[getattr(part, name).numpy() for part in parts] for name in ("ids", "epochs", "images")]
        whole.append([np.stack(each, axis=1).reshape(BATCH, *each[0].shape[1:]) for each in fields])  # r, r + W, ...
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
        for begin, end in pairwise(stops):
            world_size, workers = int(rng.choice([1, 2, 3, 4, 6, 12])), int(rng.integers(0, 3))
            read += batches(uneven, world_size, workers, start=begin, count=end - begin)
            said.append(f"[{begin}, {end}) world {world_size} workers {workers}")
        print("\n" + "; ".join(said), end="")
        ids, epochs = (np.concatenate([batch[n] for batch in read]) for n in (0, 1))
        assert all(sorted(ids[epochs == epoch]) == list(range(sum(COUNTS))) for epoch in range(4))
        assert [digest(batch) for batch in read] == [digest(batch) for batch in expected]
