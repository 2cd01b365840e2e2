"""ONNX operators without weights, as PyTorch computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from topiarist.errors import TrainingError
from topiarist.pruning.layers import attribute


@dataclass(frozen=True)
class Call:
    """A node and its inputs; an absent one is None."""

    node: Any  # onnx.NodeProto
    inputs: Sequence[Any]

    def get(self, name: str, default: Any) -> Any:
        """An attribute."""
        return attribute(self.node, name, default)

    def text(self, name: str, default: str) -> str:
        """An attribute that is a string."""
        value = self.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def input(self, index: int) -> Any:
        """An input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def ints(self, index: int, name: str) -> list[int] | None:
        """What newer files have as an input and older ones as an attribute."""
        tensor = self.input(index)
        found = self.get(name, None) if tensor is None else tensor.tolist()
        return None if found is None else [int(i) for i in found]


def pads(node: Any, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """The padding of a window as `functional.pad` wants it: left, right, top, bottom."""
    mode = attribute(node, "auto_pad", b"NOTSET").decode()
    if mode == "VALID":
        return [0, 0, 0, 0]
    if not mode.startswith("SAME"):
        top, left, bottom, right = attribute(node, "pads", (0, 0, 0, 0))
        return [left, right, top, bottom]
    found: list[int] = []
    strides, dilations = (attribute(node, key, (1, 1)) for key in ("strides", "dilations"))
    for extent, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-extent // s) - 1) * s + (k - 1) * d + 1 - extent, 0)
        small, large = total // 2, total - total // 2
        found = ([small, large] if mode == "SAME_UPPER" else [large, small]) + found
    return found


def _max_pool(call: Call) -> Tensor:
    x, kernel = call.inputs[0], call.get("kernel_shape", ())
    padded = functional.pad(x, pads(call.node, x.shape[2:], kernel), value=-torch.inf)
    return functional.max_pool2d(
        padded,
        tuple(kernel),
        tuple(call.get("strides", (1, 1))),
        dilation=tuple(call.get("dilations", (1, 1))),
        ceil_mode=bool(call.get("ceil_mode", 0)),
    )


def _average_pool(call: Call) -> Tensor:
    x, kernel = call.inputs[0], tuple(call.get("kernel_shape", ()))
    sides = pads(call.node, x.shape[2:], kernel)

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(
            functional.pad(values, sides),
            kernel,
            tuple(call.get("strides", (1, 1))),
            ceil_mode=bool(call.get("ceil_mode", 0)),
        )

    if call.get("count_include_pad", 0) or not any(sides):
        return mean(x)
    return mean(x) / mean(torch.ones_like(x[:1, :1]))


def _clip(call: Call) -> Tensor:
    low, high = call.input(1), call.input(2)
    low = call.get("min", None) if low is None else low
    high = call.get("max", None) if high is None else high
    x: Tensor = call.inputs[0]
    return x if low is None and high is None else x.clamp(low, high)


def _pad(call: Call) -> Tensor:
    mode = call.text("mode", "constant")
    amounts, value = call.ints(1, "pads"), call.input(2)
    if mode != "constant" or amounts is None or call.input(3) is not None:
        raise TrainingError(f"Pad node {call.node.name!r}: only constant padding of all axes.")
    half = len(amounts) // 2
    sides = [a for i in reversed(range(half)) for a in (amounts[i], amounts[half + i])]
    fill = float(call.get("value", 0.0) if value is None else value)
    return functional.pad(call.inputs[0], sides, value=fill)


def _slice(call: Call) -> Tensor:
    x: Tensor = call.inputs[0]
    starts, ends, axes = (call.ints(i + 1, n) for i, n in enumerate(("starts", "ends", "axes")))
    assert starts is not None and ends is not None
    steps = call.ints(4, "steps") or [1] * len(starts)
    for axis, begin, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        size = x.shape[axis]
        if step < 0:
            raise TrainingError(f"Slice node {call.node.name!r} goes backwards.")
        picked = torch.arange(*slice(begin, end, step).indices(size), device=x.device)
        x = x.index_select(axis, picked)
    return x


def _reshape(call: Call) -> Tensor:
    x, shape = call.inputs[0], call.ints(1, "shape")
    assert shape is not None
    shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    if -1 not in shape[1:] and shape[0] != -1:
        shape[0] = -1  # a batch that was written into the file
    return x.reshape(shape)


def _flatten(call: Call) -> Tensor:
    x, axis = call.inputs[0], call.get("axis", 1) % (call.inputs[0].ndim + 1)
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1)


def _axes(call: Call) -> list[int]:
    found = call.ints(1, "axes")
    return list(range(call.inputs[0].ndim)) if found is None else found


def _reduce_mean(call: Call) -> Tensor:
    return call.inputs[0].mean(dim=_axes(call), keepdim=bool(call.get("keepdims", 1)))


def _squeeze(call: Call) -> Tensor:
    axes = call.ints(1, "axes")
    return call.inputs[0].squeeze() if axes is None else call.inputs[0].squeeze(tuple(axes))


def _unsqueeze(call: Call) -> Tensor:
    x = call.inputs[0]
    for axis in sorted(_axes(call)):
        x = x.unsqueeze(axis)
    return x


def _lrn(call: Call) -> Tensor:
    return functional.local_response_norm(
        call.inputs[0],
        call.get("size", 1),
        alpha=call.get("alpha", 1e-4),
        beta=call.get("beta", 0.75),
        k=call.get("bias", 1.0),
    )


def _gather(call: Call) -> Tensor:
    x, indices, axis = call.inputs[0], call.inputs[1], call.get("axis", 0)
    found: Tensor = x.index_select(axis, indices.reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis:][1:])


FUNCTIONS: dict[str, Callable[[Call], Any]] = {
    "Add": lambda c: c.inputs[0] + c.inputs[1],
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": lambda c: torch.cat(list(c.inputs), dim=c.get("axis", 1)),
    "Div": lambda c: c.inputs[0] / c.inputs[1],
    "Dropout": lambda c: c.inputs[0],
    "Flatten": _flatten,
    "Gather": _gather,
    "GlobalAveragePool": lambda c: c.inputs[0].mean(dim=(2, 3), keepdim=True),
    "GlobalMaxPool": lambda c: c.inputs[0].amax(dim=(2, 3), keepdim=True),
    "HardSigmoid": lambda c: (c.get("alpha", 0.2) * c.inputs[0] + c.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda c: functional.hardswish(c.inputs[0]),
    "Identity": lambda c: c.inputs[0],
    "LRN": _lrn,
    "LeakyRelu": lambda c: functional.leaky_relu(c.inputs[0], c.get("alpha", 0.01)),
    "LogSoftmax": lambda c: c.inputs[0].log_softmax(c.get("axis", -1)),
    "MaxPool": _max_pool,
    "Mul": lambda c: c.inputs[0] * c.inputs[1],
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": lambda c: functional.relu(c.inputs[0]),
    "Reshape": _reshape,
    "Shape": lambda c: torch.tensor(c.inputs[0].shape),
    "Sigmoid": lambda c: c.inputs[0].sigmoid(),
    "Slice": _slice,
    "Softmax": lambda c: c.inputs[0].softmax(c.get("axis", -1)),
    "Squeeze": _squeeze,
    "Sub": lambda c: c.inputs[0] - c.inputs[1],
    "Sum": lambda c: reduce(torch.add, c.inputs),
    "Tanh": lambda c: c.inputs[0].tanh(),
    "Transpose": lambda c: c.inputs[0].permute(c.get("perm", None)),
    "Unsqueeze": _unsqueeze,
}
