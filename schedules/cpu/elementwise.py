"""Element-wise layers and copies on lane-strided or row-major buffers."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.layout import PlainLayout, View


def affine_prim_func(
    name: str,
    x_view: View,
    y_view: View,
    *,
    scaled: bool,
    activation: emit.Clamp,
    batch: int,
    threads: int,
) -> Any:
    """f(x[, scale, shift], y): y = clamp(x * scale[c] + shift[c]), between views of one grid.

    With no scale and no clamp it is a copy between layouts of one grid.
    """
    a, b = x_view.layout, y_view.layout
    lanes = b.grid.lanes
    with emit.prim_func(name) as builder:
        x = emit.argument("x", batch * a.size)
        scale = shift = None
        if scaled:
            scale = emit.argument("scale", y_view.count)
            shift = emit.argument("shift", y_view.count)
        y = emit.argument("y", batch * b.size)
        with emit.loop(batch * y_view.count, threads) as p:
            image, channel = p // y_view.count, p % y_view.count
            x_base, y_base = x_view.at(image, channel), y_view.at(image, channel)
            with T.serial(0, b.grid.rows) as yi, T.serial(0, b.grid.cols) as xi:
                value = x[emit.ramp(x_base + a.offset(yi, xi), lanes)]
                if scale is not None and shift is not None:
                    value = value * emit.splat(scale[channel], lanes)
                    value = value + emit.splat(shift[channel], lanes)
                value = emit.clamp(value, activation, lanes)
                T.buffer_store(y, value, [emit.ramp(y_base + b.offset(yi, xi), lanes)])
        emit.write_halo(y, y_view, batch, threads)
    return builder.get()


def add_prim_func(
    name: str,
    a_view: View,
    b_view: View,
    y_view: View,
    *,
    activation: emit.Clamp,
    batch: int,
    threads: int,
) -> Any:
    """f(a, b, y): y = clamp(a + b), views of one grid."""
    views = (a_view, b_view, y_view)
    lanes = y_view.layout.grid.lanes
    with emit.prim_func(name) as builder:
        a = emit.argument("a", batch * a_view.layout.size)
        b = emit.argument("b", batch * b_view.layout.size)
        y = emit.argument("y", batch * y_view.layout.size)
        with emit.loop(batch * y_view.count, threads) as p:
            image, channel = p // y_view.count, p % y_view.count
            base = [view.at(image, channel) for view in views]
            grid = y_view.layout.grid
            with T.serial(0, grid.rows) as yi, T.serial(0, grid.cols) as xi:
                at = [
                    emit.ramp(start + v.layout.offset(yi, xi), lanes)
                    for start, v in zip(base, views, strict=True)
                ]
                T.buffer_store(y, emit.clamp(a[at[0]] + b[at[1]], activation, lanes), [at[2]])
        emit.write_halo(y, y_view, batch, threads)
    return builder.get()


def plain_affine_prim_func(
    name: str, layout: PlainLayout, *, scaled: bool, activation: emit.Clamp
) -> Any:
    """f(x[, scale, shift], y) on a row-major [N, C, ...] tensor."""
    batch, channels = layout.shape[0], layout.shape[1] if len(layout.shape) > 1 else 1
    inner = layout.size // (batch * channels)
    with emit.prim_func(name) as builder:
        x = emit.argument("x", layout.size)
        scale = shift = None
        if scaled:
            scale = emit.argument("scale", channels)
            shift = emit.argument("shift", channels)
        y = emit.argument("y", layout.size)
        with (
            T.serial(0, batch) as image,
            T.serial(0, channels) as channel,
            T.serial(0, inner) as i,
        ):
            at = (image * channels + channel) * inner + i
            value = x[at]
            if scale is not None and shift is not None:
                value = value * scale[channel] + shift[channel]
            T.buffer_store(y, _scalar_clamp(value, activation), [at])
    return builder.get()


def plain_add_prim_func(name: str, layout: PlainLayout, *, activation: emit.Clamp) -> Any:
    """f(a, b, y) on row-major tensors of one shape."""
    with emit.prim_func(name) as builder:
        a = emit.argument("a", layout.size)
        b = emit.argument("b", layout.size)
        y = emit.argument("y", layout.size)
        with T.serial(0, layout.size) as i:
            T.buffer_store(y, _scalar_clamp(a[i] + b[i], activation), [i])
    return builder.get()


def _scalar_clamp(value: Any, bounds: emit.Clamp) -> Any:
    low, high = bounds
    if low is not None:
        value = T.max(value, T.float32(low))
    if high is not None:
        value = T.min(value, T.float32(high))
    return value
