"""Operators on the rows of sparse activations: compress, expand, ReLU, sum, concatenation.

In functions' arguments a sparse activation is three flat buffers: counts, columns, values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit

Shape = tuple[int, int, int]  # [C, H, W]


@dataclass(frozen=True)
class Rows:
    """A sparse activation among the arguments of a function that is being written."""

    width: int
    counts: Any
    columns: Any
    values: Any

    @staticmethod
    def argument(name: str, shape: Shape) -> Rows:
        """Declare the three buffers."""
        channels, height, width = shape
        lines = channels * height
        return Rows(
            width,
            emit.argument(f"{name}_counts", lines, "int32"),
            emit.argument(f"{name}_columns", lines * width, "int32"),
            emit.argument(f"{name}_values", lines * width),
        )

    def clear(self, row: Any) -> None:
        """Begin an empty row."""
        T.buffer_store(self.counts, T.int32(0), [row])

    def append(self, row: Any, column: Any, value: Any, relu: bool = False) -> None:
        """Add an entry to the row unless its value is zero (with `relu`: or negative)."""
        value = T.bind(value)
        kept = value > T.float32(0) if relu else value != T.float32(0)
        # NaN stays; it is not unequal to zero in the code that TVM makes.
        with T.If(T.Or(kept, T.isnan(value))), T.Then():
            at = T.bind(row * self.width + self.counts[row])
            T.buffer_store(self.columns, column, [at])
            T.buffer_store(self.values, value, [at])
            T.buffer_store(self.counts, self.counts[row] + 1, [row])


def compress_prim_func(name: str, shape: Shape, *, relu: bool, threads: int) -> Any:
    """f(x, counts, columns, values): a dense activation becomes sparse, after ReLU if asked."""
    channels, height, width = shape
    with emit.prim_func(name) as builder:
        x = emit.argument("x", channels * height * width)
        y = Rows.argument("y", shape)
        with emit.loop(channels * height, threads) as row:
            y.clear(row)
            with T.serial(0, width) as column:
                y.append(row, column, x[row * width + column], relu)
    return builder.get()


def expand_prim_func(name: str, shape: Shape, threads: int) -> Any:
    """f(counts, columns, values, y): a sparse activation becomes dense."""
    channels, height, width = shape
    with emit.prim_func(name) as builder:
        x = Rows.argument("x", shape)
        y = emit.argument("y", channels * height * width)
        with emit.loop(channels * height, threads) as row:
            with T.serial(0, width) as column:
                T.buffer_store(y, T.float32(0), [row * width + column])
            with T.serial(0, x.counts[row]) as entry:
                at = row * width + entry
                T.buffer_store(y, x.values[at], [row * width + x.columns[at]])
    return builder.get()


def relu_prim_func(name: str, shape: Shape, threads: int) -> Any:
    """f(x, y): what is negative leaves the rows."""
    channels, height, width = shape
    with emit.prim_func(name) as builder:
        x, y = Rows.argument("x", shape), Rows.argument("y", shape)
        with emit.loop(channels * height, threads) as row:
            y.clear(row)
            with T.serial(0, x.counts[row]) as entry:
                at = row * width + entry
                y.append(row, x.columns[at], x.values[at], relu=True)
    return builder.get()


def add_prim_func(name: str, shape: Shape, *, relu: bool, threads: int) -> Any:
    """f(a, b, y): the union of the rows, merged in the order of their columns."""
    channels, height, _ = shape
    with emit.prim_func(name) as builder:
        a, b, y = (Rows.argument(n, shape) for n in "aby")
        with emit.loop(channels * height, threads) as row:
            y.clear(row)
            i, j = (T.alloc_buffer((1,), "int32", scope="global") for _ in range(2))
            T.buffer_store(i, T.int32(0), [0])
            T.buffer_store(j, T.int32(0), [0])
            with T.While(T.Or(i[0] < a.counts[row], j[0] < b.counts[row])):
                in_a, in_b = _column(a, row, i[0]), _column(b, row, j[0])
                has_a, has_b = T.bind(in_a <= in_b), T.bind(in_b <= in_a)
                total = _value(a, row, i[0], has_a) + _value(b, row, j[0], has_b)
                y.append(row, T.min(in_a, in_b), total, relu)
                T.buffer_store(i, i[0] + T.cast(has_a, "int32"), [0])
                T.buffer_store(j, j[0] + T.cast(has_b, "int32"), [0])
    return builder.get()


def _column(rows: Rows, row: Any, entry: Any) -> Any:
    """An entry's column, and the width behind the last."""
    column = rows.columns[row * rows.width + entry]
    return T.bind(T.if_then_else(entry < rows.counts[row], column, T.int32(rows.width)))


def _value(rows: Rows, row: Any, entry: Any, present: Any) -> Any:
    """An entry's value, zero where it isn't its turn."""
    return T.if_then_else(present, rows.values[row * rows.width + entry], T.float32(0))


def concat_prim_func(name: str, parts: tuple[Shape, ...], threads: int) -> Any:
    """f(*parts, y): the channels of all parts, one after the other.

    Raises ValueError for planes of different sizes.
    """
    planes = {part[1:] for part in parts}
    if len(planes) != 1:
        raise ValueError(f"parts of one concatenation have planes of one size, got {planes}")
    height, width = parts[0][1:]
    channels = sum(part[0] for part in parts)
    with emit.prim_func(name) as builder:
        sources = [Rows.argument(f"x{i}", part) for i, part in enumerate(parts)]
        y = Rows.argument("y", (channels, height, width))
        first = 0
        for source, part in zip(sources, parts, strict=True):
            with emit.loop(part[0] * height, threads) as row:
                T.buffer_store(y.counts, source.counts[row], [first + row])
                with T.serial(0, source.counts[row]) as entry:
                    at, to = row * width + entry, (first + row) * width + entry
                    T.buffer_store(y.columns, source.columns[at], [to])
                    T.buffer_store(y.values, source.values[at], [to])
            first += part[0] * height
    return builder.get()
