"""One Relax call as one layer, nothing fused yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.graph import (
    Activation,
    Add,
    Affine,
    Concat,
    Conv,
    FloatArray,
    GlobalPool,
    Linear,
    Node,
    Pool,
    View,
)
from topiarist.compiler.per_channel import match_scale_shift
from topiarist.compiler.relax_calls import (
    array_of,
    is_constant,
    operator_of,
    shape_of,
)


@dataclass(frozen=True)
class Site:
    """A call to read: its layer's name, the value it writes, and how to name other values."""

    name: str
    call: Any
    output: str
    shape: tuple[int, ...]
    dtype: str
    value_of: Callable[[Any], str]
    add_value: Callable[[str, tuple[int, ...]], str]

    def input(self, index: int = 0) -> Any:
        """An argument of the call."""
        return self.call.args[index]

    def ints(self, attribute: str) -> list[int]:
        """An attribute of the call that is a list of integers."""
        return [int(i) for i in getattr(self.call.attrs, attribute)]


def read_layer(site: Site) -> list[Node]:
    """The nodes for a call, or [] when it can only be opaque."""
    build = _BUILDERS.get(operator_of(site.call))
    if build is None or site.dtype != "float32":
        return []
    return build(site)


def _pair(values: list[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _four(values: list[int]) -> tuple[int, int, int, int]:
    top, left, bottom, right = values
    return top, left, bottom, right


def _float32(array: NDArray[Any]) -> FloatArray:
    return np.ascontiguousarray(array, np.float32)


def _conv(site: Site) -> list[Node]:
    attributes, weight = site.call.attrs, site.input(1)
    layouts = (str(attributes.data_layout), str(attributes.kernel_layout))
    if layouts != ("NCHW", "OIHW") or not is_constant(weight) or is_constant(site.input()):
        return []
    array = _float32(array_of(weight))
    return [
        Conv(
            name=site.name,
            inputs=(site.value_of(site.input()),),
            output=site.output,
            weight=array,
            bias=np.zeros(array.shape[0], np.float32),
            strides=_pair(site.ints("strides")),
            padding=_four(site.ints("padding")),
            dilation=_pair(site.ints("dilation")),
            groups=int(attributes.groups),
        )
    ]


def _linear(site: Site) -> list[Node]:
    data, weight = site.call.args
    if is_constant(data) or not is_constant(weight) or len(shape_of(data)) != 2:
        return []
    array = array_of(weight)
    if array.ndim != 2:
        return []
    return [
        Linear(
            name=site.name,
            inputs=(site.value_of(data),),
            output=site.output,
            weight=_float32(array.T),
            bias=np.zeros(array.shape[1], np.float32),
        )
    ]


def _pool(site: Site) -> list[Node]:
    attributes, data = site.call.attrs, site.input()
    kernel, strides = _pair(site.ints("pool_size")), _pair(site.ints("strides"))
    if str(attributes.layout) != "NCHW" or site.ints("dilation") != [1, 1]:
        return []
    top, left, bottom, right = _four(site.ints("padding"))
    mode = "max" if operator_of(site.call) == "nn.max_pool2d" else "avg"
    inputs = (site.value_of(data),)
    if mode == "avg" and kernel == shape_of(data)[2:] and not (top or left or bottom or right):
        return [GlobalPool(name=site.name, inputs=inputs, output=site.output)]
    return [
        Pool(
            name=site.name,
            inputs=inputs,
            output=site.output,
            mode="max" if mode == "max" else "avg",
            kernel=kernel,
            strides=strides,
            padding=(top, left, bottom, right),
            count_include_pad=bool(attributes.count_include_pad),
        )
    ]


def _mean(site: Site) -> list[Node]:
    data = site.input()
    shape, axes = shape_of(data), site.call.attrs.axis
    if len(shape) != 4 or axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
        return []
    inputs = (site.value_of(data),)
    if site.call.attrs.keepdims:
        return [GlobalPool(name=site.name, inputs=inputs, output=site.output)]
    pooled = site.add_value(f"{site.output}_pooled", (*shape[:2], 1, 1))
    return [
        GlobalPool(name=site.name, inputs=inputs, output=pooled),
        View(name=f"{site.name}.view", inputs=(pooled,), output=site.output),
    ]


def _arithmetic(site: Site) -> list[Node]:
    found = match_scale_shift(site.call)
    if found is None:
        return _add(site) if operator_of(site.call) == "add" else []
    if shape_of(found.data) != site.shape:
        return []
    return [
        Affine(
            name=site.name,
            inputs=(site.value_of(found.data),),
            output=site.output,
            scale=None if found.scale is None else _float32(found.scale),
            shift=None if found.shift is None else _float32(found.shift),
        )
    ]


def _add(site: Site) -> list[Node]:
    operands = list(site.call.args)
    if any(is_constant(operand) for operand in operands):
        return []
    if len({shape_of(operand) for operand in operands}) != 1 or len(site.shape) != 4:
        return []
    inputs = tuple(site.value_of(operand) for operand in operands)
    return [Add(name=site.name, inputs=inputs, output=site.output)]


def _activation(site: Site, activation: Activation) -> list[Node]:
    inputs = (site.value_of(site.input()),)
    return [Affine(name=site.name, inputs=inputs, output=site.output, activation=activation)]


def _relu(site: Site) -> list[Node]:
    return _activation(site, Activation(low=0.0))


def _clip(site: Site) -> list[Node]:
    low, high = (float(site.input(i).value) for i in (1, 2))
    bounds = (None if math.isinf(low) else low, None if math.isinf(high) else high)
    return _activation(site, Activation(*bounds))


def _bound(site: Site) -> list[Node]:
    """maximum or minimum with a scalar constant."""
    data, bound = site.call.args
    if is_constant(data) or not is_constant(bound) or array_of(bound).size != 1:
        return []
    if shape_of(data) != site.shape:
        return []
    value = float(array_of(bound).item())
    lower = operator_of(site.call) == "maximum"
    return _activation(site, Activation(low=value) if lower else Activation(high=value))


def _concat(site: Site) -> list[Node]:
    fields = list(getattr(site.input(), "fields", []))
    axis, rank = int(site.call.attrs.axis), len(site.shape)
    if not fields or any(is_constant(field) for field in fields) or rank != 4 or axis % 4 != 1:
        return []
    inputs = tuple(site.value_of(field) for field in fields)
    return [Concat(name=site.name, inputs=inputs, output=site.output)]


def _view(site: Site) -> list[Node]:
    return [View(name=site.name, inputs=(site.value_of(site.input()),), output=site.output)]


def _transpose(site: Site) -> list[Node]:
    """A transpose that moves axes of size 1 only is a view."""
    shape, axes = shape_of(site.input()), site.call.attrs.axes
    order = [int(a) % len(shape) for a in axes] if axes is not None else range(len(shape))[::-1]
    moved = [axis for axis in order if shape[axis] != 1]
    return _view(site) if moved == sorted(moved) else []


_BUILDERS: dict[str, Callable[[Site], list[Node]]] = {
    "add": _arithmetic,
    "clip": _clip,
    "concat": _concat,
    "divide": _arithmetic,
    "expand_dims": _view,
    "flatten": _view,
    "matmul": _linear,
    "maximum": _bound,
    "mean": _mean,
    "minimum": _bound,
    "multiply": _arithmetic,
    "nn.avg_pool2d": _pool,
    "nn.conv2d": _conv,
    "nn.max_pool2d": _pool,
    "nn.relu": _relu,
    "permute_dims": _transpose,
    "reshape": _view,
    "squeeze": _view,
    "subtract": _arithmetic,
}
