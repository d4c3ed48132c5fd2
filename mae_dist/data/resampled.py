"""`data.mode: webdataset`: a plain webdataset pipeline, for lists of shards that cannot be indexed.

Every worker draws shards at random, with replacement, and shuffles their samples in a buffer. Nothing here is a pure
function of the step: no promise that an image is seen once, or at all, or that a resumed run sees what it would have.
"""

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mae_dist.data.augment import augment
from mae_dist.data.bad import BadSample, BadSamples
from mae_dist.data.decode import cut, decode, whole
from mae_dist.data.loader import EPOCH, ID, LABEL, NANOSECONDS, POSITION, Batch, ImageStream
from mae_dist.data.options import DataConfig
from mae_dist.data.ring import Table
from mae_dist.data.source import Choose, Source
from mae_dist.errors import UserError
from mae_dist.shards import remote
from mae_dist.shards.notes import EMPTY, Notes
from mae_dist.shards.patterns import places
from mae_dist.shards.prefetch import Course
from mae_dist.shards.samples import SUFFIXES, is_image, samples
from mae_dist.shards.tar import LABELS, Counted, members
from mae_dist.urls import masked

LINKS = "links to images before them (mode exact follows them)"
BUFFER = 1000  # encoded samples that a worker shuffles
GIVE_UP = 200  # shards opened, errors and samples without image in a row
NOTICE = (
    "data.mode webdataset: shards are drawn at random, with replacement. Not every image is seen equally often, and a "
    "resumed or repeated run sees other images. For exact epochs: mae-dist index, then data.mode exact"
)


class Encoded(NamedTuple):
    """An image as a shard holds it."""

    shard: str
    key: str
    data: bytes
    label: int


class Patience:
    """What webdataset does about errors: say it and go on, until nothing but errors has come for too long."""

    def __init__(self, pattern: str):
        self.pattern, self.in_row, self.last = pattern, 0, "no errors, but no images either"
        self.noted = set[str]()

    def __call__(self, error: Exception, where: str = "") -> None:
        self.last = masked(" ".join(f"{where}{type(error).__name__}: {error}".split()))
        print(f"left out: {self.last}", file=sys.stderr, flush=True)
        self.lose()

    def note(self, shard: str, notes: Notes) -> None:
        """Say what of a shard is not used, each kind once."""
        new = Notes({kind: what for kind, what in notes.items() if kind not in self.noted})
        self.noted |= new.keys()
        for line in new.lines():
            print(masked(f"{shard}: {line}"), file=sys.stderr, flush=True)

    def lose(self) -> None:
        """Count something that gave no image. Raises UserError past the limit."""
        self.in_row += 1
        if self.in_row > GIVE_UP:
            raise UserError(
                f"data.shards: {self.pattern}: no image in the last {GIVE_UP} shards and samples ({self.last}); "
                f"the shards must hold {', '.join(SUFFIXES)}"
            )


def encoded_images(urls: list[str], patience: Patience, seed: str | None) -> Iterator[Encoded]:
    """Endless; `seed` None: the shards in their order, once, not shuffled."""
    from webdataset.filters import shuffle

    def images() -> Iterator[Encoded]:
        draw = random.Random(seed)
        place = iter(urls) if seed is None else iter(lambda: draw.choice(urls), None)
        for url in place:
            patience.lose()
            try:
                yield from images_in(url, patience)
            except (UserError, MemoryError):
                raise
            except Exception as error:  # client libraries raise what they like
                patience(error, f"{url}: ")

    return images() if seed is None else shuffle(BUFFER, seed=seed)(images())


def wanted(name: str) -> bool:
    """Whether the bytes of a file in a shard are needed."""
    return is_image(name) or name.lower().endswith(LABELS)


def images_in(url: str, patience: Patience) -> Iterator[Encoded]:
    """The images of one shard, as `mae-dist index` finds them. Raises BadTar, OSError, and what clients do."""
    notes = Notes()
    try:
        with remote.open_stream(url) as stream:
            for sample in samples(members(Counted(stream), wanted), notes):
                if sample.image and sample.image.data:
                    yield Encoded(url, sample.key, sample.image.data, sample.label)
                    continue
                patience.lose()
                if sample.image:
                    notes.add(LINKS if sample.image.size else EMPTY, sample.image.name)
    finally:
        patience.note(url, notes)


class ResampledSource:
    """A list of shards as the rest of a run sees it: a length that it is said to have, and its first images."""

    def __init__(self, config: DataConfig, channels: int):
        self.pattern, self.channels, self.config = config.shards or "", channels, config
        self.urls = places([self.pattern])
        self.epoch_size = config.epoch_size or 1
        self.digest = "resampled-" + hashlib.sha256(os.fsencode(masked(self.pattern))).hexdigest()[:16]
        self._pictures: list[tuple[NDArray[np.uint8], int]] = []
        self._more = self.images(Patience(self.pattern), None)

    @property
    def counts(self) -> NDArray[np.int64]:
        return np.array([self.epoch_size])

    def pixels(self, shard: int, index: int, choose: Choose = whole) -> tuple[NDArray[np.uint8], int]:
        """Image `index` of the shards as they lie, for pictures; all images before it are read and kept too.

        Raises UserError when there are not that many.
        """
        while len(self._pictures) <= index:
            found = next(self._more, None)
            if found is None:
                raise UserError(
                    f"data.shards: {self.pattern}: holds {len(self._pictures)} images; need at least {index + 1}"
                )
            self._pictures.append(found)
        pixels, label = self._pictures[index]
        return cut(pixels, choose), label

    def will_need(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        pass

    def prefetcher(self, course: Course, behind: int) -> None:
        return None

    def counts_read(self) -> dict[str, int]:
        return {}

    def images(
        self, patience: Patience, seed: str | None, listed: Callable[[BadSample, str], None] = lambda bad, shard: None
    ) -> Iterator[tuple[NDArray[np.uint8], int]]:
        """Decoded images, (H, W, C) uint8, and labels; those that cannot be decoded are said, `listed` and left out."""
        for shard, key, data, label in encoded_images(self.urls, patience, seed):
            try:
                pixels = decode(data, self.channels, whole, self.config.decoder, self.config.max_pixels)
            except MemoryError:  # says nothing of the image
                raise
            except Exception as error:  # decoders raise what they like for bad bytes
                bad = BadSample(f"{shard}: {key}", str(error), key)
                listed(bad, shard)
                patience(bad)
                continue
            patience.in_row = 0
            yield pixels, label


class Drawn:
    """Makes views of whatever images come next, in whatever process: `loader.Views` without its promises."""

    repeat = 1

    def __init__(
        self, source: ResampledSource, size: tuple[int, int], config: DataConfig, seed: int, bad: BadSamples | None
    ):
        self.source, self.size, self.config, self.seed, self.bad = source, size, config, seed, bad
        self.made, self.seconds, self.position = 0, 0.0, 0
        self._images: Iterator[tuple[NDArray[np.uint8], int]] | None = None

    def table(self, positions: NDArray[np.int64]) -> Table:
        """As that of `Views`: ids are a running count, every epoch is 0."""
        table = np.full((len(positions), NANOSECONDS + 1), -1)
        table[:, [POSITION, ID]] = positions[:, None]
        table[:, EPOCH] = 0
        return table

    @torch.inference_mode()
    def fill(self, table: Table, images: Tensor) -> None:
        """Make the images of some rows. What a process draws is seeded by the first row it makes: no two draw alike."""
        if self._images is None:
            seed = f"{self.seed} {table[0, POSITION]}"
            self._images = self.source.images(Patience(self.source.pattern), seed, self._list)
        for row, image in zip(table, images, strict=True):
            self.position, began = int(row[POSITION]), time.perf_counter_ns()
            pixels, row[LABEL] = next(self._images)
            image[:] = augment(pixels, 0, self.position, self.size, self.config, self.seed)
            row[NANOSECONDS] = time.perf_counter_ns() - began

    def _list(self, bad: BadSample, shard: str) -> None:
        if self.bad:
            self.bad.add(bad, position=self.position, shard=shard)


class ResampledStream(ImageStream):
    """What `ImageStream` is, without its promises: endless batches, ids a running count, every epoch 0.

    A bad image is left out, and listed in `bad`. Nothing is fetched ahead.
    """

    def __init__(self, source: Source, size: tuple[int, int], config: DataConfig, seed: int, *how: Any, **more: Any):
        """As `ImageStream`."""
        super().__init__(source, size, config, seed, *how, **more)
        assert isinstance(source, ResampledSource)
        self.views = Drawn(source, size, config, seed, self.views.bad)

    def __iter__(self) -> Iterator[Batch]:
        if self.rank == 0:
            print(NOTICE, flush=True)
        return super().__iter__()
