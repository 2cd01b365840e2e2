"""What a kernel has to do, counted: the terms that its time is a sum of.

Counts are those of one call, from the numbers of a candidate (`features.py`). Cache sizes are not
recorded, so those of common cores stand for them: what is read again from further away is counted
apart, in proportion to how far it exceeds them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from topiarist.schedules.workload import BLOCKS

Numbers = Mapping[str, float]

NEAR_BYTES = 48 * 1024.0  # a first-level cache
FAR_BYTES = 2 * 1024 * 1024.0  # a second-level cache
LINE = 64.0
REGISTERS = 32.0

_TILED = tuple(
    [f"config.{name}" for name in ("rows", "cols")]
    + [f"workload.{name}.{i}" for name in ("kernel", "strides", "dilation") for i in (0, 1)]
)
_WINOGRAD = tuple(
    f"config.{name}" for name in ("rows", "cols", "tiles", "block_tiles", "out_block")
)
_3X3 = (("kernel", 3.0), ("strides", 1.0))


def counts(n: Numbers) -> dict[str, float]:
    """Counts by name, from the numbers of a candidate; rough ones if some are missing."""
    get = n.get
    if "workload.read_bytes" in n:  # a pool, a move, a sum
        moved = n["workload.read_bytes"] + get("workload.written_bytes", 0.0)
        return {"calls": 1.0, "bytes_moved": moved}
    lanes, batch = n["lanes"], get("workload.batch", 1.0)
    groups = max(get("workload.groups", 1.0), 1.0)
    inputs = get("workload.in_channels", get("workload.inputs", 1.0))
    outputs = get("workload.out_channels", get("workload.outputs", 1.0))
    taps = get("workload.kernel.0", 1.0) * get("workload.kernel.1", 1.0)
    pixels = get("output.height", 1.0) * get("output.width", 1.0)
    vectors = batch * get("output.rows", 1.0) * get("output.cols", 1.0)
    stored = batch * get("input.rows", 1.0) * get("input.cols", 1.0)
    weights = inputs * outputs * taps / groups
    read, written = (4 * lanes * count for count in (inputs * stored, outputs * vectors))
    found = {
        "calls": 1.0,
        "macs": batch * weights * pixels,
        "weights": weights,
        "nonzeros": weights * density(n),
        "bytes_moved": read + written,
        "lines_read": read / LINE,
        "lines_written": written / LINE,
        "far_lines_read": read / LINE * beyond(read, FAR_BYTES),
        "far_lines_written": written / LINE * beyond(written, FAR_BYTES),
    }
    if get("kernel=winograd_dense") and _positive(n, _WINOGRAD):
        return found | _winograd(n, inputs, outputs, batch)
    if get("kernel=depthwise") and _positive(n, _TILED):
        return found | _depthwise(n, outputs, taps, vectors)
    if _positive(n, _TILED):
        return found | _tiled(n, inputs / groups, outputs, taps, vectors)
    streamed = weights * density(n) * 6 if get("kernel=sparse_linear") else weights * 4
    fmas = batch * weights * density(n) * vectors / lanes
    return found | {"fmas": fmas, "weight_lines": streamed / LINE}


def density(n: Numbers) -> float:
    """The share of weights that the kernel multiplies by."""
    return min(max(n.get("workload.sparsity.density", 1.0), 0.0), 1.0)


def beyond(size: float, cache: float) -> float:
    """The share of what is read again, of so many bytes, that a cache can't hold; 0 to 1."""
    return 1 / (1 + (cache / max(size, 1.0)) ** 3)


def _tiled(
    n: Numbers, inputs: float, outputs: float, taps: float, vectors: float
) -> dict[str, float]:
    """The direct kernels: tiles of vectors in registers, blocks of input and output channels."""
    get = n.get
    tile = n["config.rows"] * n["config.cols"]
    block = max(get("config.out_block", 1.0), 1.0)
    in_block = max(min(get("config.in_block", inputs), inputs), 1.0)
    sparse = "workload.sparsity.density" in n
    alike = next((b for p, b in BLOCKS.items() if get(f"workload.sparsity.pattern={p}")), 1)
    union = 1 - (1 - density(n)) ** max(1.0, block / alike)
    tiles, rows = vectors / tile, outputs / block
    columns = tiles * rows * inputs * taps * union
    fmas = columns * tile * block
    busy = max(tile, tile * block * 0.55) if sparse else max(tile * block, tile + block, 8.0) / 2
    visits = tiles * rows * -(-inputs // in_block)
    outside = bool(get("config.weights_outside"))
    plane = get("input.rows", 1.0) * get("input.cols", 1.0)
    channel = (plane if outside else _span(n, 0) * _span(n, 1)) * n["lanes"] * 4
    weight_bytes = rows * inputs * taps * union * (4 * block + 2 * sparse)
    weight_lines = weight_bytes / LINE * (1.0 if outside else tiles)
    tile_bytes = outputs * tile * n["lanes"] * 4
    return {
        "columns": columns,
        "loads": columns * tile,
        "fmas": fmas,
        "busy": columns * busy,
        "mid_loads": columns * tile * beyond(in_block * channel, 1.5 * NEAR_BYTES),
        "far_loads": columns * tile * beyond(in_block * channel, FAR_BYTES / 2),
        "spills": columns * max(0.0, tile * block + tile + 1 - REGISTERS),
        "tiles": tiles,
        "visits": visits,
        "visit_vectors": visits * tile * block,
        "mid_visit_vectors": visits * tile * block * beyond(tile_bytes, NEAR_BYTES),
        "columns_per_visit": 16 * columns / max(visits, 1.0),
        "tile_vectors": tile,
        "registers": tile * block + tile,
        "block_bytes": in_block * channel,
        "weight_bytes": weight_bytes,
        "mid_weight_lines": weight_lines * beyond(weight_bytes, NEAR_BYTES),
        "far_weight_lines": weight_lines * beyond(weight_bytes, FAR_BYTES / 2),
    }


def _winograd(n: Numbers, inputs: float, outputs: float, batch: float) -> dict[str, float]:
    """Products per frequency, and the transforms."""
    rows, cols, at_once = n["config.rows"], n["config.cols"], n["config.tiles"]
    block_tiles, out_block = n["config.block_tiles"], n["config.out_block"]
    kernel, strides = (
        [n.get(f"workload.{name}.{i}", known) for i in (0, 1)] for name, known in _3X3
    )
    taps = [-(-k // s) for k, s in zip(kernel, strides, strict=True)]
    frequencies = (rows + taps[0] - 1) * (cols + taps[1] - 1)
    inputs = inputs * strides[0] * strides[1]  # each phase of a stride is a channel of its own
    down, across = n.get("output.rows", rows), n.get("output.cols", cols)
    tiles = batch * -(-down // rows) * -(-across // cols)
    products = frequencies * tiles * inputs * outputs
    steps = products / (block_tiles * out_block)
    into, out = frequencies * tiles * inputs, frequencies * tiles * outputs
    work = frequencies * at_once * n["lanes"] * 4 * (inputs + outputs)
    part = at_once * inputs * n["lanes"] * 4  # of a frequency, which every block of outputs reads
    weight_bytes = frequencies * inputs * outputs * 4
    weight_lines = weight_bytes / LINE * tiles / at_once
    busy = max(block_tiles * out_block / 2, (block_tiles + out_block) * 0.8, 4.0)
    return {
        "columns": steps,
        "fmas": products,
        "loads": steps * (block_tiles + out_block),
        "busy": steps * busy,
        "mid_loads": steps * block_tiles * beyond(part, NEAR_BYTES),
        "far_loads": steps * block_tiles * beyond(work, FAR_BYTES),
        "transformed_in": into,
        "transformed_out": out,
        "mid_transformed": (into + out) * beyond(work, NEAR_BYTES),
        "far_transformed": (into + out) * beyond(work, FAR_BYTES / 2),
        "registers": block_tiles * out_block,
        "block_bytes": work,
        "weight_bytes": weight_bytes,
        "weight_lines": weight_lines,
        "far_weight_lines": weight_lines * beyond(weight_bytes, FAR_BYTES),
    }


def _depthwise(n: Numbers, outputs: float, taps: float, vectors: float) -> dict[str, float]:
    """Every vector of the input once per tile, or once per row of the window."""
    tile = n["config.rows"] * n["config.cols"]
    repeats = 1.0 if n.get("config.unrolled") else n["workload.kernel.0"] / n["workload.strides.0"]
    loads = _reach(n, 0) * _reach(n, 1) * repeats
    tiles = outputs * vectors / tile
    return {
        "fmas": tiles * tile * taps,
        "loads": tiles * loads,
        "busy": tiles * max(tile * taps / 2, loads / 2, taps * 4),
        "tiles": tiles,
        "visit_vectors": tiles * tile,
        "tile_vectors": tile,
    }


def _positive(n: Numbers, names: tuple[str, ...]) -> bool:
    """Whether all of these are there and make sense: a log can be edited by hand."""
    return all(0 < n.get(name, 0.0) < math.inf for name in names)


def _reach(n: Numbers, axis: int) -> float:
    """Vectors of the input along an axis that a tile's windows span."""
    tile = n[("config.rows", "config.cols")[axis]]
    stride, dilation = n[f"workload.strides.{axis}"], n[f"workload.dilation.{axis}"]
    return (tile - 1) * stride + (n[f"workload.kernel.{axis}"] - 1) * dilation + 1


def _span(n: Numbers, axis: int) -> float:
    """As `_reach`, or the whole tile that is stored together."""
    return max(_reach(n, axis), n.get(("input.tile_rows", "input.tile_cols")[axis], 0.0))
