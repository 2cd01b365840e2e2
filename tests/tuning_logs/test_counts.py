"""What kernels have to do, counted by hand."""

from __future__ import annotations

import pytest

from tests.tuning_logs.conftest import MakeRecord
from tests.tuning_logs.invented import make_what
from topiarist.tuning_logs.counts import FAR_BYTES, beyond, counts
from topiarist.tuning_logs.features import features


def test_what_a_cache_holds_is_not_beyond_it() -> None:
    assert beyond(0, 100) < 1e-5
    assert beyond(100, 100) == pytest.approx(0.5)
    assert beyond(1000, 100) > 0.99


def test_activations_in_lines() -> None:
    """64 channels of 7 x 4 vectors of 8 lanes, in and out."""
    found = counts(features(make_what(side=14)))
    assert found["lines_read"] == found["lines_written"] == 64 * 7 * 4 * 8 * 4 / 64
    assert found["far_lines_read"] < 1
    wide = counts(features(make_what(inputs=1024, side=112)))
    assert wide["far_lines_read"] > 0.9 * wide["lines_read"]
    assert wide["lines_read"] * 64 > FAR_BYTES


def test_depthwise_loads_each_vector_once_per_tile(record: MakeRecord) -> None:
    what = make_what("depthwise", inputs=32, outputs=32, rows=2, cols=4)
    knobs = {"rows": 2, "cols": 4, "unrolled": True}
    depthwise = record(
        kernel="depthwise",
        workload={**what.workload, "groups": 32},
        config=knobs,
        input_layout=what.input_layout,
        output_layout=what.output_layout,
    ).input
    found = counts(features(depthwise))
    tiles = 32 * 7 * 4 / 8
    assert found["tiles"] == tiles
    assert found["fmas"] == tiles * 8 * 9
    assert found["loads"] == tiles * 4 * 6


def test_winograd_rounds_tiles_up(record: MakeRecord) -> None:
    """7 x 4 vectors in tiles of 2 x 2: eight of them."""
    what = make_what("winograd_dense")
    knobs = {"rows": 2, "cols": 2, "tiles": 4, "block_tiles": 2, "out_block": 8}
    winograd = record(
        kernel="winograd_dense",
        workload=what.workload,
        config=knobs,
        input_layout=what.input_layout,
        output_layout=what.output_layout,
    ).input
    found = counts(features(winograd))
    assert found["fmas"] == 16 * 8 * 64 * 64
    assert found["columns"] == 16 * 8 * 64 * 64 / 16
    assert found["transformed_in"] == 16 * 8 * 64


def test_winograd_counts_phases_of_a_stride(record: MakeRecord) -> None:
    """A 7x7 window of stride 2 is four of 4x4 taps."""
    what = make_what("winograd_dense")
    knobs = {"rows": 4, "cols": 4, "tiles": 2, "block_tiles": 2, "out_block": 8}
    winograd = record(
        kernel="winograd_dense",
        workload={**what.workload, "kernel": [7, 7], "strides": [2, 2]},
        config=knobs,
        input_layout=what.input_layout,
        output_layout=what.output_layout,
    ).input
    found = counts(features(winograd))
    tiles = 2 * 1  # of 7 x 4 vectors
    assert found["fmas"] == 49 * tiles * (4 * 64) * 64
    assert found["transformed_in"] == 49 * tiles * (4 * 64)
