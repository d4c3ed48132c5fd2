"""What the model makes of images it sees a quarter of."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mae_dist.data.augment import centre
from mae_dist.data.decode import decode
from mae_dist.data.feed import Normalise
from mae_dist.errors import UserError
from mae_dist.evaluate.checkpoints import load_config, newest_of, trained
from mae_dist.model.masking import mask_noise
from mae_dist.train.validate import grey_out, picture


@torch.no_grad()
def reconstruct(run: Path, images: Sequence[Path], out: Path, seed: int = 0) -> None:
    """Write a picture of (input | masked | reconstruction) for each image file, masks drawn from `seed`.

    Raises UserError when an image cannot be read or the run has no checkpoint.
    """
    checkpoint = newest_of(run)
    config = load_config(checkpoint)
    views = []
    for path in images:
        try:
            pixels = decode(path.read_bytes(), config.model.in_chans)
        except Exception as error:  # decoders raise what they like for bad bytes
            raise UserError(f"{path}: cannot be read as an image: {error}") from error
        views.append(centre(pixels, config.model.height_width, config.data))
    pixels = torch.stack(views)  # (n, C, H, W) uint8
    ids = torch.arange(len(pixels))
    noise = mask_noise(seed, torch.zeros_like(ids), ids, config.model.num_patches)
    normalise = Normalise(config.data, pixels.device)
    rebuilt = normalise.undo(trained(checkpoint, config).reconstruct(normalise(pixels), noise))
    picture(pixels, grey_out(pixels, noise, config), rebuilt).save(out)
