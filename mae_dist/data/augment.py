"""Crop, resize, flip: a pure function of (seed, epoch, sample)."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from mae_dist import rng
from mae_dist.data.decode import Box, Decoder, cut
from mae_dist.data.options import DataConfig

CROP_STREAM = 0x63726F70
TRIES = 10  # of torchvision's RandomResizedCrop before it takes the centre


def uniforms(seed: int, epochs: ArrayLike, samples: ArrayLike, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each (seed, epoch, sample): (n, count)."""
    epochs, samples = (np.asarray(values, dtype=np.int64).reshape(-1, 1) for values in (epochs, samples))
    return rng.uniform(rng.fold(seed ^ CROP_STREAM, samples, epochs, np.arange(count)))


def random_box(height: int, width: int, config: DataConfig, u: NDArray[np.float64]) -> Box:
    """A crop with the distribution of torchvision's RandomResizedCrop, from 4 * TRIES uniform numbers."""
    low, high = config.crop_scale
    log_low, log_high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    for a, b, c, d in u.reshape(-1, 4).tolist():
        area = height * width * (low + (high - low) * a)
        ratio = math.exp(log_low + (log_high - log_low) * b)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if config.crop_clip:
            w, h = min(w, width), min(h, height)
        if 0 < w <= width and 0 < h <= height:
            return int(c * (height - h + 1)), int(d * (width - w + 1)), h, w
    # The largest centred crop whose shape is allowed.
    w, h = width, height
    if width / height < config.crop_ratio[0]:
        h = min(height, round(width / config.crop_ratio[0]))
    elif width / height > config.crop_ratio[1]:
        w = min(width, round(height * config.crop_ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def centre_box(height: int, width: int, size: tuple[int, int], share: float) -> Box:
    """The centred crop of the shape of `size` (height, width) whose side is `share` of the largest that fits."""
    scale = share * min(height / size[0], width / size[1])
    h, w = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return (height - h) // 2, (width - w) // 2, h, w


class View(NamedTuple):
    """How a sample is seen."""

    choose: Callable[[int, int], Box]
    """(height, width) of the image to the box that is cut out of it."""
    flip: bool
    after: Callable[[Tensor], Tensor] | None = None
    """What is done to the pixels at last, (C, H, W) uint8 to the same."""


def enclosing(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of these."""
    top, left = min(box[0] for box in boxes), min(box[1] for box in boxes)
    return top, left, max(t + h for t, _, h, _ in boxes) - top, max(x + w for _, x, _, w in boxes) - left


def random_views(epochs: ArrayLike, samples: ArrayLike, config: DataConfig, seed: int) -> list[View]:
    """RandomResizedCrop and horizontal flip of training, for some (epoch, sample)."""
    draws = uniforms(seed, epochs, samples, 1 + 4 * TRIES)
    return [View(partial(random_box, config=config, u=u[1:]), bool(u[0] < config.flip)) for u in draws]


def centre_views(epochs: ArrayLike, samples: ArrayLike, size: tuple[int, int], config: DataConfig) -> list[View]:
    """The centred crop of evaluation, the same for every sample."""
    return [View(partial(centre_box, size=size, share=config.eval_crop), False)] * np.size(samples)


def resize(crop: NDArray[np.uint8], size: tuple[int, int], decoder: Decoder = "fast") -> Tensor:
    """Resize (h, w, C) uint8, bicubic and antialiased: (C, *size) uint8, channels last in memory.

    "pil": by PIL, to the bit.
    """
    if crop.shape[:2] == size:
        return torch.from_numpy(crop).permute(2, 0, 1)
    if decoder == "pil":
        image = Image.fromarray(crop if crop.shape[2] > 1 else crop[..., 0])
        resized = np.array(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))
        return torch.from_numpy(resized.reshape(*size, crop.shape[2])).permute(2, 0, 1)
    # (1, C, h, w), permuted with the 1 in place: only so are its strides known as channels last, and nothing repacked.
    image = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)[0]


def finish(crop: NDArray[np.uint8], view: View, size: tuple[int, int], config: DataConfig) -> Tensor:
    """Resize and flip what a view has cut out: (h, w, C) uint8 to (C, *size) uint8."""
    image = resize(crop, size, config.decoder)
    image = image.flip(-1) if view.flip else image
    return view.after(image) if view.after else image


def augment(
    pixels: NDArray[np.uint8], epoch: int, sample: int, size: tuple[int, int], config: DataConfig, seed: int
) -> Tensor:
    """The training view of a decoded image: (H, W, C) uint8 to (C, *size) uint8."""
    (view,) = random_views(epoch, sample, config, seed)
    return finish(cut(pixels, view.choose), view, size, config)


def centre(pixels: NDArray[np.uint8], size: tuple[int, int], config: DataConfig) -> Tensor:
    """The evaluation view of a decoded image: (H, W, C) uint8 to (C, *size) uint8."""
    (view,) = centre_views(0, 0, size, config)
    return finish(cut(pixels, view.choose), view, size, config)
