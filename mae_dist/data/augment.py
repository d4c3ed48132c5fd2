"""Crop, resize, flip: a pure function of (seed, epoch, sample)."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mae_dist import rng
from mae_dist.data.options import DataConfig

CROP_STREAM = 0x63726F70
TRIES = 10  # of torchvision's RandomResizedCrop before it takes the centre

Box = tuple[int, int, int, int]  # top, left, height, width


def uniforms(seed: int, epoch: int, sample: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), keyed by (seed, epoch, sample)."""
    draws = np.arange(count)
    return rng.uniform(rng.fold(seed ^ CROP_STREAM, np.full(1, sample), epoch, draws))


def random_box(height: int, width: int, config: DataConfig, u: NDArray[np.float64]) -> Box:
    """A crop with the distribution of torchvision's RandomResizedCrop, from 4 * TRIES uniform numbers."""
    low, high = config.crop_scale
    log_low, log_high = math.log(config.crop_ratio[0]), math.log(config.crop_ratio[1])
    for a, b, c, d in u.reshape(-1, 4).tolist():
        area = height * width * (low + (high - low) * a)
        ratio = math.exp(log_low + (log_high - log_low) * b)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
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


def resize(pixels: NDArray[np.uint8], box: Box, size: tuple[int, int]) -> Tensor:
    """Cut `box` out of (H, W, C) uint8 and resize it, bicubic and antialiased: (C, *size) uint8."""
    top, left, height, width = box
    crop = torch.from_numpy(pixels[top : top + height, left : left + width])
    image = crop.permute(2, 0, 1)[None]  # (1, C, h, w), channels last in memory
    if (height, width) == size:
        return image[0]
    return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)[0]


def augment(
    pixels: NDArray[np.uint8], epoch: int, sample: int, size: tuple[int, int], config: DataConfig, seed: int
) -> Tensor:
    """RandomResizedCrop and horizontal flip: (H, W, C) uint8 to (C, *size) uint8."""
    u = uniforms(seed, epoch, sample, 1 + 4 * TRIES)
    image = resize(pixels, random_box(pixels.shape[0], pixels.shape[1], config, u[1:]), size)
    return image.flip(-1) if u[0] < config.flip else image


def centre(pixels: NDArray[np.uint8], size: tuple[int, int], config: DataConfig) -> Tensor:
    """The evaluation view: (H, W, C) uint8 to (C, *size) uint8."""
    return resize(pixels, centre_box(pixels.shape[0], pixels.shape[1], size, config.eval_crop), size)
