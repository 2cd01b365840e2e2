"""A candidate as numbers: all that its time depends on, from its record alone."""

from __future__ import annotations

import math

import numpy as np

from tests.tuning_logs.conftest import MakeRecord
from tests.tuning_logs.invented import make_what
from topiarist.tuning_logs.features import columns_of, features, table


def test_workload_knobs_layouts_and_target_become_numbers(record: MakeRecord) -> None:
    found = features(record(3, threads=2).input)
    wanted = {
        "kernel=direct_sparse": 1.0,
        "config.cols": 3.0,
        "workload.in_channels": 64.0,
        "workload.kernel.1": 3.0,
        "workload.sparsity.density": 0.1,
        "workload.sparsity.pattern=unstructured": 1.0,
        "input.sy": 2.0,
        "input.halo": 4.0,
        "output.tile_cols": 4.0,
        "isa=avx2": 1.0,
        "threads": 2.0,
        "residual": 0.0,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert "input.tile_rows" not in found
    assert found["log_macs"] == math.log(64 * 64 * 9 * 14 * 14)
    assert found["log_nonzeros"] == math.log(64 * 64 * 9 * 0.1)


def test_names_of_networks_and_machines_are_no_features(record: MakeRecord) -> None:
    assert features(record(device_model="One").input) == features(record(device_model="Two").input)


def test_other_workloads_and_plain_layouts_have_features(record: MakeRecord) -> None:
    workload = {"kind": "linear", "batch": 1, "inputs": 512, "outputs": 10, "activation": [0, None]}
    what = record(workload=workload, config={}, input_layout="plain", output_layout="plain").input
    found = features(what)
    assert found["input.plain"] == 1.0
    assert found["log_weights"] == math.log(5120)


def test_a_table_has_nan_where_a_row_has_no_number(record: MakeRecord) -> None:
    rows = [features(record(config={"rows": 2}).input), features(record(config={"q": 1}).input)]
    columns = columns_of(rows)
    values = table(rows, columns)
    assert values.shape == (2, len(columns)) and values.dtype == np.float32
    at = columns.index("config.q")
    assert math.isnan(values[0, at]) and values[1, at] == 1.0
    assert table([], columns).shape == (0, len(columns))


def test_zeros_count_where_they_are_skipped(record: MakeRecord) -> None:
    for kernel in ("direct_dense", "winograd_dense", "depthwise"):
        assert features(make_what(kernel, density=0.1)) == features(make_what(kernel, density=0.9))
    few, many = (features(make_what(density=density)) for density in (0.1, 0.4))
    names = ("log_loads", "log_weight_bytes", "log_busy", "log_nonzeros")
    assert all(few[name] < many[name] for name in names)
    assert few["log_macs"] == many["log_macs"]


def test_the_work_of_a_tiled_kernel() -> None:
    """64 -> 64 channels on 7 x 4 vectors, tiles of 1 x 4, blocks of two of each 32 channels."""
    n = features(make_what("direct_dense", rows=1, cols=4, out_block=2))
    tiles, rows = 7, 32
    assert n["log_columns"] == math.log(tiles * rows * 64 * 9)
    assert n["log_loads"] == math.log(tiles * rows * 64 * 9 * 4)
    assert n["log_fmas"] == math.log(tiles * rows * 64 * 9 * 4 * 2)
    assert n["log_visits"] == math.log(tiles * rows * 2)
    sparse = features(make_what(rows=1, cols=4, out_block=2, density=0.1))
    union = 1 - 0.9**2
    assert sparse["log_columns"] == math.log(tiles * rows * 64 * 9 * union)


def test_outputs_that_share_their_zeros_share_their_columns(record: MakeRecord) -> None:
    what = make_what("block_sparse", out_block=4, density=0.1)
    sparsity = {**what.sparsity, "pattern": "block4x1"}
    alike = record(workload={**what.workload, "sparsity": sparsity}, config=what.config).input
    assert features(alike)["log_columns"] < features(what)["log_columns"]


def test_numbers_that_make_no_sense_stay_finite(record: MakeRecord) -> None:
    """A log may have been edited by hand."""
    what = make_what()
    strange = [
        record(config={"rows": 0, "cols": -1, "out_block": 0, "in_block": 0}).input,
        record(config={"rows": 1, "cols": 2, "out_block": 1e300, "in_block": 1e-300}).input,
        record(kernel="winograd_dense", config={"rows": 4}).input,
        record(workload={"in_channels": 0, "groups": 0, "kernel": "3"}).input,
        record(workload={**what.workload, "sparsity": {"density": 7.5}}).input,
        record(workload={**what.workload, "in_channels": 1e308, "out_channels": 1e308}).input,
        record(workload={"kind": "pool", "read_bytes": 1}).input,
        record(input_layout="lanes(9x9)", output_layout="?").input,
    ]
    rows = [features(what) for what in strange]
    values = table(rows, columns_of(rows))
    assert not np.isinf(values).any()
    at = columns_of(rows).index("log_bytes_moved")
    assert np.isfinite(values[:, at]).all()
