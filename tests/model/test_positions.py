from math import cos, sin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_dist.model.positions import sincos_2d


def plain(dim: int, row: int, column: int) -> list[float]:
    """The formula, one place at a time: the column's half, then the row's; sines, then cosines."""
    quarter = dim // 4
    waves = [1 / 10000 ** (i / quarter) for i in range(quarter)]
    return [f(place * wave) for place in (column, row) for f in (sin, cos) for wave in waves]


@given(quarter=st.integers(1, 9), rows=st.integers(1, 5), columns=st.integers(1, 5), prefix=st.integers(0, 2))
def test_formula(quarter, rows, columns, prefix):
    dim = 4 * quarter
    table = sincos_2d(dim, rows, columns, prefix)
    places = [plain(dim, row, column) for row in range(rows) for column in range(columns)]
    expected = torch.tensor([[0.0] * dim] * prefix + places, dtype=torch.float64).float()
    assert table.dtype == torch.float32
    assert table.shape == (prefix + rows * columns, dim)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-7)


def test_class_row_is_zero_and_column_comes_first():
    table = sincos_2d(8, 2, 3)
    assert not table[0].any()
    places = table[1:].view(2, 3, 8)
    assert torch.equal(places[0, :, :4], places[1, :, :4])  # the first half knows the column only
    assert torch.equal(places[:, 0, 4:], places[:, 2, 4:])  # the second the row only
    assert not torch.equal(places[0, 0, :4], places[0, 1, :4])


def test_all_places_differ():
    table = sincos_2d(768, 14, 14)
    assert (torch.cdist(table, table) + torch.eye(197)).min() > 0.1


@pytest.mark.parametrize("dim", [6, 30, 1])
def test_width_must_be_a_multiple_of_four(dim):
    with pytest.raises(ValueError, match=f"multiple of 4, not {dim}"):
        sincos_2d(dim, 2, 2)
