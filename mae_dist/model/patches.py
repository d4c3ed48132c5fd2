"""Images as sequences of patches, and back."""

from torch import Tensor, nn


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut (B, C, H, W) into (B, N, p*p*C), N = (H/p)*(W/p) in row-major order.

    Within a patch the order is (row, column, channel), as in the official code, so targets and predictions compare.
    Raises ValueError when H or W is not a multiple of p.
    """
    b, c, height, width = images.shape
    p = patch_size
    if height % p or width % p:
        raise ValueError(f"an image of {height}x{width} does not divide into patches of {p}x{p}")
    x = images.reshape(b, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (height // p) * (width // p), p * p * c)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The exact inverse of `patchify`: (B, N, p*p*C) to (B, C, height, width)."""
    b, n, values = patches.shape
    p = patch_size
    rows, columns = height // p, width // p
    if rows * columns != n or height % p or width % p:
        raise ValueError(f"{n} patches of {p}x{p} do not tile an image of {height}x{width}")
    c = values // (p * p)
    x = patches.reshape(b, rows, columns, p, p, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, height, width)


class Patchify(nn.Module):
    """`patchify` as a layer: (B, C, H, W) to (B, N, p*p*C)."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        return patchify(images, self.patch_size)


class Unpatchify(nn.Module):
    """`unpatchify` as a layer: (B, N, p*p*C) to (B, C, H, W)."""

    def __init__(self, patch_size: int, height: int, width: int):
        super().__init__()
        self.patch_size, self.height, self.width = patch_size, height, width

    def forward(self, patches: Tensor) -> Tensor:
        return unpatchify(patches, self.patch_size, self.height, self.width)
