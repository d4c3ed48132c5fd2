"""The order of samples: a pure function of (seed, epoch, position).

Position P of the endless sample stream lies in epoch P // N. In an epoch the shards are permuted, their samples laid
end to end, the line cut into `lanes` pieces of equal length (+-1), each lane permuted inside windows of `window`
samples, and the lanes interleaved. Permutations are computed, not stored (a small Feistel network with cycle walking),
so any position costs the same, a full shuffle of any N needs no memory, and resuming means starting at another number.

How well it shuffles: same-class pairs in a batch of 4096, as a multiple of a full shuffle's, for ImageNet's numbers in
shards of 1000 sorted by class (`benchmarks/order.py`): one lane without windows 1.0; 256 lanes of windows of 4096 1.4,
of 1024 2.5; 64 lanes of 4096 3.5; 1024 lanes of 1024 1.0, but that has 1.6 times the shards of 256 lanes of 4096 open.
webdataset's buffer: 64 workers with 5000 samples 2.8, with 1000 5.4; 8 workers with 1000 38. Shards that were shuffled
when they were written need none of this.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mae_dist import rng

Ints = NDArray[np.int64]

SHARD_STREAM, WINDOW_STREAM, PHASE_STREAM = 0x73686172, 0x77696E64, 0x70686173
FEISTEL_ROUNDS = 6


class Samples(NamedTuple):
    """Who is at some positions of the stream; each field (B,) int64."""

    epoch: Ints
    shard: Ints
    row: Ints
    """Place of the sample in its shard."""
    id: Ints
    """Place of the sample in the data set, shards laid end to end in manifest order: its identity in every epoch."""


def permute(values: Ints, sizes: Ints, keys: Ints) -> Ints:
    """Where a keyed permutation of range(size) sends each value, element by element.

    `values`: (B,) with 0 <= value < size. `sizes`, `keys`: (B,); equal (size, key) pairs share one permutation.
    """
    bits = np.maximum(4, np.ceil(np.log2(np.maximum(sizes, 2))).astype(np.int64))
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    round_keys = [rng.mix(keys + rng.int64((r + 1) * rng.GOLDEN)) for r in range(FEISTEL_ROUNDS)]
    out, todo = values.copy(), np.arange(len(values))
    while len(todo):  # walk the cycle of the power-of-two domain until back inside the range
        x, shift, low, high = out[todo], low_bits[todo], low_mask[todo], high_mask[todo]
        left, right = x >> shift, x & low
        for r, round_key in enumerate(round_keys):
            key = round_key[todo]
            if r % 2:
                left ^= rng.mix(right ^ key) & high
            else:
                right ^= rng.mix(left ^ key) & low
        out[todo] = (left << shift) | right
        todo = todo[out[todo] >= sizes[todo]]
    return out


class SampleOrder:
    """The samples of every global batch of a run.

    `counts`: samples in each shard. `seed`: any int. `lanes`: 1 for a full shuffle; many (256) for remote shards, where
    a rank stays on its own lanes when world | lanes | global batch. `window`: samples shuffled together inside a lane,
    0 for the whole lane. Memory is O(shards). Raises ValueError when there are no samples or a number is out of range.
    """

    def __init__(self, counts: ArrayLike, seed: int = 0, lanes: int = 1, window: int = 0):
        self.counts = np.asarray(counts, dtype=np.int64).reshape(-1)
        self.num_samples = int(self.counts.sum())
        if self.num_samples < 1 or self.counts.min() < 0:
            raise ValueError("an order needs at least one sample, and no shard with a negative count")
        if lanes < 1 or window < 0:
            raise ValueError(f"lanes must be at least 1 and window at least 0, not {lanes} and {window}")
        self.seed = seed
        self.lanes = min(lanes, self.num_samples)
        self.window = window
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])  # of each shard, in manifest order
        self._line = lru_cache(maxsize=4)(self._line_of_epoch)

    def __reduce__(self):
        return SampleOrder, (self.counts, self.seed, self.lanes, self.window)  # a cache does not travel

    def batch(self, k: int, global_batch_size: int) -> Ints:
        """(shard, index) of the samples of global batch k, (B, 2) int64."""
        samples = self.lookup(np.arange(k * global_batch_size, (k + 1) * global_batch_size))
        return np.stack([samples.shard, samples.row], axis=1)

    def lookup(self, positions: ArrayLike) -> Samples:
        """Who is at these absolute positions of the stream, (B,) int64 each."""
        epoch, position = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        place = self._place_in_line(epoch, position)
        shard = np.empty_like(place)
        index = np.empty_like(place)
        for e in np.unique(epoch):
            here = epoch == e
            order, starts = self._line(int(e))
            nth = np.searchsorted(starts, place[here], side="right") - 1
            shard[here] = order[nth]
            index[here] = place[here] - starts[nth]
        return Samples(epoch, shard, index, self.starts[shard] + index)

    def _line_of_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The shards in this epoch's order, and where in the line each starts, (S,) each. Empty shards are left out."""
        shards = np.flatnonzero(self.counts)
        hashed = rng.fold(self.seed ^ SHARD_STREAM, shards, epoch)
        order = shards[np.argsort(hashed, kind="stable")]
        lengths = self.counts[order]
        return order, np.cumsum(lengths) - lengths

    def _place_in_line(self, epoch: Ints, position: Ints) -> Ints:
        """Lanes and windows: where in the epoch's line of samples each position of the epoch reads."""
        length, longer = divmod(self.num_samples, self.lanes)
        lane, i = position % self.lanes, position // self.lanes
        lane_start = lane * length + np.minimum(lane, longer)
        lane_length = length + (lane < longer)
        window = self.window or self.num_samples
        # A random phase moves the windows' borders each epoch; a window as long as its lane needs none.
        phase = rng.fold(self.seed ^ PHASE_STREAM, lane, epoch) % window
        phase = np.where(window < lane_length, phase, 0)
        nth = (i - phase) // window  # -1 for the piece before the first border
        start = np.maximum(0, phase + nth * window)
        end = np.minimum(lane_length, phase + (nth + 1) * window)
        keys = rng.fold(self.seed ^ WINDOW_STREAM, lane, epoch, nth)
        return lane_start + start + permute(i - start, end - start, keys)


class FileOrder:
    """Samples as they lie, position = id: for evaluation. `counts`: samples in each shard."""

    def __init__(self, counts: ArrayLike):
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
        self.num_samples = int(self.starts[-1])

    def lookup(self, positions: ArrayLike) -> Samples:
        """Who is at these positions, (B,) int64 each, all in epoch 0."""
        ids = np.asarray(positions, dtype=np.int64)
        shard = np.searchsorted(self.starts, ids, side="right") - 1
        return Samples(np.zeros_like(ids), shard, ids - self.starts[shard], ids)
