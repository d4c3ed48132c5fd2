"""Where pixels come from: shards, or torchvision's FakeData. Both are a number of samples in each of some shards."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mae_dist.data.bad import BadSample
from mae_dist.data.decode import MAX_PIXELS, Box, Decoder, cut, decode, whole
from mae_dist.data.options import DataConfig
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.store import LocalStore

Choose = Callable[[int, int], Box]


class Source(Protocol):
    """A data set whose samples are addressed by (shard, index)."""

    @property
    def counts(self) -> NDArray[np.int64]: ...

    @property
    def digest(self) -> str:
        """Changes when the data does."""
        ...

    @property
    def channels(self) -> int: ...

    def pixels(self, shard: int, index: int, choose: Choose = whole) -> tuple[NDArray[np.uint8], int]:
        """The box that `choose(height, width)` picks, (h, w, C) uint8, and the label (-1: none).

        Raises BadSample for an unreadable image.
        """
        ...


class ShardSource:
    """The images of a manifest. Raises BadSample, naming shard and sample, when one cannot be decoded."""

    def __init__(self, manifest: Manifest, channels: int, decoder: Decoder = "fast", max_pixels: int = MAX_PIXELS):
        self.store = LocalStore(manifest)
        self.channels, self.max_pixels = channels, max_pixels
        self.decoder: Decoder = decoder

    @property
    def counts(self) -> NDArray[np.int64]:
        return self.store.manifest.counts

    @property
    def digest(self) -> str:
        return self.store.manifest.digest

    def pixels(self, shard: int, index: int, choose: Choose = whole) -> tuple[NDArray[np.uint8], int]:
        data, label = self.store.read(shard, index)
        try:
            return decode(data, self.channels, choose, self.decoder, self.max_pixels), label
        except Exception as error:  # decoders raise what they like for bad bytes
            raise BadSample(self.store.where(shard, index), str(error)) from error


class FakeSource:
    """torchvision's FakeData: image i is random, always the same."""

    def __init__(self, size: int, image_size: tuple[int, int], channels: int):
        from torchvision.datasets import FakeData  # slow to import, needed here only

        self.data = FakeData(size, (channels, *image_size), num_classes=10)
        self.channels = channels
        self.digest = f"fake-{size}-{channels}x{image_size[0]}x{image_size[1]}"

    @property
    def counts(self) -> NDArray[np.int64]:
        return np.array([len(self.data)])

    def pixels(self, shard: int, index: int, choose: Choose = whole) -> tuple[NDArray[np.uint8], int]:
        image, label = self.data[index]
        pixels = np.array(image)
        return cut(pixels if pixels.ndim == 3 else pixels[..., None], choose), int(label)


def open_sources(config: DataConfig, image_size: tuple[int, int], channels: int) -> tuple[Source, Source | None]:
    """The training and the held-out source of a config (None: nothing held out). Raises UserError for bad shards."""
    if config.fake:
        return FakeSource(config.fake_size, image_size, channels), None
    how = channels, config.decoder, config.max_pixels
    if config.mode == "webdataset":
        from mae_dist.data.resampled import ResampledSource  # the one mode that needs webdataset

        held_out = Manifest.load(config.val_shards) if isinstance(config.val_shards, str) else None
        return ResampledSource(config, channels), ShardSource(held_out, *how) if held_out else None
    train = Manifest.load(config.shards or "")
    if isinstance(config.val_shards, str):
        val = Manifest.load(config.val_shards)
    elif config.val_shards:
        train, val = train.split(config.val_shards)
    else:
        return ShardSource(train, *how), None
    return ShardSource(train, *how), ShardSource(val, *how)
