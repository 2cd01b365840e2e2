"""Fully connected layers: y[N, M] = clamp(x[N, K] @ w[M, K].T + b), dense and sparse.

Dense weights are stored as [block of M][K][lanes of the block], so that the inner loop broadcasts
one input of each of a few images and reads the weights once, in order. Sparse weights are stored
in slices of `lanes` rows padded to the longest row of the slice (SELL): the values of a slice lie
side by side, and the inputs are gathered. The rows of a slice walk through the inputs side by
side, so what they gather lies close together.
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
IMAGES = {16: 4, 8: 2, 4: 2}  # by lanes: accumulators of so many images fit the registers
IN_BLOCK = 512  # inputs whose weights stay in the second-level cache over the images of a batch
AHEAD = 512  # values that weights are asked for ahead, where the processor sees too few steps ahead


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


@dataclass(frozen=True)
class _DenseRows:
    """The rows `first...` of a segment's block: all images, `images` of them at a time."""

    shape: LinearShape
    segment: _Segment
    first: Any
    images: int

    def emit(self, x: Any, weights: Any, bias: Any, y: Any) -> None:
        """Bias, products, clamp."""
        k, n, batch = self.shape.inputs, self.segment.lanes, self.shape.batch
        vectors = range(self.segment.vectors)
        with T.serial(0, batch) as image:
            for v in vectors:
                start = bias[_vector(self.first + v * n, n)]
                T.buffer_store(y, start, [self._at(image, v)])
        whole, rest = divmod(batch, self.images)
        block = k if batch <= self.images else IN_BLOCK
        for count, inputs, begin in ((k // block, block, 0), (1, k % block, k - k % block)):
            if not inputs:
                continue
            with T.serial(0, count) as q:
                j = begin + q * inputs
                if whole:
                    with T.serial(0, whole) as tile:
                        self._product(x, weights, y, (tile * self.images, self.images), (j, inputs))
                if rest:
                    self._product(x, weights, y, (whole * self.images, rest), (j, inputs))
        with T.serial(0, batch) as image:
            for v in vectors:
                at = self._at(image, v)
                T.buffer_store(y, _clamp(y[at], self.shape.activation, n), [at])

    def _at(self, image: Any, vector: int) -> Any:
        n = self.segment.lanes
        return _vector(image * self.shape.outputs + self.first + vector * n, n)

    def _product(
        self, x: Any, weights: Any, y: Any, images: tuple[Any, int], inputs: tuple[Any, int]
    ) -> None:
        """Add `inputs` (first, count) times their weights to the sums of `images`."""
        k, segment = self.shape.inputs, self.segment
        with T.serial(0, inputs[1]) as step:
            j = inputs[0] + step
            if self.shape.batch > 1:
                for v in range(segment.vectors):
                    ahead = AHEAD + v * segment.lanes
                    emit.prefetch(weights, self.first * k + j * segment.width + ahead)
            for i in range(images[1]):
                image = images[0] + i
                value = _splat(x[image * k + j], segment.lanes)
                for v in range(segment.vectors):
                    at = self.first * k + j * segment.width + v * segment.lanes
                    weight = weights[_vector(at, segment.lanes)]
                    to = self._at(image, v)
                    T.buffer_store(y, y[to] + value * weight, [to])


def dense_linear_prim_func(name: str, shape: LinearShape, lanes: int, threads: int) -> Any:
    """f(x, weights, bias, y)."""
    k, m = shape.inputs, shape.outputs
    with emit.prim_func(name) as builder:
        x = emit.argument("x", shape.batch * k)
        weights = emit.argument("weights", m * k)
        bias = emit.argument("bias", m)
        y = emit.argument("y", shape.batch * m)
        for segment in _segments(m, lanes, BLOCK_VECTORS):
            with emit.loop(segment.count, threads) as o:
                first = segment.first + o * segment.width
                _DenseRows(shape, segment, first, IMAGES[lanes]).emit(x, weights, bias, y)
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
        columns = emit.argument("columns", count, _column_type(k))
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
                    if n == lanes:
                        emit.prefetch(values, begin + j * n + AHEAD)
                        emit.prefetch(columns, begin + j * n + AHEAD)
                    column = T.cast(columns[entry], f"int32x{n}" if n > 1 else "int32")
                    if n > 1:
                        picked = emit.gather(x, image * k, column, n)
                    else:
                        picked = x[image * k + column]
                    T.buffer_store(y, y[at] + values[entry] * picked, [at])
                T.buffer_store(y, _clamp(y[at], shape.activation, n), [at])
            done += segment.count
    return builder.get()


def _column_type(inputs: int) -> str:
    """Two bytes an index where that is enough: the weights' bytes are what the time goes into."""
    return "uint16" if inputs <= 1 << 16 else "int32"


def pack_sparse_linear(
    weight: FloatArray, lanes: int
) -> tuple[FloatArray, NDArray[Any], NDArray[np.int32]]:
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
        np.concatenate([*columns, pad]).astype(_column_type(weight.shape[1])),
        np.asarray(starts, np.int32),
    )
