"""Max, average and global average pooling on lane-strided vectors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.layout import LaneLayout, View

MAX_SUM = 16  # vectors of one expression: TVM's passes recurse over it


def pool_prim_func(
    name: str,
    mode: str,
    x_view: View,
    y_view: View,
    *,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int],
    batch: int,
    threads: int,
) -> Any:
    """f(x, y) for max, f(x, scale, y) for avg; x is padded, its fill the neutral element.

    `scale` holds one vector of 1 / count per output vector (`average_scale`).
    """
    a, b = x_view.layout, y_view.layout
    lanes = b.grid.lanes
    row, col = a.row_vectors * lanes, lanes
    taps = [
        (ky - padding[0]) * row + (kx - padding[1]) * col
        for ky in range(kernel[0])
        for kx in range(kernel[1])
    ]
    combine: Callable[[Any, Any], Any] = T.max if mode == "max" else operator.add
    with emit.prim_func(name) as builder:
        x = emit.argument("x", batch * a.size)
        scale = None
        if mode == "avg":
            scale = emit.argument("scale", b.grid.rows * b.grid.cols * lanes)
        y = emit.argument("y", batch * b.size)
        with emit.loop(batch * y_view.count, threads) as p:
            image, channel = p // y_view.count, p % y_view.count
            x_base, y_base = x_view.at(image, channel), y_view.at(image, channel)
            with T.serial(0, b.grid.rows) as yi, T.serial(0, b.grid.cols) as xi:
                at = x_base + a.offset(yi * strides[0], xi * strides[1])
                to = emit.ramp(y_base + b.offset(yi, xi), lanes)
                for first in range(0, len(taps), MAX_SUM):
                    value = y[to] if first else None
                    for tap in taps[first : first + MAX_SUM]:
                        read = x[emit.ramp(at + tap, lanes)]
                        value = read if value is None else combine(value, read)
                    T.buffer_store(y, value, [to])
                if scale is not None:
                    factor = scale[emit.ramp((yi * b.grid.cols + xi) * lanes, lanes)]
                    T.buffer_store(y, y[to] * factor, [to])
        emit.write_halo(y, y_view, batch, threads)
    return builder.get()


def average_scale(
    y: LaneLayout,
    height: int,
    width: int,
    *,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    count_include_pad: bool,
) -> NDArray[np.float32]:
    """1 / number of averaged values, for each output vector and lane of the grid of `y`.

    With `count_include_pad` the padding counts, but not what lies beyond it (ONNX, AveragePool).
    """
    top, left = padding[:2]
    pad = padding if count_include_pad else (0, 0, 0, 0)

    def counts(out: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
        start = out * strides[axis] - (top, left)[axis]
        low = -(pad[0], pad[1])[axis]
        high = (height + pad[2], width + pad[3])[axis]
        return np.minimum(start + kernel[axis], high) - np.maximum(start, low)

    grid = y.grid
    scale = np.zeros((grid.rows, grid.cols, grid.lanes), np.float32)
    for yi in range(grid.rows):
        for xi in range(grid.cols):
            py, px = grid.lane_pixels(yi, xi)
            count = np.maximum(counts(py, 0), 1) * np.maximum(counts(px, 1), 1)
            scale[yi, xi] = 1.0 / count
    return scale.ravel()


def global_average_prim_func(name: str, x_view: View, *, batch: int, threads: int) -> Any:
    """f(x, y): the mean over the picture; y is [N, C] row-major."""
    layout, grid = x_view.layout, x_view.layout.grid
    lanes = grid.lanes
    runs = _sum_runs(layout)
    with emit.prim_func(name) as builder:
        x = emit.argument("x", batch * layout.size)
        y = emit.argument("y", batch * x_view.count)
        with emit.loop(batch * x_view.count, threads) as p:
            image, channel = p // x_view.count, p % x_view.count
            base = x_view.at(image, channel)
            T.buffer_store(y, T.float32(0), [p])
            for run in runs:
                with T.serial(0, run.rows) as r:
                    total = None
                    for row, col in run.vectors:
                        at = base + layout.offset(run.first + r + row, col)
                        value = _masked(x[emit.ramp(at, lanes)], run.masks[row, col])
                        total = value if total is None else total + value
                    T.buffer_store(y, y[p] + _horizontal_sum(T.bind(total), lanes), [p])
            T.buffer_store(y, y[p] * T.float32(1.0 / (grid.height * grid.width)), [p])
    return builder.get()


@dataclass(frozen=True)
class _SumRun:
    """`rows` repetitions, from row `first` on, of a sum over `vectors` (row, col) from there."""

    first: int
    rows: int
    vectors: tuple[tuple[int, int], ...]
    masks: dict[tuple[int, int], NDArray[np.bool_]]


def _sum_runs(layout: LaneLayout) -> list[_SumRun]:
    """All vectors with a pixel: at once where they are few, else rows with equal masks in loops."""
    masks = _masks(layout)
    if len(masks) <= MAX_SUM:
        return [_SumRun(0, 1, tuple(masks), masks)]
    runs: list[_SumRun] = []
    for row in range(layout.grid.rows):
        cols = [col for r, col in masks if r == row]
        for start in range(0, len(cols), MAX_SUM):
            part = tuple((0, col) for col in cols[start : start + MAX_SUM])
            here = {(0, col): masks[row, col] for _, col in part}
            for i, run in enumerate(runs):
                same = run.vectors == part and run.first + run.rows == row
                if same and all((run.masks[v] == here[v]).all() for v in part):
                    runs[i] = replace(run, rows=run.rows + 1)
                    break
            else:
                runs.append(_SumRun(row, 1, part, here))
    return runs


def _masked(vector: Any, mask: NDArray[np.bool_]) -> Any:
    """The vector with zeros where the mask is false."""
    lanes = len(mask)
    if mask.all():
        return vector
    pick = [lane if mask[lane] else lanes for lane in range(lanes)]
    return tirx.Shuffle([vector, emit.splat(0.0, lanes)], pick)


def _masks(layout: LaneLayout) -> dict[tuple[int, int], NDArray[np.bool_]]:
    """Which lanes of each vector hold a pixel; vectors without any are left out."""
    grid, found = layout.grid, {}
    for row in range(grid.rows):
        for col in range(grid.cols):
            y, x = grid.lane_pixels(row, col)
            mask = (y < grid.height) & (x < grid.width)
            if mask.any():
                found[row, col] = mask
    return found


def _horizontal_sum(vector: Any, lanes: int) -> Any:
    """The sum of a vector's lanes, by halves."""
    while lanes > 1:
        half = lanes // 2
        low = tirx.Shuffle([vector], list(range(half)))
        high = tirx.Shuffle([vector], list(range(half, lanes)))
        vector, lanes = T.bind(low + high), half
    return vector
