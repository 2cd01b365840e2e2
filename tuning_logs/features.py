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
VERSION = 2  # of the features: raised when a name or its meaning changes

_SKIP_ZEROS = frozenset({"direct_sparse", "block_sparse", "block8_sparse", "sparse_linear"})
_ALIKE = {"block4x1": 4, "block8x1": 8}  # output channels that share their zeros
_TILED = tuple(
    [f"config.{name}" for name in ("rows", "cols")]
    + [f"workload.{name}.{i}" for name in ("kernel", "strides", "dilation") for i in (0, 1)]
)
_WINOGRAD = tuple(
    f"config.{name}" for name in ("rows", "cols", "tiles", "block_tiles", "out_block")
)
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
    return found | _work(found)


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


def _work(n: Features) -> dict[str, float]:
    """What the kernel has to do, as logarithms of counts, and what has to stay in the caches."""
    counts = _counts(n)
    found = {f"log_{name}": math.log(max(count, 1.0)) for name, count in counts.items()}
    found["log_cycles"] = math.log(max(cycles(counts), 1.0))
    return found


def cycles(counts: Mapping[str, float]) -> float:
    """A rough time from counts, in cycles: a scale, so that models need to learn corrections only.

    A vector of the input takes half a cycle to load, a visit to a tile some cycles a vector, and
    what is streamed comes in eighths of a cache line per cycle.
    """
    get = counts.get
    work = max(get("loads", 0.0), get("fmas", 0.0)) * 0.6 + get("columns", 0.0)
    moved = get("weight_bytes_streamed", 0.0) + get("bytes_moved", 0.0)
    return work + 3.0 * get("visit_vectors", 0.0) + moved / 8 + 500.0


def _counts(n: Features) -> dict[str, float]:
    """Counts of one call, from the numbers of a candidate; rough ones if some are missing."""
    get = n.get
    if "workload.read_bytes" in n:  # a pool, a move, a sum
        return {"bytes_moved": n["workload.read_bytes"] + get("workload.written_bytes", 0.0)}
    lanes, batch = n["lanes"], get("workload.batch", 1.0)
    groups = max(get("workload.groups", 1.0), 1.0)
    inputs = get("workload.in_channels", get("workload.inputs", 1.0))
    outputs = get("workload.out_channels", get("workload.outputs", 1.0))
    taps = get("workload.kernel.0", 1.0) * get("workload.kernel.1", 1.0)
    density = _density(n)
    pixels = get("output.height", 1.0) * get("output.width", 1.0)
    vectors = get("output.rows", 1.0) * get("output.cols", 1.0)
    stored = get("input.rows", 1.0) * get("input.cols", 1.0)
    weights = inputs * outputs * taps / groups
    found = {
        "macs": batch * weights * pixels,
        "nonzero_macs": batch * weights * pixels * density,
        "vector_macs": batch * weights * vectors * density,
        "weights": weights,
        "nonzeros": weights * density,
        "values_read": batch * inputs * stored * lanes,
        "values_written": batch * outputs * vectors * lanes,
        "bytes_moved": 4 * batch * lanes * (inputs * stored + outputs * vectors),
    }
    if get("kernel=winograd_dense") and _positive(n, _WINOGRAD):
        return found | _winograd_counts(n, inputs, outputs, vectors * batch)
    if _positive(n, _TILED):
        return found | _tiled_counts(n, inputs / groups, outputs, taps, vectors * batch)
    streamed = weights * density * 6 if get("kernel=sparse_linear") else weights * 4
    return found | {"fmas": weights * density / lanes, "weight_bytes_streamed": streamed}


def _tiled_counts(
    n: Features, inputs: float, outputs: float, taps: float, vectors: float
) -> dict[str, float]:
    """The direct kernels: tiles of vectors in registers, blocks of input and output channels."""
    get = n.get
    tile = n["config.rows"] * n["config.cols"]
    block = max(get("config.out_block", 1.0), 1.0)
    in_block = max(min(get("config.in_block", inputs), inputs), 1.0)
    in_blocks = -(-inputs // in_block)
    tiles = vectors / tile
    sparse = "workload.sparsity.density" in n
    alike = next((b for p, b in _ALIKE.items() if get(f"workload.sparsity.pattern={p}")), 1)
    density = _density(n)
    union = 1 - (1 - density) ** max(1.0, block / alike)
    rows = outputs / block
    columns = tiles * rows * inputs * taps * union
    streams = 1.0 if get("config.weights_outside") else tiles
    channel = _span(n, 0) * _span(n, 1) * n["lanes"] * 4
    visits = tiles * rows * in_blocks
    return {
        "columns": columns,
        "loads": columns * tile,
        "fmas": columns * tile * block,
        "visits": visits,
        "visit_vectors": visits * tile * block,
        "columns_per_visit": 16 * columns / max(visits, 1.0),
        "tile_vectors": tile,
        "registers": tile * block + tile,
        "block_bytes": in_block * channel,
        "tile_bytes": inputs * channel,
        "in_blocks": in_blocks,
        "weight_bytes": rows * inputs * taps * union * (4 * block + 2 * sparse),
        "weight_bytes_streamed": streams * rows * inputs * taps * union * (4 * block + 2 * sparse),
    }


def _winograd_counts(
    n: Features, inputs: float, outputs: float, vectors: float
) -> dict[str, float]:
    """Products per frequency, and the transforms."""
    rows, cols = n["config.rows"], n["config.cols"]
    frequencies = (rows + 2) * (cols + 2)
    tiles = vectors / (rows * cols)
    at_once = n["config.tiles"]
    blocks = max(1.0, tiles / at_once)
    products = frequencies * inputs * outputs * tiles
    moved = frequencies * (inputs + outputs) * tiles
    return {
        "columns": products / n["config.block_tiles"],
        "fmas": products,
        "loads": products / n["config.out_block"] + products / n["config.block_tiles"],
        "visit_vectors": moved,
        "registers": n["config.out_block"] * n["config.block_tiles"],
        "block_bytes": frequencies * (inputs + outputs) * at_once * n["lanes"] * 4,
        "weight_bytes": frequencies * inputs * outputs * 4,
        "weight_bytes_streamed": blocks * frequencies * inputs * outputs * 4,
    }


def _positive(n: Features, names: Sequence[str]) -> bool:
    """Whether all of these are there and make sense: a log can be edited by hand."""
    return all(n.get(name, 0.0) > 0 for name in names)


def _density(n: Features) -> float:
    """The share of weights that the kernel multiplies by."""
    return min(max(n.get("workload.sparsity.density", 1.0), 0.0), 1.0)


def _span(n: Features, axis: int) -> float:
    """Vectors of the input along an axis that a tile reads."""
    tile = n[("config.rows", "config.cols")[axis]]
    stride, dilation = n[f"workload.strides.{axis}"], n[f"workload.dilation.{axis}"]
    span = (tile - 1) * stride + (n[f"workload.kernel.{axis}"] - 1) * dilation + 1
    return max(span, n.get(("input.tile_rows", "input.tile_cols")[axis], 0.0))
