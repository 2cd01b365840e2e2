"""Compression, ReLU, sums and concatenation of sparse activations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tests.schedules.building import NAME, bits, distinct_nans
from tests.schedules.formats.operators import DENSITIES, build, poisoned, sparse, to_rows
from topiarist.schedules.formats.rows import (
    add_prim_func,
    compress_prim_func,
    concat_prim_func,
    expand_prim_func,
    relu_prim_func,
)
from topiarist.schedules.formats.tensors import FloatArray

SHAPE = (6, 5, 9)


def _activation(density: float, seed: int = 0) -> FloatArray:
    return sparse(np.random.default_rng(seed), density, *SHAPE)


def _relu(x: FloatArray) -> FloatArray:
    return np.where(x <= 0, np.float32(0), x)


@pytest.mark.parametrize("relu", [False, True])
def test_compress(relu: bool) -> None:
    """What is not zero stays, NaN included."""
    compress = build(compress_prim_func(NAME, SHAPE, relu=relu, threads=2))
    for density in DENSITIES:
        x = _activation(density)
        x[1, 2, 3:5] = np.nan, -0.0
        got = to_rows(compress, SHAPE, x.ravel())
        want = _relu(x) if relu else x + np.float32(0)
        assert np.array_equal(bits(got.to_dense()), bits(want))
        assert got.counts.sum() == np.count_nonzero(want)


def test_expand() -> None:
    """Bit by bit, -0.0 included."""
    expand = build(expand_prim_func(NAME, SHAPE, 2))
    for density in DENSITIES:
        x = _activation(density)
        x[1, 2, 3:5] = np.nan, -0.0
        got = expand(*poisoned(x).buffers, distinct_nans(x.size))[0]
        assert np.array_equal(bits(got.reshape(SHAPE)), bits(x))


def test_relu() -> None:
    """Rows become shorter; NaN stays."""
    relu = build(relu_prim_func(NAME, SHAPE, 1))
    for density in DENSITIES:
        x = _activation(density)
        x[1, 2, 3] = np.nan
        got = to_rows(relu, SHAPE, *poisoned(x).buffers)
        assert np.array_equal(bits(got.to_dense()), bits(_relu(x)))
        assert got.counts.sum() == np.count_nonzero(_relu(x))


@pytest.mark.parametrize("relu", [False, True])
def test_a_sum_is_the_union_of_rows(relu: bool) -> None:
    """In either order; what cancels is not stored."""
    add = build(add_prim_func(NAME, SHAPE, relu=relu, threads=1))
    for density, other in product(DENSITIES, DENSITIES):
        a, b = _activation(density), _activation(other, seed=1)
        b[2] = -a[2]
        a[1, 2, 3] = np.nan
        want = _relu(a + b) if relu else a + b
        for pair in ((a, b), (b, a)):
            got = to_rows(add, SHAPE, *(buffer for x in pair for buffer in poisoned(x).buffers))
            assert np.array_equal(bits(got.to_dense()), bits(want))
            assert got.counts.sum() == np.count_nonzero(want)


def test_concatenation() -> None:
    """Of three parts."""
    shapes = tuple((channels, *SHAPE[1:]) for channels in (1, 2, 3))
    concat = build(concat_prim_func(NAME, shapes, 1))
    for density in DENSITIES:
        parts = [_activation(density, seed)[: seed + 1] for seed in range(3)]
        inputs = [buffer for part in parts for buffer in poisoned(part).buffers]
        got = to_rows(concat, SHAPE, *inputs)
        assert np.array_equal(bits(got.to_dense()), bits(np.concatenate(parts)))


def test_planes_of_other_sizes_are_refused() -> None:
    """With their sizes."""
    with pytest.raises(ValueError, match="planes of one size"):
        concat_prim_func(NAME, ((1, 2, 3), (1, 2, 4)), 1)
