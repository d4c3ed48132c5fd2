"""Fixed two-dimensional sine-cosine position tables (paper appendix A.1; MoCo v3)."""

import torch
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
