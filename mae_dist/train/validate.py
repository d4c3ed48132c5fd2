"""The validation loss, on held-out images with fixed masks, and the picture of reconstructions."""

import dataclasses
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from mae_dist.config import Config
from mae_dist.data import BadSamples, Source, evaluation_batches
from mae_dist.data.feed import Normalise
from mae_dist.engine import Engine
from mae_dist.model.masking import num_kept, split
from mae_dist.model.patches import patchify, unpatchify
from mae_dist.track.journal import Journal
from mae_dist.track.review import Album, reconstruction_grid
from mae_dist.train.objective import Setup, StopFn, whole_source
from mae_dist.train.progress import say

PICTURED = 12  # images in a reconstruction grid
GREY = 127
PICTURE = "review/reconstruction"


class Validation:
    """See `Evaluation`. Without held-out images there is no loss, and the picture shows training images."""

    phase, key = "evaluation", PICTURE

    def __init__(self, config: Config, setup: Setup):
        self.config, self.setup, self.world, self.bad = config, setup, setup.world, setup.bad
        self.source = setup.held_out
        self.normalise = Normalise(config.data, self.world.device)
        self.album: Album | None = None

    @cached_property
    def pictured(self) -> tuple[Tensor, Tensor]:
        """The images of the picture and of trials: pixels (n, C, H, W) uint8, ids (n,) int64."""
        return first_images(self.source or self.setup.train, self.config, self.bad)

    def pictured_inputs(self) -> tuple[Tensor, Tensor]:
        """The same as the model takes them: normalised, and the noise of evaluation."""
        pixels, ids = (tensor.to(self.world.device) for tensor in self.pictured)
        return self.normalise(pixels), self.noise(ids)

    def due(self, step: int) -> bool:
        return step == self.setup.plan.total or step % self.config.train.eval_every == 0

    def begin(self, engine: Engine, journal: Journal | None) -> None:
        """Draw what the untrained model makes of its images: and drawing fails now or never."""
        self.draw(0, engine, journal)

    def run(self, step: int, engine: Engine, journal: Journal | None, stop: StopFn = lambda: 0) -> None:
        if self.source:
            loss = self.loss(engine, stop)
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
        images, noise = self.pictured_inputs()
        pixels = self.pictured[0].to(self.world.device)
        rebuilt = self.normalise.undo(model.reconstruct(images, noise))
        grid = picture(pixels, grey_out(pixels, noise, self.config), rebuilt)
        self.album = self.album or Album(journal, PICTURE)
        self.album.add(grid, step)

    def noise(self, ids: Tensor) -> Tensor:
        """The fixed masks of evaluation: keyed by the sample alone."""
        return self.config.model.noise(self.config.train.seed, torch.zeros_like(ids), ids)

    @torch.no_grad()
    def loss(self, engine: Engine, stop: StopFn = lambda: 0) -> float:
        """Mean loss over the held-out images, each counted once whatever the number of ranks."""
        assert self.source is not None
        model = engine.replica().eval()  # predicts all masked patches whatever `predict_ratio`
        world = self.world
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        size, data = self.config.model.height_width, self.config.data
        for batch in whole_source(self.setup, self.source, size, data, self.bad, stop):
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
