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

from topiarist.tuning_logs.record import MeasureInput

Features = Mapping[str, float]

_LAYOUT = re.compile(
    r"lanes\((?P<height>\d+)x(?P<width>\d+)@(?P<sy>\d+)x(?P<sx>\d+):(?P<rows>\d+)x(?P<cols>\d+) "
    r"(?:tile(?P<tile_rows>\d+)x(?P<tile_cols>\d+)|halo\((?P<halo>[\d, ]+)\))\)"
    r" channels (?P<count>\d+) of (?P<stored>\d+)"
)


def features(what: MeasureInput) -> dict[str, float]:
    """The numbers of a candidate, by name; counts of work are logarithms."""
    found = {f"kernel={what.kernel}": 1.0, "kernel_version": float(what.kernel_version)}
    found |= _numbers("workload", what.workload)
    found |= _numbers("config", what.config)
    for place, text in (("input", what.input_layout), ("output", what.output_layout)):
        found |= _layout(place, text)
    found["residual in place"] = float(what.residual_layout == "in place")
    found["residual"] = float(what.residual_layout != "none")
    found["lanes"], found["threads"] = float(what.target.lanes), float(what.target.threads)
    found[f"isa={what.target.isa}"] = 1.0
    return found | _work(found)


def table(rows: Sequence[Features], columns: Sequence[str]) -> NDArray[np.float32]:
    """[rows, columns], NaN where a row has no such number."""
    values = [[row.get(name, math.nan) for name in columns] for row in rows]
    return np.array(values, np.float32).reshape(len(rows), len(columns))


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


def _work(numbers: Features) -> dict[str, float]:
    """Logarithms of what the kernel has to do: multiply-adds, values read, values written."""
    kernel = numbers.get("workload.kernel.0", 1.0) * numbers.get("workload.kernel.1", 1.0)
    inputs = numbers.get("workload.in_channels", numbers.get("workload.inputs", 1.0))
    outputs = numbers.get("workload.out_channels", numbers.get("workload.outputs", 1.0))
    pixels = math.prod(numbers.get(f"output.{side}", 1.0) for side in ("height", "width"))
    vectors = math.prod(numbers.get(f"output.{side}", 1.0) for side in ("rows", "cols"))
    density = numbers.get("workload.sparsity.density", numbers.get("workload.density", 1.0))
    batch = numbers.get("workload.batch", 1.0)
    weights = inputs * outputs * kernel / numbers.get("workload.groups", 1.0)
    stored = math.prod(numbers.get(f"input.{side}", 1.0) for side in ("rows", "cols"))
    lanes = numbers["lanes"]
    counts = {
        "macs": batch * weights * pixels,
        "nonzero_macs": batch * weights * pixels * density,
        "vector_macs": batch * weights * vectors * density,
        "weights": weights,
        "nonzeros": weights * density,
        "values_read": batch * inputs * stored * lanes,
        "values_written": batch * outputs * vectors * lanes,
    }
    return {f"log_{name}": math.log(max(count, 1.0)) for name, count in counts.items()}
