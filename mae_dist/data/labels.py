"""The labels of a source, read from the indexes alone, and the part of a source that a few labels leave."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mae_dist import rng
from mae_dist.data.decode import whole
from mae_dist.data.source import Choose, ShardSource, Source
from mae_dist.errors import UserError, note
from mae_dist.shards.manifest import Manifest
from mae_dist.shards.prefetch import Course, Prefetcher

Ints = NDArray[np.int64]
SUBSET_STREAM = 0x73756273
MOST_CLASSES = 1_000_000  # more are ids of something, and a classifier of them no use of anybody's memory


def labels_of(source: Source) -> Ints:
    """Labels (N,) int64 of all samples in file order, no image read. Raises UserError where one is missing."""
    if isinstance(source, SubsetSource):
        return labels_of(source.source)[source.kept]
    manifest = manifest_of(source)
    tables = [manifest.table(shard)[:, 2] for shard in range(len(manifest.shards))]
    labels = np.concatenate(tables).astype(np.int64)
    if labels.min() < 0:
        raise UserError(
            f"{manifest.directory}: {int((labels < 0).sum())} of {len(labels)} images have no label; make labelled "
            "shards: mae-dist shard CLASS_FOLDERS OUT (or --labels FILE)"
        )
    return labels


def manifest_of(source: Source) -> Manifest:
    if isinstance(source, SubsetSource):
        return manifest_of(source.source)
    if not isinstance(source, ShardSource):
        raise UserError("evaluation needs labelled shards with a manifest, made by mae-dist shard or mae-dist index")
    return source.store.manifest


def count_classes(train: Source, held_out: Source) -> int:
    """How many classes the labels of both count. Raises UserError where one is missing or means another class there.

    A name that is the label's own number says nothing, as when labels were given as numbers.
    """
    manifests = manifest_of(train), manifest_of(held_out)
    for label, names in enumerate(zip(*(manifest.classes for manifest in manifests), strict=False)):
        unknown = str(label) in names and not all(name.isdecimal() for name in names)
        if names[0] != names[1] and not unknown:
            places = [manifest.place(0).rpartition("/")[0] for manifest in manifests]
            raise UserError(
                f"{places[0]} and {places[1]}: label {label} is {names[0]} in the first, {names[1]} in the second; "
                "make both with mae-dist shard from class folders of the same names (numbered in sorted order), or "
                "one of them from a flat directory with --labels FILE and the numbers of the other"
            )
    seen, asked = (labels_of(source) for source in (train, held_out))
    if unseen := sorted(set(asked.tolist()).difference(seen.tolist())):
        shown = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        count = int(np.isin(asked, unseen).sum())
        note(f"{count} of {len(asked)} held-out images are of classes that no training image has (labels {shown})")
    highest = max(int(seen.max()), int(asked.max()))
    if highest >= MOST_CLASSES:
        raise UserError(
            f"{manifests[0].directory}, {manifests[1].directory}: a label {highest}: an id, no number of a class; make "
            "shards with labels from 0 (mae-dist shard --labels FILE)"
        )
    return 1 + highest


class SubsetSource:
    """Some samples of a source. `kept`: their places in it, ascending (n,) int64."""

    def __init__(self, source: Source, kept: Ints):
        self.source, self.kept, self.channels = source, kept, source.channels
        self.first = np.concatenate([[0], np.cumsum(source.counts)])  # of each shard, in the whole source
        self.begins = np.searchsorted(kept, self.first)  # of each shard, in `kept`
        self.counts: Ints = np.diff(self.begins)
        self.digest = f"{source.digest}-{hashlib.sha256(kept.tobytes()).hexdigest()[:8]}"

    def pixels(self, shard: int, index: int, choose: Choose = whole) -> tuple[NDArray[np.uint8], int]:
        return self.source.pixels(shard, self._place(shard, index), choose)

    def _place(self, shard: int, index: int) -> int:
        return int(self.kept[self.begins[shard] + index] - self.first[shard])

    def will_need(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        self.source.will_need(shards, [self._place(*at) for at in zip(shards, indices, strict=True)])

    def prefetcher(self, course: Course, behind: int) -> Prefetcher | None:
        return self.source.prefetcher(course, behind)

    def counts_read(self) -> dict[str, int]:
        return self.source.counts_read()


def subset(source: Source, fraction: float = 1.0, per_class: int | None = None, seed: int = 0) -> Source:
    """`fraction` of each class (at least one image of it), or `per_class` images of each: decided by `seed` alone.

    A larger part contains the smaller ones. Raises UserError when a class has fewer images than asked for.
    """
    if not 0 < fraction <= 1 or (per_class is not None and per_class < 1):
        raise UserError(f"labels: fraction {fraction} must be in (0, 1], per_class {per_class} at least 1")
    if fraction == 1 and per_class is None:
        return source
    return SubsetSource(source, choose(labels_of(source), fraction, per_class, seed))


def choose(labels: Ints, fraction: float, per_class: int | None, seed: int) -> Ints:
    """The places, ascending, of the samples that `subset` keeps of labels (N,)."""
    shuffled = np.argsort(rng.fold(seed ^ SUBSET_STREAM, np.arange(len(labels))), kind="stable")
    kept = []
    for label in np.unique(labels):
        own = shuffled[labels[shuffled] == label]
        count = per_class or max(1, round(fraction * len(own)))
        if count > len(own):
            raise UserError(f"labels.per_class: {count}, but class {label} has only {len(own)} images")
        kept.append(own[:count])
    return np.sort(np.concatenate(kept))
