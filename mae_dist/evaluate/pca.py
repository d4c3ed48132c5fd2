"""Patch features as colours: near in colour is near in feature."""

import torch
from torch import Tensor

SHOWN = 0.98  # of the values of each component; the rest are the darkest and the brightest


def pca_colours(features: Tensor) -> Tensor:
    """The first three principal components of (n, N, D) float features, taken together: (n, N, 3) uint8.

    Each component is stretched over 0 to 255. Its sign, which no principal component has, is such that its largest
    weight is positive, so that the same features always have the same colours.
    """
    rows = features.flatten(0, 1).double()
    rows = rows - rows.mean(0)
    _, _, components = torch.linalg.svd(rows, full_matrices=False)  # (min(n*N, D), D)
    components = torch.nn.functional.pad(components[:3], (0, 0, 0, max(0, 3 - len(components))))
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    values = rows @ (components * torch.where(largest < 0, -1.0, 1.0)).T  # (n*N, 3)
    tails = torch.tensor([(1 - SHOWN) / 2, (1 + SHOWN) / 2], dtype=values.dtype)
    low, high = values.quantile(tails, dim=0)
    colours = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
    return colours.round().to(torch.uint8).unflatten(0, features.shape[:2])
