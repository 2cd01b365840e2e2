"""Records as tables: one row for each record, or for each place that kernels compete for."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from topiarist.targets.gpu_state import GpuState
from topiarist.tuning_logs.record import Measured, TuningRecord
from topiarist.tuning_logs.store import most_credible

COLUMNS = (
    *("id", "measurement_key", "workload_key", "workload", "density", "pattern"),
    *("kernel", "kernel_version", "config", "input_layout", "output_layout", "residual_layout"),
    *("family", "isa", "lanes", "device_model", "threads", "cores"),
    *("topiarist", "apache_tvm", "apache_tvm_ffi"),
    *("measured", "status", "message", "run_us", "min_us", "max_us", "repeats", "drift"),
    *("reference_us", "sm_mhz", "memory_mhz", "driver", "cuda", "timestamp"),
)


def row(record: TuningRecord) -> dict[str, Any]:
    """A record flat, by `COLUMNS`; times are microseconds, None without a valid one."""
    what = record.input
    ok = record.status == "ok"
    return {
        "id": record.id,
        "measurement_key": record.measurement_key,
        "workload_key": what.workload_key,
        "workload": workload_text(what.workload),
        "density": what.sparsity.get("density"),
        "pattern": what.sparsity.get("pattern"),
        "kernel": what.kernel,
        "kernel_version": what.kernel_version,
        "config": json.dumps(what.config, sort_keys=True),
        "input_layout": what.input_layout,
        "output_layout": what.output_layout,
        "residual_layout": what.residual_layout,
        **asdict(what.target),
        **{name.replace("-", "_"): version for name, version in what.versions.items()},
        "measured": record.measured,
        "status": record.status,
        "message": record.message,
        "run_us": record.run_us if ok else None,
        "min_us": min(record.seconds) * 1e6 if ok else None,
        "max_us": max(record.seconds) * 1e6 if ok else None,
        "repeats": len(record.seconds),
        "drift": record.drift,
        "reference_us": record.reference_us,
        **asdict(record.gpu or GpuState()),
        "timestamp": record.timestamp,
    }


def write_csv(records: Iterable[TuningRecord], file: TextIO) -> int:
    """Write a header and one row for each record; returns how many records there were."""
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    count = 0
    for record in records:
        writer.writerow(row(record))
        count += 1
    return count


def workload_text(workload: Mapping[str, Any]) -> str:
    """`64x56x56 3x3 -> 128, stride 2`; of what is no convolution, the plain values."""
    try:
        (kh, kw), (sy, sx) = workload["kernel"], workload["strides"]
        size = f"{workload['in_channels']}x{workload['height']}x{workload['width']}"
        extra = [
            f", batch {workload['batch']}" * (workload["batch"] != 1),
            f", stride {sy}x{sx}" * ((sy, sx) != (1, 1)),
            f", groups {workload['groups']}" * (workload["groups"] != 1),
            ", residual" * bool(workload["residual"]),
        ]
        return f"{size} {kh}x{kw} -> {workload['out_channels']}" + "".join(extra)
    except (KeyError, TypeError, ValueError):
        plain = (f"{k} {v}" for k, v in sorted(workload.items()) if not isinstance(v, list | dict))
        return ", ".join(plain)[:80]


@dataclass(frozen=True)
class Contest:
    """What is known of one workload on one target, in one way of measuring, in all layouts.

    `failed` counts measurements without a valid time. `run_us` and `kernel` are of the fastest,
    None if all failed; `newest` is a timestamp.
    """

    workload_key: str
    workload: str
    density: float | None
    pattern: str | None
    target: str
    measured: Measured
    records: int
    candidates: int
    failed: int
    run_us: float | None
    kernel: str | None
    newest: str


def contests(records: Iterable[TuningRecord]) -> list[Contest]:
    """Records by workload and target, in the order in which the workloads were first met."""
    groups: dict[tuple[str, str, Measured], list[TuningRecord]] = defaultdict(list)
    for record in records:
        what = record.input
        groups[what.workload_key, what.target_key, record.measured].append(record)
    return [_contest(group) for group in groups.values()]


def _contest(records: list[TuningRecord]) -> Contest:
    repeats: dict[str, list[TuningRecord]] = defaultdict(list)
    for record in records:
        repeats[record.measurement_key].append(record)
    counting = [most_credible(group) for group in repeats.values()]
    best = min(counting, key=lambda record: record.run_us)
    what = best.input
    return Contest(
        workload_key=what.workload_key,
        workload=workload_text(what.workload),
        density=what.sparsity.get("density"),
        pattern=what.sparsity.get("pattern"),
        target=what.target_key,
        measured=best.measured,
        records=len(records),
        candidates=len(counting),
        failed=sum(record.status != "ok" for record in counting),
        run_us=best.run_us if best.status == "ok" else None,
        kernel=what.kernel if best.status == "ok" else None,
        newest=max(record.timestamp for record in records),
    )
