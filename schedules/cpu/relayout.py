"""Moves a tensor from one layout to another, by a table of positions per vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.layout import Grid, LaneLayout, PlainLayout, View

IntArray = NDArray[np.int32]


def gather_tables(source: NDArray[np.int64], target: LaneLayout) -> tuple[IntArray, IntArray]:
    """Where each stored vector starts, and the source position of each of its lanes or -1.

    `source` is [H, W]: where each pixel of channel 0 lies.
    """
    grid: Grid = target.grid
    top, left, bottom, right = target.halo
    starts, picks = [], []
    for row in range(-top, grid.rows + bottom):
        for col in range(-left, grid.cols + right):
            y, x = grid.lane_pixels(row, col)
            inside = (y >= 0) & (y < grid.height) & (x >= 0) & (x < grid.width)
            at = source[np.where(inside, y, 0), np.where(inside, x, 0)]
            picks.append(np.where(inside, at, -1))
            starts.append(int(target.offset(row, col)))
    return np.asarray(starts, np.int32), np.concatenate(picks).astype(np.int32)


def to_lanes_tables(
    source: PlainLayout | LaneLayout, target: LaneLayout, strides: tuple[int, int] = (1, 1)
) -> tuple[IntArray, ...]:
    """The tables of `to_lanes_prim_func`; with strides, every so-many pixels of the source."""
    if isinstance(source, LaneLayout):
        pixels = source.pixel_offsets()
    else:
        height, width = source.shape[2:]
        pixels = np.arange(height * width).reshape(height, width)
    return gather_tables(pixels[:: strides[0], :: strides[1]], target)


def channel_at(source: PlainLayout | View, image: Any, channel: Any) -> Any:
    """Where a channel starts in the flat buffer."""
    if isinstance(source, View):
        return source.at(image, channel)
    channels, height, width = source.shape[1:]
    return (image * channels + channel) * (height * width)


def to_lanes_prim_func(
    name: str,
    source: PlainLayout | View,
    target: View,
    *,
    batch: int,
    threads: int,
) -> Any:
    """f(x, starts, picks, y): halo included."""
    layout, lanes = target.layout, target.layout.grid.lanes
    x_size = batch * source.layout.size if isinstance(source, View) else source.size
    top, left, bottom, right = layout.halo
    vectors = (layout.grid.rows + top + bottom) * (layout.grid.cols + left + right)
    with emit.prim_func(name) as builder:
        x = emit.argument("x", x_size)
        starts = emit.argument("starts", vectors, "int32")
        picks = emit.argument("picks", vectors * lanes, "int32")
        y = emit.argument("y", batch * layout.size)
        with emit.loop(batch * target.count, threads) as p:
            image, channel = p // target.count, p % target.count
            x_base = channel_at(source, image, channel)
            y_base = target.at(image, channel)
            with T.serial(0, vectors) as v:
                pick = T.bind(picks[emit.ramp(v * lanes, lanes)])
                value = emit.gather(x, x_base, pick, lanes, layout.fill)
                T.buffer_store(y, value, [emit.ramp(y_base + starts[v], lanes)])
    return builder.get()


def from_lanes_table(source: LaneLayout) -> IntArray:
    """The table of `from_lanes_prim_func`: where each pixel of channel 0 lies."""
    return source.pixel_offsets().ravel().astype(np.int32)


def from_lanes_prim_func(name: str, source: View, *, batch: int, threads: int) -> Any:
    """f(x, picks, y): to row-major [N, C, H, W]."""
    layout = source.layout
    plane = layout.grid.height * layout.grid.width
    with emit.prim_func(name) as builder:
        x = emit.argument("x", batch * layout.size)
        picks = emit.argument("picks", plane, "int32")
        y = emit.argument("y", batch * source.count * plane)
        with emit.loop(batch * source.count, threads) as p:
            image, channel = p // source.count, p % source.count
            base = source.at(image, channel)
            with T.serial(0, plane) as i:
                T.buffer_store(y, x[base + picks[i]], [p * plane + i])
    return builder.get()
