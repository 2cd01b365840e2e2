"""Moves a tensor into planes with a halo and back, by the tables of the CPU's relayout."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import argument, prim_func
from topiarist.schedules.cpu.relayout import channel_at
from topiarist.schedules.cuda import emit
from topiarist.schedules.layout import PlainLayout, View


def to_lanes_prim_func(
    name: str,
    source: PlainLayout | View,
    target: View,
    *,
    batch: int,
    threads: int,
) -> Any:
    """f(x, starts, picks, y): halo included."""
    layout = target.layout
    x_size = batch * source.layout.size if isinstance(source, View) else source.size
    stored = layout.stored_rows * layout.row_vectors
    with prim_func(name) as builder:
        x = argument("x", x_size)
        starts = argument("starts", stored, "int32")
        picks = argument("picks", stored, "int32")
        y = argument("y", batch * layout.size)
        with emit.each(batch * target.count * stored) as item:
            plane, cell = item // stored, item % stored
            image, channel = plane // target.count, plane % target.count
            pick = T.bind(picks[cell])
            value = x[channel_at(source, image, channel) + pick]
            at = target.at(image, channel) + starts[cell]
            T.buffer_store(y, T.if_then_else(pick >= 0, value, emit.fill_of(target)), [at])
    return builder.get()


def from_lanes_prim_func(name: str, source: View, *, batch: int, threads: int) -> Any:
    """f(x, picks, y): to row-major [N, C, H, W]."""
    layout = source.layout
    pixels = layout.grid.height * layout.grid.width
    with prim_func(name) as builder:
        x = argument("x", batch * layout.size)
        picks = argument("picks", pixels, "int32")
        y = argument("y", batch * source.count * pixels)
        with emit.each(batch * source.count * pixels) as item:
            plane = item // pixels
            base = source.at(plane // source.count, plane % source.count)
            T.buffer_store(y, x[base + picks[item % pixels]], [item])
    return builder.get()
