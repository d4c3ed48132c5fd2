"""Which patches stay and which are hidden: counter-based noise, then one sort.

Blocks and grids (the ablations of the paper's figure 6) are noise too, whose order hides them: small = kept is all that
the model knows. Among the kept and among the hidden the order is random whatever the kind.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from mae_dist import rng

Masking = Literal["random", "block", "grid"]
MASK_STREAM = 0x6D61736B  # keeps mask noise apart from every other use of the same seed
SHAPE_STREAM = 0x73686170  # and the blocks and grids apart from the noise
BLOCKS = 32  # drawn for an image; what they do not reach is filled at random
LEAST = 16 / 196  # of the grid, in the smallest block: BEiT's 16 of 14x14 patches
ASPECTS = [math.exp(math.log(0.3) * (1 - i / 31.5)) for i in range(64)]  # 0.3 to 1 / 0.3, evenly in the logarithm


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


def shaped_noise(
    seed: int, epochs: Tensor, samples: Tensor, grid: tuple[int, int], keep: int, masking: Masking
) -> Tensor:
    """`mask_noise` of a grid (rows, columns) whose `keep` smallest values leave a mask of the kind `masking`.

    random: any patches. block: rectangles are hidden, as in BEiT (area from 8 % of the grid to all that is to be
    hidden, sides 0.3 to 1 / 0.3), the last one cut to its first rows so that the count is exact. grid: one of every 2x2
    patches is kept, the same corner all over an image; what else the count asks for is drawn at random.
    """
    noise = mask_noise(seed, epochs, samples, grid[0] * grid[1])
    if masking == "random":
        return noise
    if masking == "grid":
        order = off_grid(seed, epochs, samples, grid) + noise.double() / 2
    else:
        order = block_order(seed, epochs, samples, grid, keep)
    _, hidden = split(order, keep)
    noise = (noise * 2**23).floor() / 2**23  # leaves float32 the bit that the halves need
    return (noise + torch.zeros_like(noise).scatter(1, hidden, 1.0)) / 2


def off_grid(seed: int, epochs: Tensor, samples: Tensor, grid: tuple[int, int]) -> Tensor:
    """0 for the corner that an image keeps of every 2x2 patches, else 1: (B, N) float64."""
    corner = rng.fold(seed ^ SHAPE_STREAM, samples, epochs) & 3  # (B,)
    place = torch.arange(grid[0] * grid[1], device=samples.device)
    return ((place // grid[1] % 2 * 2 + place % grid[1] % 2) != corner[:, None]).double()


def block_order(seed: int, epochs: Tensor, samples: Tensor, grid: tuple[int, int], keep: int) -> Tensor:
    """Larger for a patch that an earlier block hides: (B, N) float64. Exact arithmetic, so the same on any device."""
    (rows, columns), device, seed = grid, samples.device, seed ^ SHAPE_STREAM
    drawn = rng.fold(seed, samples[:, None], epochs[:, None], torch.arange(4 * BLOCKS, device=device))
    u = rng.uniform(drawn).double().unflatten(1, (BLOCKS, 4))
    most = rows * columns - keep
    least = min(LEAST * rows * columns, most)
    area = least + (most - least) * u[..., 0]
    aspect = torch.tensor(ASPECTS, dtype=torch.float64, device=device)[(u[..., 1] * len(ASPECTS)).long()]
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top, left = (u[..., 2] * (rows - height + 1)).floor(), (u[..., 3] * (columns - width + 1)).floor()
    row, column = (torch.arange(side, device=device) for side in grid)
    in_rows = (row >= top[..., None]) & (row < (top + height)[..., None])  # (B, BLOCKS, rows)
    in_columns = (column >= left[..., None]) & (column < (left + width)[..., None])
    covered = in_rows[..., :, None] & in_columns[..., None, :]  # (B, BLOCKS, rows, columns)
    block = torch.arange(BLOCKS, dtype=torch.uint8, device=device)[:, None, None]
    first = torch.where(covered, block, BLOCKS).amin(dim=1).flatten(1)  # (B, N); BLOCKS where none reaches
    place = torch.arange(rows * columns, device=device, dtype=torch.float64) / (rows * columns)
    anywhere = mask_noise(seed, epochs, samples, rows * columns).double()
    return -(first + torch.where(first < BLOCKS, place, anywhere))


def split(noise: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` patches of smallest noise and the others, each in order of noise (ties by place).

    `noise`: (B, N) float. Returns ids_keep (B, keep) and ids_mask (B, N - keep), int64.
    """
    order = noise.argsort(dim=1, stable=True)
    return order[:, :keep], order[:, keep:]
