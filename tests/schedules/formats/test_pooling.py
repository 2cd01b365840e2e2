"""Pooling of sparse activations against float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.schedules import references
from tests.schedules.building import NAME, relative_error
from tests.schedules.formats.operators import DENSITIES, build, poisoned, sparse, to_rows
from topiarist.schedules.formats.pooling import Pool, pool_prim_func
from topiarist.schedules.formats.tensors import FloatArray

POOLS = {
    "vgg": Pool("max", (4, 8, 14), (2, 2), (2, 2), (0, 0)),
    "resnet": Pool("max", (4, 9, 8), (3, 3), (2, 2), (1, 1)),
    "average": Pool("avg", (4, 9, 8), (3, 2), (2, 1), (1, 0)),
    "global": Pool("avg", (6, 7, 7), (7, 7), (1, 1), (0, 0)),
}


def _reference(pool: Pool, x: FloatArray) -> NDArray[np.float64]:
    """Windows with NaN for padding, which NumPy leaves out."""
    (top, left) = pool.padding
    seen = references.windows(
        x[None], pool.kernel, pool.strides, (top, left, top, left), fill=np.nan
    )[0]
    reduce = np.nanmax if pool.mode == "max" else np.nanmean
    result: NDArray[np.float64] = reduce(seen, axis=(3, 4))
    return result


@pytest.mark.parametrize("name", POOLS)
def test_agrees_with_the_reference(name: str) -> None:
    """Zeros that are not stored count: windows of negative values have them as maximum."""
    pool = POOLS[name]
    operator = build(pool_prim_func(NAME, pool, 2))
    for density, negative in product(DENSITIES, (False, True)):
        x = sparse(np.random.default_rng(5), density, *pool.shape)
        x = -np.abs(x) if negative else x
        got = to_rows(operator, pool.output, *poisoned(x).buffers)
        assert relative_error(got.to_dense(), _reference(pool, x)) < 1e-6


def test_padding_beyond_the_kernel_is_refused() -> None:
    """It would leave windows empty."""
    with pytest.raises(ValueError, match=r"padding \(2, 0\) must be less than the kernel \(2, 2\)"):
        pool_prim_func(NAME, Pool("max", (1, 4, 4), (2, 2), (2, 2), (2, 0)), 1)
