"""What the model makes of images it sees a part of, and what its features of them look like."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mae_dist.config import Config
from mae_dist.data import ShardSource
from mae_dist.data.augment import centre
from mae_dist.data.decode import decode
from mae_dist.data.feed import Normalise
from mae_dist.data.options import check_channels
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import load_config, newest_of, trained
from mae_dist.evaluate.pca import pca_colours
from mae_dist.model import MAE
from mae_dist.shards import remote
from mae_dist.shards.cache import Cache
from mae_dist.shards.folders import kind_of
from mae_dist.shards.mirror import load_manifest
from mae_dist.shards.samples import is_image
from mae_dist.track.review import picture_grid
from mae_dist.train.validate import first_images, grey_out

NORM_PIX = (
    "note: trained with norm_pix_loss, this model predicts each patch normalised by its own mean and variance. To be "
    "shown, every prediction was given the mean and variance of the true patch back: brightness and contrast of the "
    "reconstructions are the image's own, only the structure within a patch is the model's"
)


class Viewer:
    """A run's model and the images to look at."""

    def __init__(
        self,
        run: Path,
        images: Sequence[str | Path],
        mask_ratio: float | None = None,
        allow_commands: bool = False,
    ):
        """`images`: what `views` takes. Raises UserError for one unreadable, no checkpoint, or a wrong ratio."""
        checkpoint = newest_of(run)
        config = load_config(checkpoint)
        check_channels(config.model.in_chans)
        if mask_ratio is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, mask_ratio=mask_ratio))
        self.config: Config = config
        self.model: MAE = trained(checkpoint, config)
        self.pixels = torch.cat([views(str(place), config, allow_commands) for place in images])  # (n, C, H, W) uint8
        self.normalise = Normalise(config.data, self.pixels.device)

    @torch.no_grad()
    def reconstruction(self, seeds: Sequence[int]) -> Image.Image:
        """input | masked | reconstruction | visible pasted, for each image and seed of its mask."""
        ids = torch.arange(len(self.pixels))
        noise = torch.cat([self.config.model.noise(seed, torch.zeros_like(ids), ids) for seed in seeds])
        pixels = self.pixels.repeat(len(seeds), 1, 1, 1)
        images = self.normalise(pixels)
        bare, pasted = (
            self.normalise.undo(self.model.reconstruct(images, noise, paste=paste)) for paste in (False, True)
        )
        order = torch.arange(len(pixels)).view(len(seeds), -1).T.flatten()  # an image's masks beside each other
        kinds = {
            "input": pixels,
            "masked": grey_out(pixels, noise, self.config),
            "reconstruction": bare,
            "visible pasted": pasted,
        }
        return picture_grid({caption: channels_last(tensor[order]) for caption, tensor in kinds.items()})

    @torch.no_grad()
    def features(self) -> Image.Image:
        """input | its patch features: their first three principal components, over all the images, as colours."""
        patch = self.config.model.patch_size
        grid = tuple(side // patch for side in self.config.model.height_width)
        tokens = self.model.encode(self.normalise(self.pixels))[:, 1:]
        colours = pca_colours(tokens).unflatten(1, grid)  # (n, rows, columns, 3)
        large = colours.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        pixels = self.pixels.expand(-1, 3, -1, -1) if self.pixels.shape[1] == 1 else self.pixels
        return picture_grid({"input": channels_last(pixels), "features": large.numpy()})


def views(place: str, config: Config, allow_commands: bool = False) -> Tensor:
    """An image file, or the first images of a directory of shards, local or an fsspec URL: (n, C, H, W) uint8."""
    if Path(place).is_dir() or (remote.is_remote(place) and not is_image(place)):
        cache = Cache(config.data.cache_dir, config.data.cache_bytes)
        how = config.model.in_chans, cache, config.data.decoder, config.data.max_pixels
        allow = allow_commands or config.data.allow_commands
        source = ShardSource(load_manifest(place, cache, allow_commands=allow), *how)
        return first_images(source, config)[0]
    if not remote.is_remote(place) and Path(place).exists() and not Path(place).is_file():
        raise UserError(f"{place}: is {kind_of(Path(place))}; write an image file, or a directory of shards")
    try:
        with remote.open_stream(place) as file:
            pixels = decode(file.read(), config.model.in_chans, max_pixels=config.data.max_pixels)
    except Exception as error:  # decoders raise what they like for bad bytes
        raise UserError(f"{place}: cannot be read as an image: {error}") from error
    return centre(pixels, config.model.height_width, config.data)[None]


def channels_last(images: Tensor):
    """(n, C, H, W) to a NumPy array (n, H, W, C)."""
    return images.permute(0, 2, 3, 1).numpy()
