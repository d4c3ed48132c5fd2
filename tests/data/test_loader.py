"""The stream of batches: the same pixels from any number of ranks and workers, from any step on."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mae_dist.data import DataConfig, ImageStream, evaluation_batches, open_sources
from mae_dist.data.feed import DeviceFeed, Normalise
from mae_dist.data.ring import HELD
from mae_dist.errors import UserError

SIZE = (16, 16)


def stream(shards, workers=0, lanes=1, window=0, **options):
    config = DataConfig(shards=str(shards), workers=workers, lanes=lanes, window=window)
    return iter(ImageStream(open_sources(config, SIZE, 3)[0], SIZE, config, seed=5, **options))


def global_batch(shards, k, batch=12, world_size=1, accumulate=1, workers=0):
    """Pixels by sample id of global batch k, put together from all ranks."""
    found = {}
    for rank in range(world_size):
        batches = stream(
            shards, workers, global_batch_size=batch, accumulate=accumulate, start=k, rank=rank, world_size=world_size
        )
        for _ in range(accumulate):
            micro = next(batches)
            assert len(micro.ids) == batch // world_size // accumulate
            found |= {
                (int(e), int(i)): image.numpy()
                for e, i, image in zip(micro.epochs, micro.ids, micro.images, strict=True)
            }
        batches.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_channels_last_also_those_that_are_copied(shards, workers):
    batches = stream(shards, workers, global_batch_size=12)
    held = [next(batches).images for _ in range(HELD + 2)]
    batches.close()
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in held)


@pytest.mark.parametrize(
    ("world_size", "accumulate", "workers"), [(2, 1, 0), (3, 1, 0), (1, 4, 0), (2, 3, 2), (4, 1, 1), (12, 1, 0)]
)
@pytest.mark.parametrize("k", [0, 3])
def test_the_same_pixels_however_the_batch_is_cut(shards, world_size, accumulate, workers, k):
    """Batch 3 of 12 of 46 samples straddles two epochs."""
    expected = global_batch(shards, k)
    found = global_batch(shards, k, world_size=world_size, accumulate=accumulate, workers=workers)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_resuming_is_starting_at_a_step(shards):
    through = stream(shards, global_batch_size=10)
    batches = [next(through) for _ in range(12)]
    for k in (1, 4, 11):
        again = next(stream(shards, workers=2, global_batch_size=10, start=k))
        assert all(torch.equal(a, b) for a, b in zip(again, batches[k], strict=True))


@pytest.mark.parametrize("order", [{}, {"lanes": 3, "window": 4}])
def test_an_epoch_resumed_at_other_world_sizes_has_every_sample_once(shards, order):
    """Uneven shards, five resumes at random steps, each with another number of ranks and workers: ids and pixels."""
    through = stream(shards, global_batch_size=12, **order)
    expected = [next(through) for _ in range(8)]  # two epochs of 46, and a bit
    starts = np.sort(np.random.default_rng(0).choice(np.arange(1, 8), 5, replace=False)).tolist()
    ids = []
    cuts = zip([0, *starts], [*starts, 8], [(1, 0), (3, 1), (2, 2), (4, 0), (6, 1), (12, 0)], strict=True)
    for first, last, (world_size, workers) in cuts:
        options = {"global_batch_size": 12, "start": first, "world_size": world_size, **order}
        ranks = [stream(shards, workers, rank=rank, **options) for rank in range(world_size)]
        for k in range(first, last):
            parts = [next(batches) for batches in ranks]
            together = [torch.stack(field, dim=1).flatten(0, 1) for field in zip(*parts, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(together, expected[k], strict=True))
            ids += together[1].tolist()
        for batches in ranks:
            batches.close()
    assert sorted(ids[:46]) == sorted(ids[46:92]) == list(range(46))


def test_an_epoch_has_every_sample_once(shards):
    batches = stream(shards, workers=2, global_batch_size=23)
    ids = torch.cat([next(batches).ids for _ in range(2)])
    assert sorted(ids.tolist()) == list(range(46))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_every_sample_once(shards, world_size):
    config = DataConfig(shards=str(shards), workers=1)
    source = open_sources(config, SIZE, 3)[0]
    seen = [
        batch for rank in range(world_size) for batch in evaluation_batches(source, SIZE, config, 8, rank, world_size)
    ]
    ids, labels = (torch.cat([getattr(batch, name) for batch in seen]) for name in ("ids", "labels"))
    assert sorted(ids.tolist()) == list(range(46))
    assert labels.bincount().tolist() == [23, 23]


def test_evaluation_is_the_same_at_any_world_size(shards):
    """More ranks than samples too: then some have none, and say so by having no batch."""
    config = DataConfig(shards=str(shards), workers=0)
    source = open_sources(config, SIZE, 3)[0]
    (whole,) = evaluation_batches(source, SIZE, config, 100)
    for world_size in (3, 50):
        parts = [list(evaluation_batches(source, SIZE, config, 5, rank, world_size)) for rank in range(world_size)]
        fields = [torch.cat([field for part in parts for field in (batch[i] for batch in part)]) for i in range(4)]
        order = fields[1].argsort()
        assert all(torch.equal(field[order], expected) for field, expected in zip(fields, whole, strict=True))
        assert sum(not part for part in parts) == max(0, world_size - 46)


def test_the_first_of_very_many_images_come_at_once():
    """No list of all positions: a picture of the first few needs those only."""
    config = DataConfig(fake=True, fake_size=10**12, workers=0)
    batch = next(evaluation_batches(open_sources(config, SIZE, 3)[0], SIZE, config, 5))
    assert batch.ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(images, tmp_path, workers):
    """Damaged after it was sharded: the length is right, the bytes are not."""
    from mae_dist.shards.write import shard

    manifest = shard(images, tmp_path / "out", shard_size=46)
    offset, length, _ = np.load(manifest.index_path(0))[17].tolist()
    with manifest.tar_path(0).open("r+b") as tar:
        tar.seek(offset)
        tar.write(os.urandom(length))
    with pytest.raises(UserError, match=r"train-00000.tar: sample 17 \(bytes \d+ to \d+\): unreadable image"):
        next(stream(tmp_path / "out", workers, global_batch_size=46))


def test_fake_data_is_always_the_same(tmp_path):
    config = DataConfig(fake=True, fake_size=7, workers=0)
    first, second = (open_sources(config, SIZE, 3)[0] for _ in range(2))
    torch.manual_seed(3)
    for i in range(7):
        np.testing.assert_array_equal(first.pixels(0, i)[0], second.pixels(0, i)[0])
    assert first.counts.tolist() == [7]


def test_normalise_is_what_torchvision_does_and_comes_back():
    config = DataConfig()
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    normalise = Normalise(config, torch.device("cpu"))
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    torch.testing.assert_close(normalise(pixels), (pixels.float() / 255 - mean) / std, rtol=1e-6, atol=1e-6)
    assert torch.equal(normalise.undo(normalise(pixels)), pixels)


def test_the_feed_counts_waiting(shards):
    feed = DeviceFeed(stream(shards, global_batch_size=10), torch.device("cpu"))
    assert len(next(feed).ids) == 10
    assert feed.waited > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rate_of_a_worker_is_measured_afresh_each_time(shards, workers):
    config = DataConfig(shards=str(shards), workers=workers)
    images = ImageStream(open_sources(config, SIZE, 3)[0], SIZE, config, 0, 10)
    assert images.worker_rate() == 0
    batches = iter(images)
    next(batches)
    assert images.worker_rate() > 0
    assert images.worker_rate() == 0
    batches.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_feed_copies_the_same_batches_to_the_gpu(shards):
    feed = DeviceFeed(stream(shards, workers=1, global_batch_size=10), torch.device("cuda"))
    plain = stream(shards, global_batch_size=10)
    for _ in range(4):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(next(feed), next(plain), strict=True))


def test_workers_outlive_a_schedulers_signals_and_end_with_the_trainer(shards):
    """SIGTERM and SIGINT reach every process of a job; only the trainer acts on them. No worker is left at its end."""
    code = f"""
import os, signal, time, torch
from mae_dist.data import DataConfig, ImageStream, open_sources
config = DataConfig(shards={str(shards)!r}, workers=2)
batches = iter(ImageStream(open_sources(config, (16, 16), 3)[0], (16, 16), config, 0, 10))
next(batches)
children = [int(c) for c in open(f"/proc/self/task/{{os.getpid()}}/children").read().split()]
for child in children:
    os.kill(child, signal.SIGTERM); os.kill(child, signal.SIGINT)
for _ in range(30):
    next(batches)
print(*children)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    children = list(map(int, done.stdout.split()))
    assert len(children) == 2
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
