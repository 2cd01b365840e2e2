"""Sparse tensors keep every bit of the dense ones that they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from tests.schedules.building import bits
from tests.schedules.formats.operators import DENSITIES, sparse
from topiarist.schedules.formats.tensors import FloatArray, SparseActivation, SparseWeight

SPECIAL = np.array([np.nan, -0.0, np.inf, -np.inf, 1e-45, 0.0], np.float32)


def _values(density: float, *shape: int) -> FloatArray:
    values = sparse(np.random.default_rng(0), density, *shape)
    values.ravel()[: len(SPECIAL)] = SPECIAL
    return values


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (1, 7, 1, 1), (4, 1, 2, 5)])
def test_a_weight_comes_back_bit_by_bit(shape: tuple[int, ...], density: float) -> None:
    """Empty filters and full ones, NaN and -0.0."""
    weight = _values(density, *shape)
    made = SparseWeight.from_dense(weight)
    assert np.array_equal(bits(made.to_dense()), bits(weight))
    assert len(made.values) == np.count_nonzero(bits(weight))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(3, 4, 7), (6, 1, 1), (1, 5, 2)])
def test_an_activation_comes_back_bit_by_bit(shape: tuple[int, ...], density: float) -> None:
    """Empty rows and full ones, NaN and -0.0; columns ascend."""
    activation = _values(density, *shape)
    made = SparseActivation.from_dense(activation)
    assert np.array_equal(bits(made.to_dense()), bits(activation))
    assert made.density == np.count_nonzero(bits(activation)) / activation.size
    for count, columns in zip(made.counts, made.columns, strict=True):
        assert (np.diff(columns[:count]) > 0).all()


def test_a_filter_is_a_row_of_a_csr_matrix() -> None:
    """Taps count through channels, lines and columns of the kernel."""
    weight = np.zeros((2, 3, 2, 2), np.float32)
    weight[0, 1, 0, 1], weight[0, 2, 1, 1], weight[1, 0, 1, 0] = 5, 6, 7
    made = SparseWeight.from_dense(weight)
    assert made.starts.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert made.taps.tolist() == [5, 11, 2]
    assert made.values.tolist() == [5, 6, 7]


def test_other_ranks_are_refused() -> None:
    """With the shape in the message."""
    with pytest.raises(ValueError, match=r"\[O, C, kh, kw\], got \[2, 3\]"):
        SparseWeight.from_dense(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"\[C, H, W\], got \[1, 2, 3, 4\]"):
        SparseActivation.from_dense(np.zeros((1, 2, 3, 4), np.float32))
