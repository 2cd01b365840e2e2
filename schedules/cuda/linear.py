"""Fully connected layers: y[N, M] = clamp(x[N, K] @ w[M, K].T + b), dense and sparse.

A block of threads has one output of a few images: its threads share the row of weights, or the
row's nonzeros, and add up their sums. Rows lie in order, so the weights, which are what the time
goes into, are read in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import argument, prim_func, symbol
from topiarist.schedules.cpu.linear import LinearShape
from topiarist.schedules.cuda import emit

FloatArray = NDArray[np.float32]
THREADS = 128
IMAGES = 4  # that a block works on at a time


def dense_linear_prim_func(name: str, shape: LinearShape, lanes: int, threads: int) -> Any:
    """f(x, weights, bias, y)."""
    with prim_func(name) as builder:
        x = argument("x", shape.batch * shape.inputs)
        weights = argument("weights", shape.outputs * shape.inputs)
        bias = argument("bias", shape.outputs)
        y = argument("y", shape.batch * shape.outputs)
        with emit.grid((shape.outputs, 1), (THREADS, 1)) as ((row, _), (thread, _)):
            count = shape.inputs

            def term(j: Any) -> tuple[Any, Any]:
                return weights[row * count + j], j

            _row(shape, x, y, bias[row], row, thread, count, term)
    return builder.get()


def sparse_linear_prim_func(name: str, shape: LinearShape, lanes: int, threads: int) -> Any:
    """f(x, values, columns, starts, bias, y)."""
    with prim_func(name) as builder:
        nonzeros = symbol("nonzeros")
        x = argument("x", shape.batch * shape.inputs)
        values = argument("values", nonzeros)
        columns = argument("columns", nonzeros, "int32")
        starts = argument("starts", shape.outputs + 1, "int32")
        bias = argument("bias", shape.outputs)
        y = argument("y", shape.batch * shape.outputs)
        with emit.grid((shape.outputs, 1), (THREADS, 1)) as ((row, _), (thread, _)):
            begin = T.bind(starts[row])
            count = T.bind(starts[row + 1] - begin)

            def term(j: Any) -> tuple[Any, Any]:
                return values[begin + j], columns[begin + j]

            _row(shape, x, y, bias[row], row, thread, count, term)
    return builder.get()


def _row(
    shape: LinearShape, x: Any, y: Any, bias: Any, row: Any, thread: Any, count: Any, term: Any
) -> None:
    """One output of all images; `term(j)` is the j-th of `count` weights, and its input."""
    k = shape.inputs
    for first in range(0, shape.batch, IMAGES):
        images = range(first, min(first + IMAGES, shape.batch))
        sums = emit.local(len(images))
        for i in range(len(images)):
            T.buffer_store(sums, T.float32(0), [i])
        with T.serial(0, T.floordiv(count + THREADS - 1, THREADS)) as turn:
            j = T.bind(turn * THREADS + thread)
            with emit.when(j < count):
                weight, column = term(j)
                weight, column = T.bind(weight), T.bind(column)
                for i, image in enumerate(images):
                    T.buffer_store(sums, sums[i] + weight * x[image * k + column], [i])
        for i, image in enumerate(images):
            total = emit.sum_of_block(sums[i], thread, THREADS)
            with emit.when(thread == 0):
                value = emit.clamp(total + bias, shape.activation)
                T.buffer_store(y, value, [image * shape.outputs + row])


def pack_dense_linear(weight: FloatArray, lanes: int) -> FloatArray:
    """The weight [M, K], row by row."""
    return weight.ravel()


def pack_sparse_linear(
    weight: FloatArray, lanes: int
) -> tuple[FloatArray, NDArray[np.int32], NDArray[np.int32]]:
    """values, columns, starts of the weight [M, K]: CSR."""
    row, column = np.nonzero(weight)
    starts = np.searchsorted(row, np.arange(len(weight) + 1))
    # One entry of padding keeps an all-zero weight's buffers non-empty.
    return (
        np.append(weight[row, column], 0).astype(np.float32),
        np.append(column, 0).astype(np.int32),
        starts.astype(np.int32),
    )
