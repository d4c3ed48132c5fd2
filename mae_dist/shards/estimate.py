"""What `mae-dist shard` would do, from a list of the images and a few of them converted: nothing is written to OUT."""

import tarfile
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mae_dist.errors import UserError
from mae_dist.shards.convert import convert
from mae_dist.shards.encoded import has_frames
from mae_dist.shards.inputs import Reader, recognise
from mae_dist.shards.notes import FRAMES
from mae_dist.shards.one_shard import StorageFailed, read
from mae_dist.shards.plan import Plan, Recipe, make_plan
from mae_dist.shards.processes import in_order

SAMPLE = 64  # images converted to measure size and time


@dataclass(frozen=True)
class Estimate:
    kind: str
    images: int
    classes: int
    shards: int
    num_bytes: int
    """Of all shards."""
    seconds: float
    bad: list[str]
    """Unreadable images among the sample, and what is wrong with the input's files themselves."""
    notes: list[str]
    """What of the input is not used."""

    def text(self, workers: int) -> str:
        gigabytes = self.num_bytes / 1e9
        long = f"{self.seconds / 60:.0f} minutes" if self.seconds > 120 else f"{self.seconds:.0f} seconds"
        return (
            f"{self.kind}: {self.images} images, {self.classes} classes\n"
            f"{self.shards} shards, about {gigabytes:.3f} GB, {gigabytes * 1000 / self.shards:.1f} MB each\n"
            f"about {long} with {workers} processes on this machine"
        )

    def warning(self, ranks: int, workers: int, shard_size: int) -> str:
        """What readers that split by whole shards (webdataset, timm, open_clip) would lose; empty: nothing."""
        readers = ranks * workers
        if self.shards >= readers:
            return ""
        enough = self.images // readers
        advice = f"--shard-size {enough} makes {-(-self.images // enough)}" if enough else "use fewer workers"
        return (
            f"warning: {self.shards} shards of {shard_size} are too few for {ranks} ranks x {workers} workers of "
            f"readers that deal out whole shards (webdataset, timm, open_clip; mae-dist does not): {advice}"
        )


def estimate(recipe: Recipe, workers: int) -> Estimate:
    """List all images, convert a few. Raises UserError as `shard` would."""
    with tempfile.TemporaryDirectory() as scratch:
        source = recognise(recipe.images, **recipe.reading())
        pieces = source.pieces(partial(in_order, workers=workers))
        plan = make_plan(Path(scratch), recipe, source, pieces)
        sizes, seconds, bad = measure(plan, np.arange(min(SAMPLE, plan.count)))
    if not sizes:
        raise UserError(f"{recipe.images}: none of {min(SAMPLE, plan.count)} images is readable, such as {bad[0]}")
    per_image = float(np.mean(sizes)) + (4 * tarfile.BLOCKSIZE if plan.classes else 0)  # .cls and .txt
    num_bytes = round(per_image * plan.count) + plan.num_shards * tarfile.RECORDSIZE
    total = seconds / (len(sizes) + len(bad)) * plan.count / workers
    wrong, notes = [*plan.bad, *bad], list(plan.notes.lines())
    return Estimate(plan.kind, plan.count, len(plan.classes), plan.num_shards, num_bytes, total, wrong, notes)


def measure(plan: Plan, places: np.ndarray) -> tuple[list[int], float, list[str]]:
    """Bytes in a tar of each readable image, seconds for all, and what was unreadable."""
    reader, block = Reader(plan.root, plan.containers, plan.recipe.image_column), tarfile.BLOCKSIZE
    sizes, bad = [], []
    start = time.perf_counter()
    for item in plan.items_at(places):
        try:
            given = read(reader, item)
            data, suffix = convert(given, plan.recipe.conversion)
            if suffix != "jpg" and has_frames(given):
                plan.notes.add(FRAMES, reader.where(item.container, item.origin))
            sizes.append(block + -(-len(data) // block) * block)
        except (MemoryError, StorageFailed):
            raise
        except Exception as error:  # decoders raise what they like for bad bytes
            bad.append(f"{reader.where(item.container, item.origin)}: {' '.join(str(error).split())}")
    return sizes, time.perf_counter() - start, bad
