"""Operators on sparse tensors, built and called with NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from tests.schedules.building import NAME, distinct_nans
from topiarist.schedules.formats.convolution import (
    Order,
    sparse_dense_prim_func,
    sparse_sparse_prim_func,
)
from topiarist.schedules.formats.tensors import FloatArray, SparseActivation, SparseWeight
from topiarist.schedules.workload import ConvWorkload, signature
from topiarist.targets import registry

Operator = Callable[..., list[NDArray[Any]]]
Shape = tuple[int, int, int]
ORDERS: tuple[Order, ...] = ("weights", "pixels")
DENSITIES = (0.0, 0.05, 0.5, 1.0)
UNDEFINED = 0x55555555  # of columns: whoever reads one crashes


def sparse(rng: np.random.Generator, density: float, *shape: int) -> FloatArray:
    """Normally distributed values, most of them zero; the first row of each half is empty."""
    values = rng.standard_normal(shape).astype(np.float32)
    values[rng.random(shape) >= density] = 0
    if density < 1:
        values[:: max(1, shape[0] // 2), 0] = 0
    return values


def build(function: Any) -> Operator:
    """A function of any density, built for this machine."""
    target = tvm.target.Target(registry.get(registry.HOST).tvm_target)
    executable = tvm.compile(tvm.IRModule({NAME: function}), target=target)

    def call(*arrays: NDArray[Any], outputs: int = 1) -> list[NDArray[Any]]:
        """Call it with arrays; the last of them afterwards."""
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
        executable[NAME](*tensors)
        return [tensor.numpy() for tensor in tensors[-outputs:]]

    return call


def to_rows(operator: Operator, shape: Shape, *inputs: NDArray[Any]) -> SparseActivation:
    """Call an operator whose output is a sparse activation, into buffers full of rubbish."""
    lines, width = shape[0] * shape[1], shape[2]
    rubbish = np.full(lines * width, UNDEFINED, np.int32)
    empty = (np.full(lines, -1, np.int32), rubbish, distinct_nans(lines * width))
    counts, columns, values = operator(*inputs, *empty, outputs=3)
    filled = np.arange(width) < counts[:, None]
    columns = columns.reshape(lines, width)
    assert (columns[~filled] == UNDEFINED).all(), "written beyond the end of a row"
    assert (np.diff(columns)[filled[:, 1:]] > 0).all(), "columns ascend"
    return SparseActivation(shape, counts, columns, values.reshape(lines, width))


def poisoned(activation: FloatArray) -> SparseActivation:
    """A sparse activation with rubbish behind the end of every row."""
    made = SparseActivation.from_dense(activation)
    filled = np.arange(made.shape[2]) < made.counts[:, None]
    columns = np.where(filled, made.columns, np.int32(UNDEFINED))
    values = np.where(filled, made.values, np.float32(np.nan))
    return SparseActivation(made.shape, made.counts, columns, values)


def workload_of(
    weight: FloatArray,
    plane: tuple[int, int],
    *,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: tuple[float | None, float | None] = (None, None),
) -> ConvWorkload:
    """The workload of a weight [O, C / groups, kh, kw] on one image."""
    outputs, channels, kh, kw = weight.shape
    return ConvWorkload(
        batch=1,
        in_channels=channels * groups,
        height=plane[0],
        width=plane[1],
        out_channels=outputs,
        kernel=(kh, kw),
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        sparsity=signature(weight, "unstructured"),
        activation=activation,
    )


@dataclass(frozen=True)
class Convolutions:
    """The operators of one layer, for operands of any density."""

    workload: ConvWorkload
    dense: Operator
    sparse: dict[Order, Operator]

    @staticmethod
    def build(workload: ConvWorkload, threads: int = 1) -> Convolutions:
        """Three functions."""
        functions = {o: sparse_sparse_prim_func(NAME, workload, threads, o) for o in ORDERS}
        dense = build(sparse_dense_prim_func(NAME, workload, threads))
        return Convolutions(workload, dense, {o: build(f) for o, f in functions.items()})

    @property
    def output(self) -> Shape:
        """[O, oh, ow]."""
        return self.workload.out_channels, self.workload.out_height, self.workload.out_width

    def by_dense(self, x: FloatArray, weight: FloatArray, bias: FloatArray) -> FloatArray:
        """A sparse weight times a dense activation [C, H, W]."""
        constants = SparseWeight.from_dense(weight).constants
        y = distinct_nans(math.prod(self.output))
        return self.dense(x.ravel(), *constants, bias, y)[0].reshape(self.output)

    def by_sparse(
        self, order: Order, x: FloatArray, weight: FloatArray, bias: FloatArray
    ) -> tuple[FloatArray, NDArray[np.int32]]:
        """A sparse weight times a sparse activation, and multiply-adds by filter."""
        constants = SparseWeight.from_dense(weight).constants
        y, pairs = distinct_nans(math.prod(self.output)), np.full(len(weight), -1, np.int32)
        inputs = (*poisoned(x).buffers, *constants, bias)
        y, pairs = self.sparse[order](*inputs, y, pairs, outputs=2)
        return y.reshape(self.output), pairs
