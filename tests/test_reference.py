"""The product against a plain second statement of it: order, crops, masks, five steps of two processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_dist.data.augment import augment, random_views
from mae_dist.data.options import DataConfig
from mae_dist.model.masking import mask_noise, split
from mae_dist.shards.order import SampleOrder
from tests import reference
from tests.cluster import laws
from tests.conftest import TINY, mae_dist
from tests.reference import Sample

STEPS, BATCH, SEED = 6, 24, 5  # of 46 images: batch 1 straddles two epochs


@pytest.mark.parametrize(("lanes", "window"), [(1, 0), (4, 5), (3, 1)])
@pytest.mark.parametrize("counts", [[10, 10, 10, 10, 6], [1, 0, 7, 3], [33]])
def test_the_order(counts, lanes, window):
    found = SampleOrder(counts, seed=SEED, lanes=lanes, window=window).lookup(np.arange(3 * sum(counts)))
    expected = [reference.sample_at(p, counts, SEED, lanes, window) for p in range(3 * sum(counts))]
    assert [Sample(*pair) for pair in zip(found.epoch.tolist(), found.id.tolist(), strict=True)] == expected
    assert all(len({s.id for s in expected if s.epoch == epoch}) == sum(counts) for epoch in range(3))


def test_crops_and_flips():
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    samples = [Sample(epoch, id) for epoch in (0, 1, 7) for id in (0, 1, 2**40)]
    views = random_views([s.epoch for s in samples], [s.id for s in samples], DataConfig(fake=True), SEED)
    config, seen = DataConfig(fake=True, decoder="pil"), set()
    for sample, one in zip(samples, views, strict=True):
        ours = augment(noise, sample.epoch, sample.id, (16, 16), config, SEED).permute(1, 2, 0).numpy()
        assert np.array_equal(ours, reference.view(Image.fromarray(noise), sample, SEED, 16))
        seen.add(ours.tobytes())
        assert one.flip == (reference.uniform(reference.fold(SEED ^ reference.CROP, sample.id, sample.epoch, 0)) < 0.5)
    assert len(seen) == len(samples)


def test_masks():
    samples = [Sample(epoch, id) for epoch in (0, 3) for id in (0, 1, 46, 2**40)]
    epochs, ids = (torch.tensor(column) for column in zip(*samples, strict=True))
    kept, hidden = split(mask_noise(SEED, epochs, ids, 196), 49)
    for n, sample in enumerate(samples):
        assert (kept[n].tolist(), hidden[n].tolist()) == reference.visible_and_hidden(sample, SEED, 196, 0.75)


@pytest.mark.dist
def test_five_steps(shards: Path, tmp_path: Path):
    """Two processes, two micro-batches each: losses, gradient norms and weights, from the first weights on."""
    given = [
        f"--data.shards={shards}", "--data.decoder=pil", f"--train.seed={SEED}", f"--train.runs_dir={tmp_path}",
        "--train.name=r", f"--train.global_batch_size={BATCH}", f"--train.micro_batch_size={BATCH // 4}",
        f"--train.steps={STEPS}", "--train.save_every=1", "--train.keep_checkpoints=100", "--optim.lr=1e-2",
    ]  # fmt: skip
    mae_dist("pretrain", *TINY, *given, processes=2)
    data = laws.Data(shards, 0, SEED, BATCH)
    epoch_steps = sum(data.counts) / BATCH
    assert not laws.law_9(tmp_path / "r", data, 1e-2, 0.5 * epoch_steps, STEPS, STEPS - 1)
    epochs = laws.metrics(tmp_path / "r", "progress/epoch")
    assert epochs == pytest.approx({step: step / epoch_steps for step in range(1, STEPS + 1)})
