"""Minimal filtering along one axis, compiled, against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

from tests.schedules.building import NAME, run
from topiarist.schedules.cpu import emit
from topiarist.schedules.cpu.minimal_filter import MOST_PRODUCTS, MinimalFilter
from topiarist.targets import registry

LANES = 4
FILTERS = [
    MinimalFilter(m, r)
    for m in (1, 2, 3, 4, 5)
    for r in (1, 2, 3, 4, 5, 6)
    if m + r - 1 <= MOST_PRODUCTS
]


def filter_prim_func(made: MinimalFilter) -> Any:
    """f(d [products, lanes], u [products], y [outputs, lanes])."""
    with emit.prim_func(NAME) as builder:
        d = emit.argument("d", made.products * LANES)
        u = emit.argument("u", made.products)
        y = emit.argument("y", made.outputs * LANES)
        read = [T.bind(d[emit.ramp(i * LANES, LANES)]) for i in range(made.products)]
        found = [
            T.bind(emit.splat(u[i], LANES) * value)
            for i, value in enumerate(made.input_transform(read, LANES))
        ]
        for i, value in enumerate(made.output_transform(found, LANES)):
            T.buffer_store(y, value, [emit.ramp(i * LANES, LANES)])
    return builder.get()


@pytest.mark.parametrize("made", FILTERS, ids=lambda f: f"{f.outputs}_of_{f.taps}")
def test_computes_a_correlation(made: MinimalFilter) -> None:
    random = np.random.default_rng(0)
    d = random.standard_normal((made.products, LANES)).astype(np.float32)
    g = random.standard_normal(made.taps)
    u = (made.weight_transform() @ g).astype(np.float32)
    y = np.zeros(made.outputs * LANES, np.float32)
    got = run(filter_prim_func(made), registry.get("x86-sse4"), d.ravel(), u, y)
    want = np.stack([g @ d[i : i + made.taps] for i in range(made.outputs)])
    assert np.abs(got.reshape(want.shape) - want).max() < 1e-5 * np.abs(want).max()


def test_knows_the_published_weight_transform() -> None:
    """G of F(2, 3), Lavin and Gray, equation 8, up to signs, which B^T cancels."""
    want = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    assert np.array_equal(np.abs(MinimalFilter(2, 3).weight_transform()), np.abs(want))


def test_is_exact_where_nothing_is_transformed() -> None:
    assert MinimalFilter(1, 3).added_error == 0.0
    assert MinimalFilter(2, 3).added_error < MinimalFilter(4, 3).added_error
