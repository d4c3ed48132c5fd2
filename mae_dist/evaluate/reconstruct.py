"""What the model makes of images it sees a quarter of."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mae_dist.config import Config
from mae_dist.data import ShardSource
from mae_dist.data.augment import centre
from mae_dist.data.decode import decode
from mae_dist.data.feed import Normalise
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import load_config, newest_of, trained
from mae_dist.model.masking import mask_noise
from mae_dist.shards import remote
from mae_dist.shards.cache import Cache
from mae_dist.shards.mirror import load_manifest
from mae_dist.shards.tars import is_image
from mae_dist.train.validate import first_images, grey_out, picture


@torch.no_grad()
def reconstruct(run: Path, images: Sequence[str], out: Path, seed: int = 0) -> None:
    """Write a picture of (input | masked | reconstruction) for each image, masks drawn from `seed`.

    `images`: what `views` takes. Raises UserError when one cannot be read or the run has no checkpoint.
    """
    checkpoint = newest_of(run)
    config = load_config(checkpoint)
    pixels = torch.cat([views(place, config) for place in images])  # (n, C, H, W) uint8
    ids = torch.arange(len(pixels))
    noise = mask_noise(seed, torch.zeros_like(ids), ids, config.model.num_patches)
    normalise = Normalise(config.data, pixels.device)
    rebuilt = normalise.undo(trained(checkpoint, config).reconstruct(normalise(pixels), noise))
    picture(pixels, grey_out(pixels, noise, config), rebuilt).save(out)


def views(place: str, config: Config) -> Tensor:
    """An image file, or the first images of a directory of shards, local or an fsspec URL: (n, C, H, W) uint8."""
    if Path(place).is_dir() or (remote.is_remote(place) and not is_image(place)):
        cache = Cache(config.data.cache_dir, config.data.cache_bytes)
        source = ShardSource(load_manifest(place, cache), config.model.in_chans, cache)
        return first_images(source, config)[0]
    try:
        with remote.open_stream(place) as file:
            pixels = decode(file.read(), config.model.in_chans)
    except Exception as error:  # decoders raise what they like for bad bytes
        raise UserError(f"{place}: cannot be read as an image: {error}") from error
    return centre(pixels, config.model.height_width, config.data)[None]
