"""A candidate as numbers: all that its time depends on, from its record alone."""

from __future__ import annotations

import math

import numpy as np

from tests.tuning_logs.conftest import MakeRecord
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
