"""Max and average pooling from sparse to sparse activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.formats.rows import Rows, Shape

LOWEST = float("-inf")


@dataclass(frozen=True)
class Pool:
    """A pooling of [C, H, W]; averages are over the pixels of a window, without its padding."""

    mode: Literal["max", "avg"]
    shape: Shape
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int]  # of both sides, less than the kernel

    @property
    def output(self) -> Shape:
        """[C, oh, ow]."""
        sizes = zip(self.shape[1:], self.kernel, self.strides, self.padding, strict=True)
        height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        return self.shape[0], height, width


def pool_prim_func(name: str, pool: Pool, threads: int) -> Any:
    """f(x, y): a line of sums or maxima is collected from stored pixels, then compressed.

    Zeros that are not stored take part: `seen` counts what is stored of each window. Raises
    ValueError for padding that leaves windows empty.
    """
    if any(p >= k for p, k in zip(pool.padding, pool.kernel, strict=True)):
        raise ValueError(f"padding {pool.padding} must be less than the kernel {pool.kernel}")
    channels, lines, width = pool.output
    with emit.prim_func(name) as builder:
        x, y = Rows.argument("x", pool.shape), Rows.argument("y", pool.output)
        with emit.loop(channels * lines, threads) as row:
            y.clear(row)
            line = _Line(
                pool,
                T.alloc_buffer((width,), "float32", scope="global"),
                T.alloc_buffer((width,), "int32", scope="global"),
            )
            line.clear()
            top = row % lines * pool.strides[0] - pool.padding[0]
            with T.serial(0, pool.kernel[0]) as r:
                at = top + r
                with T.If(T.And(at >= 0, at < pool.shape[1])), T.Then():
                    line.collect(x, row // lines * pool.shape[1] + at)
            with T.serial(0, width) as column:
                y.append(row, column, line.result(top, column))
    return builder.get()


@dataclass(frozen=True)
class _Line:
    """An output line that is being collected."""

    pool: Pool
    found: Any
    seen: Any

    @property
    def _is_max(self) -> bool:
        return self.pool.mode == "max"

    def clear(self) -> None:
        with T.serial(0, self.pool.output[2]) as column:
            T.buffer_store(self.found, T.float32(LOWEST if self._is_max else 0), [column])
            T.buffer_store(self.seen, T.int32(0), [column])

    def collect(self, x: Rows, row: Any) -> None:
        """Every stored pixel of a row goes to all windows that it lies in."""
        stride, left, outputs = self.pool.strides[1], self.pool.padding[1], self.pool.output[2]
        with T.serial(0, x.counts[row]) as entry, T.serial(0, self.pool.kernel[1]) as s:
            at = row * x.width + entry
            shifted = T.bind(x.columns[at] + left - s)
            inside = T.And(shifted >= 0, shifted < outputs * stride)
            with T.If(T.And(inside, shifted % stride == 0)), T.Then():
                to = T.bind(shifted // stride)
                now, value = self.found[to], x.values[at]
                value = T.max(now, value) if self._is_max else now + value
                T.buffer_store(self.found, value, [to])
                T.buffer_store(self.seen, self.seen[to] + 1, [to])

    def result(self, top: Any, column: Any) -> Any:
        """A window's maximum or mean."""
        pool = self.pool
        left = column * pool.strides[1] - pool.padding[1]
        size = _overlap(top, pool.kernel[0], pool.shape[1])
        size = T.bind(size * _overlap(left, pool.kernel[1], pool.shape[2]))
        found = self.found[column]
        if not self._is_max:
            return found / T.cast(size, "float32")
        return T.Select(self.seen[column] == size, found, T.max(found, T.float32(0)))


def _overlap(first: Any, count: int, size: int) -> Any:
    """How many of `count` coordinates from `first` on lie within the size."""
    return T.min(first + count, size) - T.max(first, 0)
