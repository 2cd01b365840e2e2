"""The network as layers: what analysis, choice and lowering work on.

A `Graph` is extracted from the imported Relax module. Each node is one layer with its epilogue
already fused; each edge is a `Value`. Nothing here knows a layout: shapes are logical, NCHW.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.workload import SINGLE, Mixture

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Value:
    """A tensor between layers. `shape` is [N, C, H, W], or any rank for opaque layers."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Activation:
    """`min(max(x, low), high)`; ReLU is (0, None), ReLU6 is (0, 6)."""

    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Node:
    """A layer: reads the values named in `inputs`, writes the value named `output`."""

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Conv(Node):
    """2-D convolution: `inputs` is (x,) or (x, residual).

    output = activation(conv(x, weight) + bias [+ residual])
    """

    weight: FloatArray  # [O, C / groups, kh, kw]
    bias: FloatArray  # [O]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: Activation | None = None
    dtype: str = SINGLE  # the least precise that factors may be rounded to

    residual_at: ClassVar[int] = 1  # its place among the inputs

    @property
    def residual(self) -> str | None:
        """The value added before the activation, if any."""
        return self.inputs[self.residual_at] if len(self.inputs) > self.residual_at else None


@dataclass(frozen=True, kw_only=True, eq=False)
class DynamicConv(Conv):
    """A convolution with a kernel for each image: `inputs` is (x, shares) or (x, shares, residual).

    output[n] = activation(conv(x[n], sum_p shares[n, p] * experts[p]) + bias [+ residual[n]])

    `shares` has the elements [N, P, O]. `weight` is 1 where the mixed kernels have values.
    """

    experts: FloatArray  # [P, O, I, kh, kw]

    residual_at: ClassVar[int] = 2

    @property
    def mixture(self) -> Mixture:
        """Which experts have weights at each position of the window."""
        masks = (self.experts != 0).any(axis=(1, 2)).reshape(len(self.experts), -1)
        holders = tuple(tuple(np.flatnonzero(at).tolist()) for at in masks.T)
        return Mixture(len(self.experts), holders)


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear(Node):
    """Fully connected: output[N, M] = activation(x[N, K] @ weight.T + bias)."""

    weight: FloatArray  # [M, K]
    bias: FloatArray  # [M]
    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Pool(Node):
    """Max or average pooling. The output shape is that of the output value."""

    mode: Literal["max", "avg"]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, left, bottom, right; bottom/right include ceil_mode
    count_include_pad: bool = False


@dataclass(frozen=True, kw_only=True)
class GlobalPool(Node):
    """Average over all pixels: [N, C, H, W] -> [N, C, 1, 1]."""


@dataclass(frozen=True, kw_only=True)
class Subsample(Node):
    """Every `strides`-th pixel: what a strided 1x1 convolution needs of its input."""

    strides: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Add(Node):
    """Sum of two values of one shape, then the activation."""

    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Node):
    """Per channel: activation(x * scale + shift). A lone activation has scale = shift = None."""

    scale: FloatArray | None = None  # [C]
    shift: FloatArray | None = None  # [C]
    activation: Activation | None = None


@dataclass(frozen=True, kw_only=True)
class Concat(Node):
    """Concatenation along channels."""


@dataclass(frozen=True, kw_only=True)
class View(Node):
    """The same elements in the same order with another shape (flatten, reshape, squeeze)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Opaque(Node):
    """Any other Relax operator, run on plain row-major tensors as TVM legalises it.

    `call` is the Relax call; its variable arguments are, in order, the values in `inputs`.
    """

    call: Any
    arguments: tuple[Any, ...] = field(default=())  # the relax.Var of each input


@dataclass(frozen=True)
class Graph:
    """Layers in topological order, and all values by name (inputs and outputs included)."""

    nodes: tuple[Node, ...]
    values: dict[str, Value]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def consumers(self, value: str) -> list[Node]:
        """The nodes that read the value."""
        return [n for n in self.nodes if value in n.inputs]
