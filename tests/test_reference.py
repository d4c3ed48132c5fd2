"""The product against a plain second statement of it: order, crops, masks, five steps of two processes."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mae_dist.data.augment import augment, random_views
from mae_dist.data.options import DataConfig
from mae_dist.model.masking import mask_noise, split
from mae_dist.shards import Manifest
from mae_dist.shards.order import SampleOrder
from mae_dist.shards.store import open_store
from tests import reference
from tests.conftest import TINY, mae_dist
from tests.reference import AdamW, Sample

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
    run = tmp_path / "r"
    metrics: dict[int, dict[str, float]] = {}
    for record in map(json.loads, (run / "journal.jsonl").read_text().splitlines()):
        if record["kind"] == "metrics":
            metrics.setdefault(record["step"], {}).update(record["metrics"])
    store = open_store(Manifest.load(shards), None)
    counts = store.manifest.counts.tolist()
    where = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    # The learning rate of update 0 is 0, so the weights after it are the first ones.
    optimizer = AdamW(load_file(run / "checkpoints/step-00000001/model.safetensors"))
    for k in range(STEPS):
        losses = []
        for sample in reference.batch(k, BATCH, counts, SEED):
            image = Image.open(io.BytesIO(store.read(*where[sample.id])[0])).convert("RGB")
            pixels = reference.view(image, sample, SEED, 16)
            losses.append(reference.loss_of(pixels, sample, optimizer.weights, SEED, p=4, heads=2))
        loss = torch.stack(losses).mean()
        lr = reference.lr_at(k, 1e-2, 0.5 * sum(counts) / BATCH, STEPS)
        grad_norm = optimizer.step(loss, lr)
        assert metrics[k + 1]["loss/train"] == pytest.approx(loss.item(), rel=2e-5), k
        assert metrics[k + 1]["optim/grad_norm"] == pytest.approx(grad_norm, rel=2e-4), k
        assert metrics[k + 1]["optim/lr"] == pytest.approx(lr)
        assert metrics[k + 1]["progress/epoch"] == pytest.approx((k + 1) * BATCH / sum(counts))
    there = load_file(run / f"checkpoints/step-{STEPS:08d}/model.safetensors")
    for name, weight in optimizer.weights.items():
        ours, weight = there[name].double(), weight.detach()
        if name.endswith("qkv.bias"):  # a softmax ignores the keys' bias: its gradient is rounding, which Adam enlarges
            ours, weight = (torch.cat([b.chunk(3)[0], b.chunk(3)[2]]) for b in (ours, weight))
        assert torch.allclose(ours, weight, atol=1e-4), name
