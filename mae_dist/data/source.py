"""Where pixels come from: shards, or torchvision's FakeData. Both are a number of samples in each of some shards."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mae_dist.data.bad import BadSample
from mae_dist.data.decode import MAX_PIXELS, Box, Decoder, cut, decode, whole
from mae_dist.data.options import DataConfig
from mae_dist.shards.cache import Cache
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.mirror import load_manifest
from mae_dist.shards.prefetch import Course, Prefetcher
from mae_dist.shards.store import LocalStore, RemoteStore, open_store

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

    def will_need(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        """These samples are asked for next."""
        ...

    def prefetcher(self, course: Course, behind: int) -> Prefetcher | None:
        """What fetches the samples of a course ahead of need, to be closed at the end; None: they are here."""
        ...

    def counts_read(self) -> dict[str, int]:
        """What this process, its workers and its prefetcher read and fetched so far; empty for local data."""
        ...


class ShardSource:
    """The images of a manifest. Raises BadSample, naming shard and sample, when one cannot be decoded.

    `cache`: for remote shards; None for the default one. `least`: boxes may come smaller than cut, but not than this.
    """

    def __init__(
        self,
        manifest: Manifest,
        channels: int,
        cache: Cache | None = None,
        decoder: Decoder = "fast",
        max_pixels: int = MAX_PIXELS,
        least: tuple[int, int] | None = None,
    ):
        self.store = open_store(manifest, cache)
        self.channels, self.max_pixels, self.least = channels, max_pixels, least
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
            return decode(data, self.channels, choose, self.decoder, self.max_pixels, self.least), label
        except MemoryError:  # says nothing of the image
            raise
        except Exception as error:  # decoders raise what they like for bad bytes
            raise BadSample(self.store.where(shard, index), str(error), self._key(shard, index)) from error

    def _key(self, shard: int, index: int) -> str:
        try:
            return self.store.key(shard, index)
        except Exception:  # client libraries raise what they like, and a run goes on without a name
            return ""

    def will_need(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        if isinstance(self.store, LocalStore):
            self.store.will_need(shards, indices)

    def prefetcher(self, course: Course, behind: int) -> Prefetcher | None:
        if isinstance(self.store, RemoteStore):
            return Prefetcher(self.store.cache, self.store.shards, course, behind)
        return None

    def counts_read(self) -> dict[str, int]:
        return self.store.cache.counters.totals() if isinstance(self.store, RemoteStore) else {}


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

    def will_need(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        pass

    def prefetcher(self, course: Course, behind: int) -> None:
        return None

    def counts_read(self) -> dict[str, int]:
        return {}


def open_sources(config: DataConfig, image_size: tuple[int, int], channels: int) -> tuple[Source, Source | None]:
    """The training and the held-out source of a config (None: nothing held out). Raises UserError for bad shards."""
    if config.fake:
        return FakeSource(config.fake_size, image_size, channels), None
    cache = Cache(config.cache_dir, config.cache_bytes)
    load = partial(load_manifest, cache=cache, allow_commands=config.allow_commands)
    how = channels, cache, config.decoder, config.max_pixels, image_size if config.dct_scale else None
    if config.mode == "webdataset":
        from mae_dist.data.resampled import ResampledSource  # the one mode that needs webdataset

        held_out = load(config.val_shards) if isinstance(config.val_shards, str) else None
        return ResampledSource(config, channels), ShardSource(held_out, *how) if held_out else None
    train = load(config.shards or "")
    if isinstance(config.val_shards, str):
        val = load(config.val_shards)
    elif config.val_shards:
        train, val = train.split(config.val_shards)
    else:
        return ShardSource(train, *how), None
    return ShardSource(train, *how), ShardSource(val, *how)
