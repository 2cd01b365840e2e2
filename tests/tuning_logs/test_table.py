"""Records as rows, and workloads with their fastest kernels."""

from __future__ import annotations

import csv
import io
import json

import pytest

from topiarist.tuning_logs.table import COLUMNS, contests, row, workload_text, write_csv


def test_csv_has_a_row_for_each_record(record):
    records = [
        record(1),
        record(2, status="crash", message='signal 11,\n"badly"'),
        record(3, device_model='A, "B"', drift=1.25),
    ]
    text = io.StringIO()
    assert write_csv(records, text) == 3
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 3
    assert [r["id"] for r in rows] == [r.id for r in records]
    assert float(rows[0]["run_us"]) == records[0].run_us
    assert json.loads(rows[0]["config"]) == records[0].input.config
    assert (rows[0]["workload"], rows[0]["density"]) == ("64x14x14 3x3 -> 64", "0.1")
    assert (rows[1]["run_us"], rows[1]["message"]) == ("", 'signal 11,\n"badly"')
    assert (rows[2]["device_model"], rows[2]["drift"]) == ('A, "B"', "1.25")


def test_columns_are_those_of_a_row(record):
    assert tuple(row(record())) == COLUMNS


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "64x14x14 3x3 -> 64"),
        ({"strides": [2, 2], "batch": 4}, "64x14x14 3x3 -> 64, batch 4, stride 2x2"),
        ({"groups": 64, "residual": True}, "64x14x14 3x3 -> 64, groups 64, residual"),
    ],
    ids=str,
)
def test_the_text_of_a_workload(workload, change, text):
    values = json.loads(json.dumps(workload().to_json())) | change
    assert workload_text(values) == text


def test_the_text_of_any_other_workload():
    assert workload_text({"kind": "linear", "inputs": 2048, "list": [1]}) == (
        "inputs 2048, kind linear"
    )


def test_contests_count_and_name_the_fastest(record):
    records = [
        record(1, us=50.0),
        record(2, us=40.0, kernel="direct_dense"),
        record(2, us=90.0, kernel="direct_dense", timestamp="2026-02-01T00:00:00Z"),
        record(3, status="timeout", message="2 s"),
        record(1, us=1.0, measured="in network"),
        record(1, us=1.0, device_model="Another"),
        record(1, status="crash", message="no", size=7),
    ]
    first, network, other, failed = contests(records)
    assert (first.records, first.candidates, first.failed) == (4, 3, 1)
    assert (first.kernel, first.run_us) == ("direct_sparse", records[0].run_us)
    assert (first.density, first.pattern, first.newest) == (
        *(0.1, "unstructured"),
        "2026-02-01T00:00:00Z",
    )
    assert network.measured == "in network" and "Another" in other.target
    assert (failed.kernel, failed.run_us, failed.failed) == (None, None, 1)
