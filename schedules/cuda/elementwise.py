"""Element-wise layers on planes with a halo and on row-major buffers."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import Clamp, argument, prim_func
from topiarist.schedules.cuda import emit
from topiarist.schedules.layout import PlainLayout, View


def affine_prim_func(
    name: str,
    x_view: View,
    y_view: View,
    *,
    scaled: bool,
    activation: Clamp,
    batch: int,
    threads: int,
) -> Any:
    """f(x[, scale, shift], y): y = clamp(x * scale[c] + shift[c])."""
    with prim_func(name) as builder:
        x = argument("x", batch * x_view.layout.size)
        scale = argument("scale", y_view.count) if scaled else None
        shift = argument("shift", y_view.count) if scaled else None
        y = argument("y", batch * y_view.layout.size)
        with emit.each_cell(y_view, batch) as cell:
            value = x[_at(x_view, cell)]
            if scale is not None and shift is not None:
                value = value * scale[cell.channel] + shift[cell.channel]
            _store(y, y_view, cell, emit.clamp(value, activation))
    return builder.get()


def add_prim_func(
    name: str,
    a_view: View,
    b_view: View,
    y_view: View,
    *,
    activation: Clamp,
    batch: int,
    threads: int,
) -> Any:
    """f(a, b, y): y = clamp(a + b)."""
    with prim_func(name) as builder:
        a = argument("a", batch * a_view.layout.size)
        b = argument("b", batch * b_view.layout.size)
        y = argument("y", batch * y_view.layout.size)
        with emit.each_cell(y_view, batch) as cell:
            value = a[_at(a_view, cell)] + b[_at(b_view, cell)]
            _store(y, y_view, cell, emit.clamp(value, activation))
    return builder.get()


def _at(view: View, cell: emit.Cell) -> Any:
    return view.at(cell.image, cell.channel) + view.layout.offset(cell.row, cell.col)


def _store(y: Any, view: View, cell: emit.Cell, value: Any) -> None:
    T.buffer_store(y, T.if_then_else(cell.inside, value, emit.fill_of(view)), [cell.at])


def plain_affine_prim_func(
    name: str, layout: PlainLayout, *, scaled: bool, activation: Clamp
) -> Any:
    """f(x[, scale, shift], y) on a row-major [N, C, ...] tensor."""
    channels = layout.shape[1] if len(layout.shape) > 1 else 1
    inner = layout.size // (layout.shape[0] * channels)
    with prim_func(name) as builder:
        x = argument("x", layout.size)
        scale = argument("scale", channels) if scaled else None
        shift = argument("shift", channels) if scaled else None
        y = argument("y", layout.size)
        with emit.each(layout.size) as at:
            value = x[at]
            if scale is not None and shift is not None:
                channel = at // inner % channels
                value = value * scale[channel] + shift[channel]
            T.buffer_store(y, emit.clamp(value, activation), [at])
    return builder.get()


def plain_add_prim_func(name: str, layout: PlainLayout, *, activation: Clamp) -> Any:
    """f(a, b, y) on row-major tensors of one shape."""
    with prim_func(name) as builder:
        a = argument("a", layout.size)
        b = argument("b", layout.size)
        y = argument("y", layout.size)
        with emit.each(layout.size) as at:
            T.buffer_store(y, emit.clamp(a[at] + b[at], activation), [at])
    return builder.get()
