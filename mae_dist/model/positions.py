"""Fixed two-dimensional sine-cosine position tables (paper appendix A.1; MoCo v3)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_2d(dim: int, rows: int, columns: int, prefix_tokens: int = 1) -> Tensor:
    """Positions of a rows x columns grid after `prefix_tokens` zero rows, (prefix + rows*columns, dim) float32.

    Each place holds [sin(x w), cos(x w), sin(y w), cos(y w)] with w_i = 10000^(-i / (dim/4)): the column (x) half
    first, as in every released MAE checkpoint. Computed in float64. Raises ValueError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"2-D sine-cosine positions need a width that is a multiple of 4, not {dim}")
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    x_angles = x.reshape(-1, 1) * frequencies  # (N, dim/4)
    y_angles = y.reshape(-1, 1) * frequencies
    table = torch.cat([x_angles.sin(), x_angles.cos(), y_angles.sin(), y_angles.cos()], dim=1)
    return torch.cat([torch.zeros(prefix_tokens, dim, dtype=torch.float64), table]).float()


def resized(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> tuple[Tensor, str]:
    """A table for another grid, and how it was made: (1, 1+N, D) of `old` (rows, columns) to (1, 1+N', D) of `new`.

    A fixed sine-cosine table is "recomputed", any other "interpolated" (bicubic over the two-dimensional grid, without
    antialiasing, as the paper's code does); the class token's row stays. The same grid is "kept".
    """
    if old == new:
        return table, "kept"
    dim = table.shape[-1]
    if dim % 4 == 0 and torch.allclose(table[0].float(), sincos_2d(dim, *old).to(table.device), rtol=0, atol=1e-4):
        return sincos_2d(dim, *new)[None].to(table), "recomputed"
    grid = table[:, 1:].float().unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table)], dim=1), "interpolated"
