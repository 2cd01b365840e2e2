"""A candidate as plain numbers: what a model of its time is trained on.

Everything is taken from a `MeasureInput`, so that a log alone is enough to train from. What a
candidate lacks (another kernel's knob, say) is left out and becomes NaN in a table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.targets.gpu import Gpu
from topiarist.tuning_logs.counts import counts
from topiarist.tuning_logs.gpu_counts import gpu_counts, gpu_of
from topiarist.tuning_logs.record import MeasureInput

Features = Mapping[str, float]
VERSION = 3  # of the features: raised when a name or its meaning changes
GPU_VERSION = 5  # the same on GPUs, which have counts of their own

_SKIP_ZEROS = frozenset(
    {
        *("direct_sparse", "block_sparse", "block8_sparse", "dynamic_conv"),
        *("cuda_sparse", "cuda_compiled", "cuda_sparse_mma", "sparse_linear"),
    }
)
LOG = "log_"  # begins the names of counts
_LARGEST = float(np.finfo(np.float32).max)

_LAYOUT = re.compile(
    r"lanes\((?P<height>\d+)x(?P<width>\d+)@(?P<sy>\d+)x(?P<sx>\d+):(?P<rows>\d+)x(?P<cols>\d+) "
    r"(?:tile(?P<tile_rows>\d+)x(?P<tile_cols>\d+)|halo\((?P<halo>[\d, ]+)\))\)"
    r" channels (?P<count>\d+) of (?P<stored>\d+)"
)


def features(what: MeasureInput) -> dict[str, float]:
    """The numbers of a candidate, by name; counts of work are logarithms.

    Kernels that skip no zeros take the same time whatever the zeros are, so those are left out.
    """
    found = {f"kernel={what.kernel}": 1.0, "kernel_version": float(what.kernel_version)}
    skips = what.kernel in _SKIP_ZEROS
    workload = {k: v for k, v in what.workload.items() if skips or k != "sparsity"}
    found |= _numbers("workload", workload)
    found |= _numbers("config", what.config)
    for place, text in (("input", what.input_layout), ("output", what.output_layout)):
        found |= _layout(place, text)
    found["residual in place"] = float(what.residual_layout == "in place")
    found["residual"] = float(what.residual_layout != "none")
    found["lanes"], found["threads"] = float(what.target.lanes), float(what.target.threads)
    found[f"isa={what.target.isa}"] = 1.0
    return found | _work(found, gpu_of(what.target.family, what.target.isa))


def version(family: str) -> int:
    """The version of the features of a family's candidates."""
    return GPU_VERSION if family == "cuda" else VERSION


def table(rows: Sequence[Features], columns: Sequence[str]) -> NDArray[np.float32]:
    """[rows, columns], NaN where a row has no such number; all others are finite."""
    values = [[row.get(name, math.nan) for name in columns] for row in rows]
    wide = np.array(values, np.float64).reshape(len(rows), len(columns))
    return np.clip(wide, -_LARGEST, _LARGEST).astype(np.float32)


def columns_of(rows: Sequence[Features]) -> list[str]:
    """The names that occur, sorted."""
    return sorted({name for row in rows for name in row})


def _numbers(prefix: str, value: Any) -> dict[str, float]:
    """The numbers in a JSON value, named by their path; words become flags `path=word`."""
    if isinstance(value, bool | int | float):
        return {prefix: float(value)}
    if isinstance(value, str):
        return {f"{prefix}={value}": 1.0}
    found: dict[str, float] = {}
    if isinstance(value, Mapping):
        for name, item in value.items():
            found |= _numbers(f"{prefix}.{name}", item)
    elif isinstance(value, Sequence):
        for i, item in enumerate(value):
            found |= _numbers(f"{prefix}.{i}", item)
    return found


def _layout(place: str, text: str) -> dict[str, float]:
    match = _LAYOUT.fullmatch(text)
    if match is None:
        return {f"{place}.plain": 1.0}
    found = {
        f"{place}.{name}": float(value)
        for name, value in match.groupdict().items()
        if value is not None and name != "halo"
    }
    if match["halo"] is not None:
        found[f"{place}.halo"] = float(sum(map(int, match["halo"].split(","))))
    return found


def _work(n: Features, gpu: Gpu | None) -> dict[str, float]:
    """What the kernel has to do, as logarithms of counts of one or more."""
    found = counts(n) if gpu is None else gpu_counts(n, gpu)
    return {f"{LOG}{name}": math.log(max(count, 1.0)) for name, count in found.items()}
