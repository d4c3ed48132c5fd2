"""Which patches stay and which are hidden: counter-based noise, then one sort."""

import torch
from torch import Tensor

from mae_dist import rng

MASK_STREAM = 0x6D61736B  # keeps mask noise apart from every other use of the same seed


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """How many patches stay visible: int(N * (1 - mask_ratio)), the expression of the paper's code.

    Its float rounding is part of the recipe: 225 patches at 0.8 keep 44, not 45.
    """
    return int(num_patches * (1 - mask_ratio))


def mask_noise(seed: int, epochs: Tensor, samples: Tensor, num_patches: int) -> Tensor:
    """Noise of each patch, a pure function of (seed, epoch, sample, patch).

    `epochs`, `samples`: (B,) int64 on any device. Returns (B, N) float32 in [0, 1), the same bits on CPU and GPU.
    """
    patches = torch.arange(num_patches, device=samples.device)
    return rng.uniform(rng.fold(seed ^ MASK_STREAM, samples[:, None], epochs[:, None], patches)).float()


def split(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` patches of smallest noise and the others, each in order of noise (ties by place).

    `noise`: (B, N) float32. Returns ids_keep (B, keep) and ids_mask (B, N - keep), int64.
    """
    order = noise.argsort(dim=1, stable=True)
    return order[:, :keep], order[:, keep:]
