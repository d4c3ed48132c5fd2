"""What is in a directory of shards, for people: numbers, a histogram of classes, and a picture."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from mae_dist.errors import UserError
from mae_dist.shards import remote
from mae_dist.shards.encoded import open_image, pixels_of
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.store import LocalStore, RemoteStore, open_store

CLASSES_SHOWN = 20
LENGTHS_READ = 1_000_000  # or a few more; of more images than that, some
BAR = 40  # characters
SORTED_ABOVE = 2.0  # times the same-class pairs of a full shuffle
COLUMNS, ROWS, TILE, GAP = 8, 8, 112, 4
PAPER, INK = (255, 255, 255), (90, 90, 90)


@dataclass(frozen=True)
class Classes:
    """Labels, counted."""

    totals: Counter[int]
    """Samples by label."""
    concentration: float
    """Same-class pairs inside the shards, as a multiple of those expected of shuffled shards; nan without labels."""


def count_classes(shards: Iterable[NDArray[np.int64]]) -> Classes:
    """Count labels shard by shard; each (n,), -1 for none."""
    totals: Counter[int] = Counter()
    same = pairs = 0
    for labels in shards:
        known, times = np.unique(labels[labels >= 0], return_counts=True)
        totals.update(dict(zip(known.tolist(), times.tolist(), strict=True)))
        same += int((times * (times - 1)).sum())
        pairs += int(times.sum() * (times.sum() - 1))
    n = totals.total()
    expected = sum(times * (times - 1) for times in totals.values()) / max(1, n * (n - 1))
    return Classes(totals, same / pairs / expected if pairs and expected else float("nan"))


def describe(manifest: Manifest) -> str:
    """Counts, sizes, classes and advice on the order, as text of several lines."""
    step, lengths = 1 + manifest.num_samples // LENGTHS_READ, []

    def labels() -> Iterator[NDArray[np.int64]]:  # one shard in memory at a time
        for i in range(len(manifest.shards)):
            table = manifest.table(i)
            lengths.append(table[::step, 1].copy())
            yield table[:, 2]

    classes = count_classes(labels())
    counts, size = manifest.counts, sum(shard.num_bytes for shard in manifest.shards)
    low, middle, high = np.percentile(np.concatenate(lengths), [5, 50, 95]) / 1e3
    lines = [
        f"shards   {len(counts)}, {size / 1e6:.1f} MB, {counts.min()} to {counts.max()} images each",
        f"images   {manifest.num_samples}, {middle:.1f} kB each (90 % between {low:.1f} and {high:.1f})",
        f"digest   {manifest.digest}",
        *histogram(classes.totals, manifest),
        shuffle_hint(manifest, classes.concentration),
    ]
    return "\n".join(lines)


def histogram(totals: Counter[int], manifest: Manifest) -> Iterator[str]:
    """A line a class, the most frequent first."""
    unlabelled = manifest.num_samples - totals.total()
    if not totals:
        yield "classes  none: no sample has a label"
        return
    missing = f"; {unlabelled} images have no label" if unlabelled else ""
    highest = max(totals.values())
    yield f"classes  {len(totals)}, {min(totals.values())} to {highest} images each{missing}"
    for label, times in totals.most_common(CLASSES_SHOWN):
        name = manifest.classes[label] if label < len(manifest.classes) else ""
        yield f"  {label:6d} {name:16.16} {times:9d} {'#' * round(BAR * times / highest)}"
    if len(totals) > CLASSES_SHOWN:
        yield f"  ... and {len(totals) - CLASSES_SHOWN} more"


def shuffle_hint(manifest: Manifest, found: float) -> str:
    """What the shards are like inside, `found` being their class concentration, and the order that suits them."""
    far = any(remote.is_remote(shard.name) for shard in manifest.shards)
    settings = "--data.lanes 256 --data.window 4096" if far else "the defaults, a full shuffle"
    if np.isnan(found):
        why = "where no two images have the same label"  # none has one, or each its own
        return f"order    cannot tell {why} whether the shards are shuffled; train with {settings}"
    how = f"{found:.1f} times the same-class pairs of shuffled shards"
    if found > SORTED_ABOVE and far:
        return f"order    sorted by class ({how}); shuffle them once with mae-dist shard, or train with {settings}"
    return f"order    {'sorted by class' if found > SORTED_ABOVE else 'shuffled'} ({how}); train with {settings}"


def contact_sheet(manifest: Manifest, seed: int = 0) -> Image.Image:
    """64 images (fewer when there are fewer) drawn at random, each with its label below."""
    starts = np.cumsum(manifest.counts) - manifest.counts
    shown = min(COLUMNS * ROWS, manifest.num_samples)
    store = open_store(manifest)
    chosen = np.sort(np.random.default_rng(seed).choice(manifest.num_samples, shown, replace=False))
    height = TILE + 14
    size = COLUMNS * (TILE + GAP) + GAP, -(-shown // COLUMNS) * (height + GAP) + GAP
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, sample in enumerate(chosen.tolist()):
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        image, label = _picture(store, shard, sample - int(starts[shard]))
        x, y = GAP + n % COLUMNS * (TILE + GAP), GAP + n // COLUMNS * (height + GAP)
        sheet.paste(image, (x, y))
        name = manifest.classes[label] if 0 <= label < len(manifest.classes) else str(label) if label >= 0 else ""
        draw.text((x, y + TILE + 1), name[:18], fill=INK)
    return sheet


def _picture(store: LocalStore | RemoteStore, shard: int, row: int) -> tuple[Image.Image, int]:
    """One image cut to a square tile, crossed out when it cannot be decoded, and its label."""
    try:
        data, label = store.read(shard, row)
    except OSError as error:
        raise UserError(f"{store.manifest.place(shard)}: no contact sheet: {error}") from error
    try:
        with open_image(data) as image:
            return ImageOps.fit(pixels_of(image, "RGB"), (TILE, TILE), Image.Resampling.BICUBIC), label
    except Exception:  # decoders raise what they like for bad bytes
        tile = Image.new("RGB", (TILE, TILE), INK)
        ImageDraw.Draw(tile).line([(0, 0), (TILE, TILE)], fill=PAPER)
        return tile, label
