"""The validation loss, on held-out images with fixed masks, and the picture of reconstructions."""

import dataclasses
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from mae_dist.config import Config
from mae_dist.data import BadSamples, Source, evaluation_batches
from mae_dist.data.feed import Normalise
from mae_dist.engine import Engine, World
from mae_dist.model.masking import num_kept, split
from mae_dist.model.patches import patchify, unpatchify
from mae_dist.track.journal import Journal
from mae_dist.track.review import Album, reconstruction_grid
from mae_dist.train.progress import say

PICTURED = 12  # images in a reconstruction grid
GREY = 127
PICTURE = "review/reconstruction"
ASK_EVERY = 4  # batches of an evaluation between looks whether to stop


class Validation:
    """`source`: held-out images, or None: then there is no loss, and the picture shows training images."""

    def __init__(
        self,
        config: Config,
        source: Source | None,
        train_source: Source,
        batch_size: int,
        world: World,
        bad: BadSamples | None = None,
    ):
        self.config, self.source, self.world, self.batch_size, self.bad = config, source, world, batch_size, bad
        self.normalise = Normalise(config.data, world.device)
        self.album: Album | None = None
        self.pictured = first_images(source or train_source, config, bad)

    phase = "evaluation"

    def run(self, step: int, engine: Engine, journal: Journal | None, stop: Callable[[], int] = lambda: 0) -> None:
        """Measure on all ranks; rank 0 draws and writes the journal.

        `stop()`, collective, is asked now and then; what is not 0 ends it, and nothing is written.
        """
        if self.source:
            loss = self.loss(engine, stop)
            if loss is None:
                return
            if journal:
                journal.write({"kind": "metrics", "step": step, "metrics": {"loss/val": loss}})
                say(f"step {step}: validation loss {loss:.4f}")
        self.draw(step, engine, journal)

    @torch.no_grad()
    def draw(self, step: int, engine: Engine, journal: Journal | None) -> None:
        """Write the picture of reconstructions, on rank 0. Collective."""
        model = engine.replica()
        if journal is None:
            return
        pixels, ids = (tensor.to(self.world.device) for tensor in self.pictured)
        images, noise = self.normalise(pixels), self.noise(ids)
        rebuilt = self.normalise.undo(model.reconstruct(images, noise))
        grid = picture(pixels, grey_out(pixels, noise, self.config), rebuilt)
        self.album = self.album or Album(journal, PICTURE)
        self.album.add(grid, step)

    def noise(self, ids: Tensor) -> Tensor:
        """The fixed masks of evaluation: keyed by the sample alone."""
        return self.config.model.noise(self.config.train.seed, torch.zeros_like(ids), ids)

    @torch.no_grad()
    def loss(self, engine: Engine, stop: Callable[[], int] = lambda: 0) -> float | None:
        """Mean loss over the held-out images, each counted once whatever the number of ranks; None: stopped."""
        assert self.source is not None
        model = engine.replica().eval()  # predicts all masked patches whatever `predict_ratio`
        size, world = self.config.model.height_width, self.world
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        batches = evaluation_batches(
            self.source, size, self.config.data, self.batch_size, world.rank, world.size, self.bad
        )
        most = -(-int(self.source.counts.sum()) // (world.size * self.batch_size))  # some ranks have one less
        for i in range(most):
            if i % ASK_EVERY == 0 and stop():
                return None
            batch = next(batches, None)
            if batch is None:
                break
            images, ids = (tensor.to(world.device) for tensor in (batch.images, batch.ids))
            with engine.autocast:
                loss = model(self.normalise(images), self.noise(ids)).loss
            total += torch.stack([loss.double() * len(ids), torch.tensor(len(ids), device=world.device)])
        model.train()
        summed, count = world.sum(total).tolist()
        return summed / count


def picture(pixels: Tensor, masked: Tensor, rebuilt: Tensor) -> Image.Image:
    """The grid of input, masked and reconstructed images, (n, C, H, W) uint8 each."""
    whole, seen, guessed = (t.permute(0, 2, 3, 1).cpu().numpy() for t in (pixels, masked, rebuilt))
    return reconstruction_grid(whole, seen, guessed)


def first_images(source: Source, config: Config, bad: BadSamples | None = None) -> tuple[Tensor, Tensor]:
    """Pixels (n, C, H, W) uint8 and ids of a source's first images, as evaluation sees them."""
    in_process = dataclasses.replace(config.data, workers=0)
    batch = next(iter(evaluation_batches(source, config.model.height_width, in_process, PICTURED, bad=bad)))
    return batch.images, batch.ids


def grey_out(pixels: Tensor, noise: Tensor, config: Config) -> Tensor:
    """The images with every masked patch grey, (B, C, H, W) uint8."""
    p = config.model.patch_size
    patches = patchify(pixels, p)
    _, ids_mask = split(noise, num_kept(patches.shape[1], config.model.mask_ratio))
    patches = patches.scatter(1, ids_mask[..., None].expand(-1, -1, patches.shape[2]), GREY)
    return unpatchify(patches, p, *pixels.shape[2:])
