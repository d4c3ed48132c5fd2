"""What is in a directory of shards, for people: numbers, a histogram of classes, and a picture."""

import io
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from mae_dist.errors import UserError
from mae_dist.shards import remote
from mae_dist.shards.manifest import Manifest

CLASSES_SHOWN = 20
BAR = 40  # characters
SORTED_ABOVE = 2.0  # times the same-class pairs of a full shuffle
COLUMNS, ROWS, TILE, GAP = 8, 8, 112, 4
PAPER, INK = (255, 255, 255), (90, 90, 90)


def describe(manifest: Manifest) -> str:
    """Counts, sizes, classes and advice on the order, as text of several lines."""
    tables = [np.load(manifest.index_path(i)) for i in range(len(manifest.shards))]
    lengths = np.concatenate([table[:, 1] for table in tables])
    labels = [table[:, 2] for table in tables]
    counts, size = manifest.counts, sum(shard.num_bytes for shard in manifest.shards)
    low, middle, high = np.percentile(lengths, [5, 50, 95]) / 1e3
    lines = [
        f"shards   {len(counts)}, {size / 1e6:.1f} MB, {counts.min()} to {counts.max()} images each",
        f"images   {manifest.num_samples}, {middle:.1f} kB each (90 % between {low:.1f} and {high:.1f})",
        f"digest   {manifest.digest}",
        *histogram(np.concatenate(labels), manifest.classes),
        shuffle_hint(manifest, labels),
    ]
    return "\n".join(lines)


def histogram(labels: NDArray[np.int64], names: object) -> Iterator[str]:
    """A line a class, the most frequent first. `labels`: (N,), -1 for none."""
    known, times = np.unique(labels[labels >= 0], return_counts=True)
    unlabelled = len(labels) - int(times.sum())
    if not len(known):
        yield "classes  none: no sample has a label"
        return
    missing = f"; {unlabelled} images have no label" if unlabelled else ""
    yield f"classes  {len(known)}, {times.min()} to {times.max()} images each{missing}"
    for i in np.argsort(-times, kind="stable")[:CLASSES_SHOWN]:
        label = int(known[i])
        name = names[label] if isinstance(names, list | tuple) and label < len(names) else ""
        yield f"  {label:6d} {name:16.16} {times[i]:9d} {'#' * round(BAR * times[i] / times.max())}"
    if len(known) > CLASSES_SHOWN:
        yield f"  ... and {len(known) - CLASSES_SHOWN} more"


def class_concentration(labels: list[NDArray[np.int64]]) -> float:
    """Same-class pairs inside the shards, as a multiple of those expected of shuffled shards; nan without labels."""
    width = int(max(shard.max(initial=-1) for shard in labels)) + 1
    total, same, pairs = np.zeros(width), 0.0, 0.0
    for shard in labels:
        times = np.bincount(shard[shard >= 0], minlength=width).astype(float)
        same += (times * (times - 1)).sum()
        pairs += times.sum() * (times.sum() - 1)
        total += times
    n = total.sum()
    expected = (total * (total - 1)).sum() / (n * (n - 1)) if n > 1 else 0.0
    return same / pairs / expected if pairs and expected else float("nan")


def shuffle_hint(manifest: Manifest, labels: list[NDArray[np.int64]]) -> str:
    """What the shards are like inside, and the order settings that suit them."""
    found = class_concentration(labels)
    far = any(remote.is_remote(shard.name) for shard in manifest.shards)
    settings = "--data.lanes 256 --data.window 4096" if far else "the defaults, a full shuffle"
    if np.isnan(found):
        return f"order    cannot tell without labels whether the shards are shuffled; train with {settings}"
    how = f"{found:.1f} times the same-class pairs of shuffled shards"
    if found > SORTED_ABOVE and far:
        return f"order    sorted by class ({how}); shuffle them once with mae-dist shard, or train with {settings}"
    return f"order    {'sorted by class' if found > SORTED_ABOVE else 'shuffled'} ({how}); train with {settings}"


def contact_sheet(manifest: Manifest, seed: int = 0) -> Image.Image:
    """64 images (fewer when there are fewer) drawn at random, each with its label below."""
    starts = np.cumsum(manifest.counts) - manifest.counts
    shown = min(COLUMNS * ROWS, manifest.num_samples)
    chosen = np.sort(np.random.default_rng(seed).choice(manifest.num_samples, shown, replace=False))
    height = TILE + 14
    size = COLUMNS * (TILE + GAP) + GAP, -(-shown // COLUMNS) * (height + GAP) + GAP
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for n, sample in enumerate(chosen.tolist()):
        shard = int(np.searchsorted(starts, sample, side="right")) - 1
        image, label = _picture(manifest, shard, sample - int(starts[shard]))
        x, y = GAP + n % COLUMNS * (TILE + GAP), GAP + n // COLUMNS * (height + GAP)
        sheet.paste(image, (x, y))
        name = manifest.classes[label] if 0 <= label < len(manifest.classes) else str(label) if label >= 0 else ""
        draw.text((x, y + TILE + 1), name[:18], fill=INK)
    return sheet


def _picture(manifest: Manifest, shard: int, row: int) -> tuple[Image.Image, int]:
    """One image cut to a square tile, crossed out when it cannot be decoded, and its label."""
    offset, length, label = np.load(manifest.index_path(shard), mmap_mode="r")[row].tolist()
    try:
        data = remote.read_range(manifest.place(shard), offset, offset + length)
    except OSError as error:
        raise UserError(f"{manifest.place(shard)}: no contact sheet: {error}") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.fit(image.convert("RGB"), (TILE, TILE), Image.Resampling.BICUBIC), label
    except Exception:  # decoders raise what they like for bad bytes
        tile = Image.new("RGB", (TILE, TILE), INK)
        ImageDraw.Draw(tile).line([(0, 0), (TILE, TILE)], fill=PAPER)
        return tile, label
