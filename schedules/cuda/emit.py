"""Pieces of TIR that all CUDA kernels are written with.

Buffers lie in layouts of one lane: planes of pixels, row by row, each with its halo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import Clamp
from topiarist.schedules.layout import LaneLayout, View

THREADS = 256  # of a block of the kernels that wait for memory


@contextmanager
def grid(
    blocks: tuple[Any, Any], threads: tuple[int, int]
) -> Iterator[tuple[tuple[Any, Any], tuple[Any, Any]]]:
    """Launch blocks (x, y) of threads (x, y); yields the indices of both."""
    with (
        T.thread_binding(0, blocks[0], thread="blockIdx.x") as bx,
        T.thread_binding(0, blocks[1], thread="blockIdx.y") as by,
        T.thread_binding(0, threads[0], thread="threadIdx.x") as tx,
        T.thread_binding(0, threads[1], thread="threadIdx.y") as ty,
    ):
        yield (bx, by), (tx, ty)


@contextmanager
def each(count: int) -> Iterator[Any]:
    """A thread for each of `count` items; yields the item."""
    with grid((-(-count // THREADS), 1), (THREADS, 1)) as ((block, _), (thread, _)):
        item = block * THREADS + thread
        with when(item < count):
            yield item


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Only where the condition holds."""
    with T.If(condition), T.Then():
        yield


def local(count: int, dtype: str = "float32") -> Any:
    """Values that a thread keeps in registers; only constant indices keep them there."""
    return T.alloc_buffer((count,), dtype, scope="local")


def shared(count: int, dtype: str = "float32") -> Any:
    """Values that the threads of a block share."""
    return T.alloc_buffer((count,), dtype, scope="shared")


def clamp(value: Any, bounds: Clamp) -> Any:
    """min(max(value, low), high)."""
    low, high = bounds
    if low is not None:
        value = T.max(value, T.float32(low))
    if high is not None:
        value = T.min(value, T.float32(high))
    return value


def halo_cells(layout: LaneLayout) -> int:
    """Stored values of a channel that are no pixels."""
    stored = layout.stored_rows * layout.row_vectors
    return stored - layout.grid.height * layout.grid.width


def halo_at(layout: LaneLayout, cell: Any) -> Any:
    """Where a cell of the halo lies: rows above and below, then what is beside the picture."""
    height, width = layout.grid.height, layout.grid.width
    row, top, left = layout.row_vectors, layout.halo[0], layout.halo[1]
    above = top * row
    outside = (layout.stored_rows - height) * row
    beyond = above + height * row
    beside = cell - outside
    gap = max(1, row - width)
    column = beside % gap
    inner = (top + beside // gap) * row + column + T.if_then_else(column < left, 0, width)
    outer = T.if_then_else(cell < above, cell, cell - above + beyond)
    return T.if_then_else(cell < outside, outer, inner)


def write_halo(y: Any, view: View, channel_at: Any, worker: Any, workers: int) -> None:
    """Fill the halo of a channel that starts at `channel_at`, shared out among `workers`."""
    cells = halo_cells(view.layout)
    turns = -(-cells // workers)
    if not cells:
        return
    with T.serial(0, turns) as turn:
        cell = turn * workers + worker
        with when(cell < cells):
            at = channel_at + halo_at(view.layout, cell)
            T.buffer_store(y, fill_of(view), [at])


@dataclass(frozen=True)
class Cell:
    """A thread's place in a stored plane: `at` in the buffer, and whether it is a pixel."""

    image: Any
    channel: Any
    row: Any
    col: Any
    at: Any
    inside: Any


@contextmanager
def each_cell(view: View, batch: int) -> Iterator[Cell]:
    """A thread for each stored value of the view's channels, halo included."""
    layout = view.layout
    stored = layout.stored_rows * layout.row_vectors
    with each(batch * view.count * stored) as item:
        plane, place = item // stored, item % stored
        image, channel = plane // view.count, plane % view.count
        row = T.bind(place // layout.row_vectors - layout.halo[0])
        col = T.bind(place % layout.row_vectors - layout.halo[1])
        rows = T.And(row >= 0, row < layout.grid.height)
        inside = T.And(rows, T.And(col >= 0, col < layout.grid.width))
        yield Cell(image, channel, row, col, view.at(image, channel) + place, inside)


def fill_of(view: View) -> Any:
    """What the halo holds."""
    return tirx.FloatImm("float32", view.layout.fill)


def sum_of_block(value: Any, thread: Any, threads: int) -> Any:
    """The sum of a value over the threads of a block, a power of two, for its first thread."""
    parts = shared(threads)
    T.buffer_store(parts, value, [thread])
    width = threads // 2
    while width:
        with when(thread < width):
            T.buffer_store(parts, parts[thread] + parts[thread + width], [thread])
        width //= 2
    return parts[0]
