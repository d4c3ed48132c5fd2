"""Fine-tuning's augmentations: timm's own, their dice keyed by (seed, epoch, sample).

timm draws from Python's, NumPy's and torch's global generators; each is seeded around a call and put back after it.
Mixup and cutmix pair the images of one micro-batch, so their pairs depend on how the batch is cut; nothing else does.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from timm.data import auto_augment
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from mae_dist import rng
from mae_dist.data import DataConfig
from mae_dist.data.augment import View, random_views
from mae_dist.data.decode import MODES
from mae_dist.evaluate.options import AugmentConfig

RAND_STREAM, ERASE_STREAM, MIX_STREAM = 0x72616E64, 0x65726173, 0x6D69786D


def keys(seed: int, epochs: ArrayLike, samples: ArrayLike) -> list[int]:
    """A seed in [0, 2**32) for each (epoch, sample)."""
    epochs, samples = (np.asarray(values, dtype=np.int64) for values in (epochs, samples))
    return [int(key) & 0xFFFFFFFF for key in rng.fold(seed, np.atleast_1d(samples), np.atleast_1d(epochs))]


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """The global generators begin at `key`, and are afterwards as they were. CUDA's are left alone."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(key)
    np.random.seed(key)
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def finetune_views(
    epochs: NDArray[np.int64], samples: NDArray[np.int64], data: DataConfig, augment: AugmentConfig, seed: int
) -> list[View]:
    """Random crop and flip as in pretraining, then RandAugment."""
    views = random_views(epochs, samples, data, seed)
    if not augment.rand_augment:
        return views
    fill = tuple(round(255 * mean) for mean in data.mean * (3 // len(data.mean)))
    seeds = keys(seed ^ RAND_STREAM, epochs, samples)
    return [
        replace_after(view, partial(rand_augment, spec=augment.rand_augment, fill=fill, key=key))
        for view, key in zip(views, seeds, strict=True)
    ]


def replace_after(view: View, after: Callable[[Tensor], Tensor]) -> View:
    return view._replace(after=after)


@lru_cache
def rand_augmentation(spec: str, translate: int, fill: tuple[int, ...]) -> RandAugment:
    """timm's own, with the posterize that it was made for."""
    hparams: dict[str, Any] = {"translate_const": translate, "img_mean": fill}
    made = rand_augment_transform(spec, hparams | {"interpolation": Image.Resampling.BICUBIC})
    for op in made.ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize
    return made


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm asks for 0 bits at full magnitude: black, which PIL from 12 on refuses to make."""
    return image if bits >= 8 else image.point(lambda value: value & ~(2 ** (8 - bits) - 1))


def rand_augment(pixels: Tensor, spec: str, fill: tuple[int, ...], key: int) -> Tensor:
    """timm's RandAugment of (1 or 3, H, W) uint8."""
    channels, height, width = pixels.shape
    transform = rand_augmentation(spec, int(min(height, width) * 0.45), fill)
    image = Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy()).convert("RGB")
    with seeded(key):
        image = transform(image)
    return torch.from_numpy(np.array(image.convert(MODES[channels])).reshape(height, width, channels)).permute(2, 0, 1)


class Mix:
    """Erases and mixes a micro-batch: images (B, C, H, W), normalised, and labels (B,) to images and targets.

    Targets are (B, classes), smoothed, with mixup or cutmix; without, the labels as they are.
    """

    def __init__(self, config: AugmentConfig, num_classes: int, seed: int):
        self.seed = seed
        self.erase = RandomErasing(config.erase, mode="pixel", device="cpu") if config.erase else None
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes)

    def __call__(self, images: Tensor, labels: Tensor, epochs: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        epochs, samples = epochs.cpu(), samples.cpu()
        if self.erase:
            for i, key in enumerate(keys(self.seed ^ ERASE_STREAM, epochs, samples)):
                with seeded(key):
                    self.erase(images[i])
        if self.mixup is None:
            return images, labels
        with seeded(keys(self.seed ^ MIX_STREAM, epochs[:1], samples[:1])[0]):
            return self.mixup(images, labels)
