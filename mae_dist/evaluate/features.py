"""One vector an image, from a frozen encoder or from the pixels themselves, in blocks on disk.

A block is made once, by one rank, and is there or it is not: so features are the same to the bit on any number of
processes, each image is in them once, what was interrupted goes on, and readers need no more memory than they want.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mae_dist.config import Config
from mae_dist.data import BadSamples, Source, centred_batches
from mae_dist.data.feed import Normalise
from mae_dist.engine import World
from mae_dist.engine.state import load_tensors, save_tensors
from mae_dist.engine.update import autocast
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import Pretrained, untrained
from mae_dist.evaluate.tracked import EVALUATIONS
from mae_dist.local import make_directory, new_file
from mae_dist.shards.progress import Progress

BLOCK, BATCH = 1024, 256  # samples in a file, and encoded at once
Kind = Literal["pretrained", "untrained", "pixels"]
Pool = Literal["mean", "cls"]
Extract = Callable[[Tensor], Tensor]


def extractor(kind: Kind, pool: Pool, encoder: Pretrained, device: torch.device) -> Extract:
    """From normalised images (B, C, H, W) to features (B, D).

    "mean" of the patch tokens, or the class token "cls", after the last norm; "pixels" are the images themselves.
    """
    if kind == "pixels":
        return lambda images: images.flatten(1)
    model = encoder.model() if kind == "pretrained" else untrained(encoder.config)
    model = model.to(device)
    return lambda images: pooled(model.encode(images), pool)


def pooled(tokens: Tensor, pool: Pool) -> Tensor:
    """(B, 1+N, D) to (B, D)."""
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)


class Features:
    """The features of a whole source: float32 (N, D) and labels (N,) int64, in file order, in blocks of 1024."""

    def __init__(self, directory: Path, count: int):
        self.directory, self.count = directory, count

    @property
    def num_blocks(self) -> int:
        return -(-self.count // BLOCK)

    def path(self, block: int) -> Path:
        return self.directory / f"block-{block:06d}.safetensors"

    def read(self, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Features (n, D) and labels (n,) of one block."""
        held = load_tensors(self.path(block), str(device))
        return held["features"], held["labels"]

    def blocks(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.read(block, device) for block in range(self.num_blocks))

    def all(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Everything at once: (N, D), (N,)."""
        features, labels = zip(*self.blocks(device), strict=True)
        return torch.cat(features), torch.cat(labels)

    def mean(self, device: torch.device) -> Tensor:
        """(D,) float32, summed in float64 block after block."""
        return (torch.stack([f.double().sum(0) for f, _ in self.blocks(device)]).sum(0) / self.count).float()


@torch.no_grad()
def extract(kind: Kind, pool: Pool, encoder: Pretrained, source: Source, config: Config, world: World) -> Features:
    """The features of a source under the run's directory, made where they are not there yet. Collective.

    Beside them are listed the bad samples among them. Raises UserError when they are too many, and keeps no features:
    shards that were copied again are read again.
    """
    name = fingerprint(kind, pool, encoder, source, config)
    features = Features(encoder.run_dir / EVALUATIONS / "features" / name, int(source.counts.sum()))
    make_directory(features.directory)
    bad = BadSamples(features.directory, config.data.max_bad_fraction)
    there = world.broadcast([features.path(block).exists() for block in range(features.num_blocks)])
    if world.is_main and not any(there):
        bad.begin_again()
    world.barrier()
    missing = [block for block, done in enumerate(there) if not done]
    mine = missing[world.rank :: world.size]
    if mine:
        function = extractor(kind, pool, encoder, world.device)
        _make(function, source, features, mine, config, world, bad)
    world.barrier()
    try:
        check_bad(bad, features.count, world)
    except UserError:
        for block in range(features.num_blocks)[world.rank :: world.size]:
            features.path(block).unlink(missing_ok=True)
        raise
    return features


def check_bad(bad: BadSamples, read: int, world: World) -> None:
    """Raise UserError, on all ranks, when too many of `read` samples were bad. Collective."""
    bad.check(int(world.max(torch.tensor(bad.count(), device=world.device))), read)


def _make(
    function: Extract,
    source: Source,
    features: Features,
    mine: list[int],
    config: Config,
    world: World,
    bad: BadSamples,
) -> None:
    normalise = Normalise(config.data, world.device)
    spans = [range(block * BLOCK, min((block + 1) * BLOCK, features.count)) for block in mine]
    positions = [np.array(span[i : i + BATCH]) for span in spans for i in range(0, len(span), BATCH)]
    batches = centred_batches(source, config.model.height_width, config.data, positions, BATCH, bad)
    total = sum(map(len, spans))
    with Progress("features", total) if world.is_main else nullcontext() as bar:
        for block, span in zip(mine, spans, strict=True):
            rows, labels = [], []
            for _ in range(0, len(span), BATCH):
                batch = next(batches)
                with autocast(world.device, config.train.precision):
                    made = function(normalise(batch.images.to(world.device)))
                rows.append(made.float().cpu())
                labels.append(batch.labels)
                if bar:
                    bar.update(len(batch.labels))
            with new_file(features.path(block)) as aside:
                save_tensors({"features": torch.cat(rows), "labels": torch.cat(labels)}, aside)


def fingerprint(kind: Kind, pool: Pool, encoder: Pretrained, source: Source, config: Config) -> str:
    """Changes with all that features depend on."""
    d = config.data
    pixels = [config.model.height_width, d.eval_crop, d.mean, d.std, d.decoder, d.dct_scale, d.max_pixels]
    network: list[object] = [] if kind == "pixels" else [pool, config.train.precision]
    if kind != "pixels":
        network.append(encoder.digest if kind == "pretrained" else [str(encoder.config.model), config.train.seed])
    text = json.dumps([kind, source.digest, pixels, network])
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
