import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.model.patches import Patchify, Unpatchify, patchify, unpatchify

SIDES = st.integers(1, 4)


@given(b=st.integers(1, 3), c=SIDES, rows=SIDES, columns=SIDES, p=st.integers(1, 5), seed=st.integers(0, 99))
def test_inverses(b, c, rows, columns, p, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(b, c, rows * p, columns * p, generator=generator)
    patches = patchify(images, p)
    assert patches.shape == (b, rows * columns, p * p * c)
    assert torch.equal(unpatchify(patches, p, rows * p, columns * p), images)
    other = torch.randn(patches.shape, generator=generator)
    assert torch.equal(patchify(unpatchify(other, p, rows * p, columns * p), p), other)


@given(c=SIDES, rows=SIDES, columns=SIDES, p=st.integers(1, 5))
def test_order(c, rows, columns, p):
    """Patches go row by row; inside one, the row, then the column, then the channel."""
    images = torch.arange(c * rows * p * columns * p).view(1, c, rows * p, columns * p)
    expected = [
        [
            int(images[0, channel, row * p + y, column * p + x])
            for y in range(p)
            for x in range(p)
            for channel in range(c)
        ]
        for row in range(rows)
        for column in range(columns)
    ]
    assert patchify(images, p)[0].tolist() == expected


def test_layers():
    images = torch.randn(2, 3, 8, 12)
    patches = Patchify(4)(images)
    assert torch.equal(patches, patchify(images, 4))
    assert torch.equal(Unpatchify(4, 8, 12)(patches), images)


@pytest.mark.parametrize(("height", "width"), [(30, 32), (32, 30)])
def test_patchify_names_the_sizes(height, width):
    with pytest.raises(ValueError, match=rf"{height}x{width} .* 8x8"):
        patchify(torch.zeros(1, 3, height, width), 8)


@pytest.mark.parametrize(("height", "width"), [(8, 16), (12, 8), (10, 8)])
def test_unpatchify_names_the_sizes(height, width):
    with pytest.raises(ValueError, match=rf"4 patches of 4x4 do not tile .* {height}x{width}"):
        unpatchify(torch.zeros(1, 4, 48), 4, height, width)
