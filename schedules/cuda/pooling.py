"""Max, average and global average pooling on planes with a halo."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import argument, prim_func
from topiarist.schedules.cuda import emit
from topiarist.schedules.layout import View

THREADS = 128  # that add up a plane


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

    `scale` holds 1 / count for each output pixel of the grid (`average_scale`).
    """
    a, b = x_view.layout, y_view.layout
    with prim_func(name) as builder:
        x = argument("x", batch * a.size)
        scale = argument("scale", b.grid.rows * b.grid.cols) if mode == "avg" else None
        y = argument("y", batch * b.size)
        with emit.each_cell(y_view, batch) as cell:
            result = emit.local(1)
            T.buffer_store(result, emit.fill_of(y_view), [0])
            with emit.when(cell.inside):
                start = a.offset(
                    cell.row * strides[0] - padding[0], cell.col * strides[1] - padding[1]
                )
                at = T.bind(x_view.at(cell.image, cell.channel) + start)
                first = x[at] if mode == "max" else T.float32(0)
                T.buffer_store(result, first, [0])
                with T.serial(0, kernel[0]) as ky, T.serial(0, kernel[1]) as kx:
                    read = x[at + ky * a.row_vectors + kx]
                    both = T.max(result[0], read) if mode == "max" else result[0] + read
                    T.buffer_store(result, both, [0])
                if scale is not None:
                    factor = scale[cell.row * b.grid.cols + cell.col]
                    T.buffer_store(result, result[0] * factor, [0])
            T.buffer_store(y, result[0], [cell.at])
    return builder.get()


def global_average_prim_func(name: str, x_view: View, *, batch: int, threads: int) -> Any:
    """f(x, y): the mean over the picture; y is [N, C] row-major."""
    layout, grid = x_view.layout, x_view.layout.grid
    pixels = grid.height * grid.width
    with prim_func(name) as builder:
        x = argument("x", batch * layout.size)
        y = argument("y", batch * x_view.count)
        blocks = (batch * x_view.count, 1)
        with emit.grid(blocks, (THREADS, 1)) as ((plane, _), (thread, _)):
            base = x_view.at(plane // x_view.count, plane % x_view.count)
            total = emit.local(1)
            T.buffer_store(total, T.float32(0), [0])
            with T.serial(0, -(-pixels // THREADS)) as turn:
                pixel = turn * THREADS + thread
                with emit.when(pixel < pixels):
                    at = base + layout.offset(pixel // grid.width, pixel % grid.width)
                    T.buffer_store(total, total[0] + x[at], [0])
            whole = emit.sum_of_block(total[0], thread, THREADS)
            with emit.when(thread == 0):
                T.buffer_store(y, whole * T.float32(1.0 / pixels), [plane])
    return builder.get()
