"""Fully connected layers: y[N, M] = clamp(x[N, K] @ w[M, K].T + b), dense and sparse.

Dense weights are stored as [block of M][K][lanes of the block], so that the inner loop broadcasts
one input and reads the weights once, in order. Sparse weights are stored in slices of `lanes` rows
padded to the longest row of the slice (SELL): the values of a slice lie side by side, and the
inputs are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit

FloatArray = NDArray[np.float32]
BLOCK_VECTORS = 4


@dataclass(frozen=True)
class LinearShape:
    """y[batch, outputs] from x[batch, inputs]."""

    batch: int
    inputs: int
    outputs: int
    activation: emit.Clamp = (None, None)


@dataclass(frozen=True)
class _Segment:
    """`count` blocks of `vectors` vectors of `lanes` outputs, from output `first` on."""

    first: int
    count: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        return self.vectors * self.lanes


def _segments(outputs: int, lanes: int, vectors: int) -> list[_Segment]:
    """Full blocks first, then ever narrower vectors, down to one output."""
    found, first = [], 0
    while first < outputs:
        width = vectors * lanes
        count = (outputs - first) // width
        if count:
            found.append(_Segment(first, count, vectors, lanes))
            first += count * width
        if vectors > 1:
            vectors = 1
        else:
            lanes = max(1, lanes // 2)
    return found


def _vector(at: Any, lanes: int) -> Any:
    return emit.ramp(at, lanes) if lanes > 1 else at


def _splat(value: Any, lanes: int) -> Any:
    return emit.splat(value, lanes) if lanes > 1 else value


def _clamp(value: Any, bounds: emit.Clamp, lanes: int) -> Any:
    low, high = bounds
    if low is not None:
        value = T.max(value, _splat(T.float32(low), lanes))
    if high is not None:
        value = T.min(value, _splat(T.float32(high), lanes))
    return value


def dense_linear_prim_func(name: str, shape: LinearShape, lanes: int, threads: int) -> Any:
    """f(x, weights, bias, y)."""
    k, m = shape.inputs, shape.outputs
    with emit.prim_func(name) as builder:
        x = emit.argument("x", shape.batch * k)
        weights = emit.argument("weights", m * k)
        bias = emit.argument("bias", m)
        y = emit.argument("y", shape.batch * m)
        for segment in _segments(m, lanes, BLOCK_VECTORS):
            n, width = segment.lanes, segment.width
            with emit.loop(segment.count, threads) as o, T.serial(0, shape.batch) as image:
                first = segment.first + o * width
                at = [_vector(image * m + first + v * n, n) for v in range(segment.vectors)]
                for v in range(segment.vectors):
                    T.buffer_store(y, bias[_vector(first + v * n, n)], [at[v]])
                with T.serial(0, k) as j:
                    value = _splat(x[image * k + j], n)
                    for v in range(segment.vectors):
                        weight = weights[_vector(first * k + j * width + v * n, n)]
                        T.buffer_store(y, y[at[v]] + value * weight, [at[v]])
                for v in range(segment.vectors):
                    T.buffer_store(y, _clamp(y[at[v]], shape.activation, n), [at[v]])
    return builder.get()


def pack_dense_linear(weight: FloatArray, lanes: int) -> FloatArray:
    """The weight [M, K] as the dense kernel reads it."""
    parts = []
    for segment in _segments(weight.shape[0], lanes, BLOCK_VECTORS):
        rows = weight[segment.first : segment.first + segment.count * segment.width]
        block = rows.reshape(segment.count, segment.width, -1)
        parts.append(block.transpose(0, 2, 1).ravel())
    return np.concatenate(parts).astype(np.float32)


def sparse_linear_prim_func(name: str, shape: LinearShape, lanes: int, threads: int) -> Any:
    """f(x, values, columns, starts, bias, y); `starts` counts steps per slice of rows."""
    k, m = shape.inputs, shape.outputs
    segments = _segments(m, lanes, 1)
    slices = sum(segment.count for segment in segments)
    with emit.prim_func(name) as builder:
        count = emit.symbol("count")
        x = emit.argument("x", shape.batch * k)
        values = emit.argument("values", count)
        columns = emit.argument("columns", count, "int32")
        starts = emit.argument("starts", slices + 1, "int32")
        bias = emit.argument("bias", m)
        y = emit.argument("y", shape.batch * m)
        done = 0
        for segment in segments:
            n = segment.lanes
            with emit.loop(segment.count, threads) as o, T.serial(0, shape.batch) as image:
                first = segment.first + o * n
                at = _vector(image * m + first, n)
                T.buffer_store(y, bias[_vector(first, n)], [at])
                begin = T.bind(starts[done + o])
                steps = (starts[done + o + 1] - begin) // n
                with T.serial(0, steps) as j:
                    entry = _vector(begin + j * n, n)
                    picked = x[_splat(image * k, n) + columns[entry]]
                    T.buffer_store(y, y[at] + values[entry] * picked, [at])
                T.buffer_store(y, _clamp(y[at], shape.activation, n), [at])
            done += segment.count
    return builder.get()


def pack_sparse_linear(
    weight: FloatArray, lanes: int
) -> tuple[FloatArray, NDArray[np.int32], NDArray[np.int32]]:
    """values, columns, starts of the weight [M, K]; padding has the value 0 and column 0."""
    values: list[FloatArray] = []
    columns: list[NDArray[np.int32]] = []
    starts = [0]
    for segment in _segments(weight.shape[0], lanes, 1):
        for i in range(segment.count):
            first = segment.first + i * segment.lanes
            rows = [np.flatnonzero(row) for row in weight[first : first + segment.lanes]]
            steps = max(len(kept) for kept in rows)
            value = np.zeros((steps, segment.lanes), np.float32)
            column = np.zeros((steps, segment.lanes), np.int32)
            for lane, kept in enumerate(rows):
                value[: len(kept), lane] = weight[first + lane, kept]
                column[: len(kept), lane] = kept
            values.append(value.ravel())
            columns.append(column.ravel())
            starts.append(starts[-1] + steps * segment.lanes)
    # One entry of padding keeps an all-zero weight's buffers non-empty.
    pad = np.zeros(1)
    return (
        np.concatenate([*values, pad]).astype(np.float32),
        np.concatenate([*columns, pad]).astype(np.int32),
        np.asarray(starts, np.int32),
    )
