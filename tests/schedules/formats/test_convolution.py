"""Convolutions on sparse tensors against float64, and their multiply-adds counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.schedules import references
from tests.schedules.building import relative_error
from tests.schedules.formats.operators import (
    DENSITIES,
    ORDERS,
    Convolutions,
    sparse,
    workload_of,
)
from topiarist.schedules.formats.convolution import sparse_dense_prim_func
from topiarist.schedules.formats.tensors import FloatArray
from topiarist.schedules.workload import ConvWorkload

TOLERANCE = 1e-5
# Weight [O, C / groups, kh, kw], plane, and the rest: layers of VGG16 and of ResNets, made small.
LAYERS: dict[str, tuple[tuple[int, int, int, int], tuple[int, int], dict[str, Any]]] = {
    "vgg_3x3": ((8, 6, 3, 3), (14, 14), {"activation": (0.0, None)}),
    "resnet_1x1": ((12, 8, 1, 1), (7, 7), {"padding": (0,) * 4}),
    "resnet_1x1_stride_2": ((6, 8, 1, 1), (7, 8), {"padding": (0,) * 4, "strides": (2, 2)}),
    "resnet_7x7_stride_2": ((4, 3, 7, 7), (17, 16), {"padding": (3,) * 4, "strides": (2, 2)}),
    "dilated_groups": (
        (6, 2, 3, 2),
        (9, 11),
        {"dilation": (2, 3), "groups": 3, "padding": (1, 0, 2, 3), "strides": (1, 2)},
    ),
    "linear": ((10, 40, 1, 1), (1, 1), {"padding": (0,) * 4}),
    "linear_on_a_picture": ((10, 4, 5, 5), (5, 5), {"padding": (0,) * 4}),
}


def _operands(name: str, density: float) -> tuple[ConvWorkload, FloatArray, FloatArray, FloatArray]:
    """workload, activation [C, H, W], weight, bias; both operands have the density."""
    shape, plane, rest = LAYERS[name]
    rng = np.random.default_rng(3)
    weight = sparse(rng, density, *shape)
    workload = workload_of(weight, plane, **rest)
    x = sparse(rng, density, workload.in_channels, *plane)
    return workload, x, weight, rng.standard_normal(shape[0]).astype(np.float32)


def _reference(w: ConvWorkload, x: FloatArray, weight: FloatArray, bias: FloatArray) -> Any:
    return references.conv(w, x[None], weight, bias, None)[0]


def _pairs(w: ConvWorkload, x: FloatArray, weight: FloatArray) -> NDArray[np.int64]:
    """How many nonzeros of each filter meet a nonzero pixel: a convolution of the patterns."""
    ones = [(a != 0).astype(np.float32) for a in (x, weight)]
    linear = replace(w, activation=(None, None))
    met = _reference(linear, ones[0], ones[1], np.zeros(w.out_channels, np.float32))
    return met.sum(axis=(1, 2)).round().astype(np.int64)


@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_agree_with_the_reference(name: str) -> None:
    """At all densities, in both orders; exactly the matching pairs are multiplied."""
    built = Convolutions.build(_operands(name, 1.0)[0])
    for density in DENSITIES:
        workload, x, weight, bias = _operands(name, density)
        want = _reference(workload, x, weight, bias)
        assert relative_error(built.by_dense(x, weight, bias), want) < TOLERANCE
        for order in ORDERS:
            got, pairs = built.by_sparse(order, x, weight, bias)
            assert relative_error(got, want) < TOLERANCE
            assert np.array_equal(pairs, _pairs(workload, x, weight))


def test_threads_share_the_filters() -> None:
    """And none is left out."""
    workload, x, weight, bias = _operands("vgg_3x3", 0.5)
    built = Convolutions.build(workload, threads=2)
    want = _reference(workload, x, weight, bias)
    assert relative_error(built.by_dense(x, weight, bias), want) < TOLERANCE
    assert relative_error(built.by_sparse("weights", x, weight, bias)[0], want) < TOLERANCE


def test_a_nan_that_no_nonzero_sees_stays_alone() -> None:
    """A product with a zero that is not stored is not made."""
    workload, x, weight, bias = _operands("resnet_1x1", 0.5)
    x[2], weight[:, 2] = np.nan, 0
    built = Convolutions.build(workload)
    assert np.isfinite(built.by_dense(x, weight, bias)).all()
    assert np.isfinite(built.by_sparse("pixels", x, weight, bias)[0]).all()


def test_batches_and_residuals_are_refused() -> None:
    """With what to do instead."""
    workload = _operands("vgg_3x3", 0.5)[0]
    for wrong in (replace(workload, batch=2), replace(workload, residual=True)):
        with pytest.raises(ValueError, match="one image and no residual: call them once"):
            sparse_dense_prim_func("f", wrong, 1)
