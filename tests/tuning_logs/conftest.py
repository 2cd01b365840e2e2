"""Records of invented measurements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from topiarist.schedules.workload import ConvWorkload, SparsitySignature
from topiarist.tuning_logs.record import MeasureInput, TargetKey, TuningRecord

MakeRecord = Callable[..., TuningRecord]


def make_record(number: int = 0, us: float = 100.0, **changes: Any) -> TuningRecord:
    """A record; `number` goes into the knobs, `changes` are fields of record, input or target."""
    target = {
        name: changes.pop(name, value)
        for name, value in {
            "family": "x86",
            "isa": "avx2",
            "lanes": 8,
            "device_model": "Some CPU @ 2.10GHz",
            "threads": 1,
            "cores": "",
        }.items()
    }
    size = changes.pop("size", 14)
    what = {
        name: changes.pop(name, value)
        for name, value in {
            "workload": make_workload(size).to_json(),
            "kernel": "direct_sparse",
            "kernel_version": 1,
            "config": {"rows": 1, "cols": number, "out_block": 1, "in_block": 32},
            "input_layout": "lanes(14x14@2x4:7x4 halo(1, 1, 1, 1)) channels 64 of 64",
            "output_layout": "lanes(14x14@2x4:7x4 tile1x4) channels 64 of 64",
            "residual_layout": "none",
            "versions": {"topiarist": "0.1.0", "apache-tvm": "0.27.0", "apache-tvm-ffi": "0.1.14"},
        }.items()
    }
    if changes.get("status", "ok") == "ok":
        changes.setdefault("seconds", tuple(us * 1e-6 * (1 + i / 100) for i in range(7)))
    changes.setdefault("timestamp", "2026-01-31T12:00:00Z")
    return TuningRecord(MeasureInput(**what, target=TargetKey(**target)), **changes)


def make_workload(size: int = 14) -> ConvWorkload:
    """A sparse 3x3 layer on a plane of `size`."""
    sparsity = SparsitySignature(0.1, "unstructured", (10, 29, 40))
    return ConvWorkload(
        *(1, 64, size, size, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, sparsity, (0.0, None))
    )


@pytest.fixture
def record() -> MakeRecord:
    """`make_record`."""
    return make_record


@pytest.fixture
def workload() -> Callable[..., ConvWorkload]:
    """`make_workload`."""
    return make_workload
