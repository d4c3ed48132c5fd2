"""Exact k nearest neighbours by cosine similarity, block by block: memory is bounded by the queries and one block."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07  # of the votes, as is usual for frozen features (Wu et al., CVPR 2018)
GRID = 2.0**24  # steps of a similarity in 1: float32 holds them all
CHUNK = 1024  # queries compared with a block at once


def stable_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (n, m), largest first, of equal ones the leftmost: values and places (n, min(k, m))."""
    k = min(k, values.shape[1])
    top, places = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = (top[:, 1:] == top[:, :-1]).any(1)  # where topk may have chosen any of the equal ones
    if tied.any():
        top[tied], places[tied] = (t[:, : top.shape[1]] for t in values[tied].sort(dim=1, descending=True, stable=True))
    return top[:, :k], places[:, :k]


class Neighbours:
    """The k most similar keys of each query, of all blocks added so far; of equal ones, the first added.

    `queries` (n, D) float32; both sides are centred on `centre` (D,) and normalised here. Similarities are computed in
    float64 and rounded to 1 / GRID: how a product of matrices is cut changes its last bits, and these decide ties.
    """

    def __init__(self, queries: Tensor, centre: Tensor, k: int):
        self.centre, self.k = centre, k
        self.queries = F.normalize((queries - centre).double(), dim=1)
        self.similarity = queries.new_empty(len(queries), 0)  # (n, up to k), largest first
        self.labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)

    def add(self, keys: Tensor, labels: Tensor) -> None:
        """One block: keys (m, D) float32, labels (m,) int64."""
        keys = F.normalize((keys - self.centre).double(), dim=1)
        best = []
        for query, old, old_labels in zip(
            self.queries.split(CHUNK), self.similarity.split(CHUNK), self.labels.split(CHUNK), strict=True
        ):
            values, places = stable_topk(
                torch.cat([old, ((query @ keys.T) * GRID).round().div(GRID).float()], dim=1), self.k
            )
            both = torch.cat([old_labels, labels.expand(len(query), -1)], dim=1)
            best.append((values, both.gather(1, places)))
        if best:
            self.similarity, self.labels = (torch.cat(parts) for parts in zip(*best, strict=True))

    def right(self, truth: Tensor, ks: Sequence[int], num_classes: int) -> Tensor:
        """How many queries their k neighbours classify rightly, votes weighted exp(similarity / 0.07): (len(ks),)."""
        votes = self.similarity.new_zeros(len(truth), num_classes)
        weights = (self.similarity / TEMPERATURE).exp()
        rows = torch.arange(len(truth), device=truth.device)
        counts = torch.zeros(len(ks), dtype=torch.int64, device=truth.device)
        found = self.labels.shape[1]
        for j in range(found):  # one after the other: the same sums on every device
            votes[rows, self.labels[:, j]] += weights[:, j]
            for i, k in enumerate(ks):
                if min(k, found) == j + 1:
                    counts[i] = (votes.argmax(1) == truth).sum()
        return counts


def knn_right(
    train: Iterable[tuple[Tensor, Tensor]],
    centre: Tensor,
    test: Tensor,
    truth: Tensor,
    ks: Sequence[int],
    num_classes: int,
) -> Tensor:
    """How many of `test` (n, D) each k classifies as `truth` (n,): (len(ks),) int64. `train`: blocks (keys, labels)."""
    neighbours = Neighbours(test, centre, max(ks))
    for keys, labels in train:
        neighbours.add(keys, labels)
    return neighbours.right(truth, ks, num_classes)
