"""The comparison with Park et al.'s kernel runs both kernels, and what it makes of their times."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from tests.benchmarks import bench_park, layers
from tests.benchmarks.bench_park import Row
from topiarist.targets import registry

ROW = Row("layer", 0.5, "direct_sparse", 300, 100, 3, 2.9, 3.1, 40, 120, 180)


def test_alpha_is_the_rate_of_blas_over_that_on_nonzeros() -> None:
    """Of both kernels."""
    assert ROW.alphas == (4.5, 1.5)


def test_both_kernels_run() -> None:
    """On a small layer, with the rate that belongs to the time."""
    shape = layers.Shape(channels=8, size=8, filters=8, kernel=3, groups=2)
    weight = layers.weights(shape, "unstructured", 0.25)
    target = registry.get(registry.HOST)
    row = bench_park.time_layer("small", shape, weight, layers.is_sparse, 0.01, target)
    assert layers.is_sparse(row.kernel)
    assert row.density == 0.25
    flops = 2 * np.count_nonzero(weight) * 64
    assert row.park_gflops == pytest.approx(flops / row.park_us / 1e3)
    assert row.low <= row.speedup <= row.high


def test_tables_name_what_counts() -> None:
    """Layers, ratios, alphas and their means."""
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(bench_park.comparison_table([ROW]), bench_park.alpha_table([ROW]))
    text = console.export_text()
    for words in ("direct_sparse", "3.00 (2.90 - 3.10)", "50.0%", "4.50", "1.50"):
        assert words in text
