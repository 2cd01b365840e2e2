"""Direct convolution on a GPU: the sparse (CSR) and the dense form.

A thread walks over the nonzeros of its output channels together (or over all taps): it loads an
input value for each of its pixels and multiplies it with a weight for each of its channels. The
column index of the CSR matrix is the offset of the tap in the input's buffer (Park et al., ICLR
2017, section 2.1). All threads of a block read the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import argument, prim_func, symbol
from topiarist.schedules.cuda import emit
from topiarist.schedules.cuda.thread import QUAD, Loops, Thread, each_thread, tap_offsets
from topiarist.schedules.kernel import Packed


@dataclass(frozen=True)
class _Weight:
    """The buffers of a packed weight; a dense one has no `starts` and one list of offsets."""

    k: Loops
    values: Any
    offsets: Any
    starts: Any = None

    def row(self, row: Any) -> tuple[Any, Any]:
        """Where a row begins in the values, and how many columns it has."""
        if self.starts is None:
            return row * self.k.taps, self.k.taps
        begin = T.bind(self.starts[row])
        return begin, T.bind(self.starts[row + 1] - begin)

    def offset(self, row: Any, begin: Any, column: Any) -> Any:
        """The offset of a row's column from the input's first channel."""
        if self.starts is not None:
            return self.offsets[begin + column]
        k = self.k
        group = row * k.config.channels // k.group_out
        stride = k.group_in * k.views.x.layout.channel_stride // k.offset_unit
        return self.offsets[column] + group * stride


def make_prim_func(k: Loops, name: str) -> Any:
    """f(x, values, offsets[, starts], bias[, residual], y)."""
    w = k.workload
    with prim_func(name) as builder:
        x = argument("x", w.batch * k.views.x.layout.size)
        if k.sparse:
            weight = _Weight(
                k,
                values=argument("values", symbol("count")),
                offsets=argument("offsets", symbol("columns"), "int32"),
                starts=argument("starts", k.rows + 1, "int32"),
            )
        else:
            values = argument("values", w.out_channels * k.taps)
            weight = _Weight(k, values, argument("offsets", k.taps, "int32"))
        with each_thread(k) as thread:
            walk = _staged if k.config.chunk else _unstaged
            walk(k, x, weight, thread)
    return builder.get()


def _unstaged(k: Loops, x: Any, weight: _Weight, thread: Thread) -> None:
    """Every thread reads its columns' offsets and weights where they are."""
    begin, count = weight.row(thread.row)
    first, mine = 0, count
    if k.config.split > 1:
        part = T.bind(T.floordiv(count + k.config.split - 1, k.config.split))
        first = thread.ty * part
        mine = T.max(T.min(part, count - first), 0)
    with T.serial(0, mine) as step:
        column = T.bind(first + step)
        at = (begin + column) * k.config.channels
        weights = _vector(weight.values, at, k.config.channels)
        _multiply(k, x, thread, weight.offset(thread.row, begin, column), weights)


def _staged(k: Loops, x: Any, weight: _Weight, thread: Thread) -> None:
    """The block copies chunks of offsets and weights into shared memory, one for each split."""
    c = k.config
    step = c.chunk * c.split
    values, offsets = emit.shared(step * c.channels), emit.shared(step, "int32")
    begin, count = weight.row(thread.row)
    worker = thread.ty * c.threads + thread.tx

    def copy(to: Any, size: int, limit: Any, read: Callable[[Any], Any]) -> None:
        for turn in range(-(-size // c.block_threads)):
            item = turn * c.block_threads + worker
            with emit.when(T.And(item < size, item < limit)):
                T.buffer_store(to, read(item), [item])

    with T.serial(0, T.floordiv(count + step - 1, step)) as q:
        done = q * step
        rest = count - done
        copy(offsets, step, rest, lambda i: weight.offset(thread.row, begin, done + i))
        copy(
            values,
            step * c.channels,
            rest * c.channels,
            lambda i: weight.values[(begin + done) * c.channels + i],
        )
        with T.serial(0, T.max(T.min(rest - thread.ty * c.chunk, c.chunk), 0)) as within:
            column = T.bind(thread.ty * c.chunk + within)
            weights = _vector(values, column * c.channels, c.channels)
            _multiply(k, x, thread, offsets[column], weights)


def _vector(buffer: Any, at: Any, count: int) -> list[Any]:
    """`count` neighbouring values, in loads as wide as they allow."""
    width = math.gcd(count, QUAD)
    if width == 1:
        return [T.bind(buffer[at + i]) for i in range(count)]
    held = emit.local(count)
    for i in range(0, count, width):
        T.buffer_store(held, buffer[T.ramp(at + i, 1, width)], [T.ramp(i, 1, width)])
    return [held[i] for i in range(count)]


def _multiply(k: Loops, x: Any, thread: Thread, offset: Any, weights: list[Any]) -> None:
    """Add a column's products to the sums."""
    c = k.config
    sums = thread.sums
    at = T.bind(thread.place.x + offset)
    if c.quads:
        inputs = _vector(x, at * QUAD, QUAD)
    else:
        inputs = [T.bind(x[at + v * k.input_step]) for v in range(c.pixels)]
    for a, weight in enumerate(weights):
        for v, value in enumerate(inputs):
            i = a * c.pixels + v
            T.buffer_store(sums, sums[i] + weight * value, [i])


def pack(k: Loops, weight: NDArray[np.float32]) -> Packed:
    """values, offsets and, for the sparse form, starts of the weight [O, C / groups, kh, kw].

    A row holds the columns of `channels` neighbouring output channels: the union of their
    nonzeros, or all.
    """
    at = tap_offsets(k.workload, k.views.x.layout).ravel() // k.offset_unit
    blocks = weight.reshape(k.rows, k.config.channels, k.taps)
    if not k.sparse:
        return blocks.transpose(0, 2, 1).astype(np.float32).ravel(), at.astype(np.int32)
    kept = (blocks != 0).any(1)
    row, column = np.nonzero(kept)
    stride = k.group_in * k.views.x.layout.channel_stride // k.offset_unit
    group = row * k.config.channels // k.group_out
    values = blocks[row, :, column].ravel()
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept.sum(1))])
    # A column of padding keeps an empty weight's buffers non-empty.
    return (
        np.append(values, np.zeros(k.config.channels)).astype(np.float32),
        np.append(at[column] + group * stride, 0).astype(np.int32),
        starts.astype(np.int32),
    )
