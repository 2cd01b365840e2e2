"""Follows channels through an ONNX graph: one rule for each kind of operator.

A rule says which channels an operator's output has, and what has to change in the operator when
some of them go. What no rule knows makes the channels that it reads uncuttable, with a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.pruning.layers import (
    WeightedLayer,
    attribute,
    constant_arrays,
    node_names,
    read_inside,
    weighted_layers,
)

Numbers = NDArray[np.intp]


_SMALL = 1000  # values of a constant that may be a shape


@dataclass(frozen=True, eq=False)
class Cut:
    """A constant with an entry along `axis` for each of the channels: input `input` of a node."""

    node: int
    input: int
    axis: int
    channels: Numbers

    def renumbered(self, number: Numbers) -> Cut:
        """The same with other channel numbers."""
        return replace(self, channels=number[self.channels])


@dataclass(frozen=True, eq=False)
class Count:
    """A place in a node where the number of these channels stands.

    `where` is an integer attribute, or entry `position` of an attribute or of a constant input.
    """

    node: int
    where: str | int
    position: int
    channels: Numbers

    def renumbered(self, number: Numbers) -> Count:
        """The same with other channel numbers."""
        return replace(self, channels=number[self.channels])


@dataclass(frozen=True, eq=False)
class FlowLayer:
    """A layer, and the channels that it reads and makes."""

    layer: WeightedLayer
    inputs: Numbers
    outputs: Numbers
    depthwise: bool


@dataclass(eq=False)
class Flow:
    """What is known so far; channels are numbered as they are made, and united by `unite`."""

    shapes: dict[str, tuple[int | None, ...]]
    constants: dict[str, NDArray[Any]]
    weighted: dict[str, WeightedLayer]  # by the value that the layer makes
    values: dict[str, Numbers] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    layers: list[FlowLayer] = field(default_factory=list)
    fixed: list[tuple[Numbers, str]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many channels were made."""
        return len(self.parents)

    def new(self, count: int) -> Numbers:
        """Channels that there were not before."""
        first = self.total
        self.parents.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, channel: int) -> int:
        """The first of the channels that this one is united with."""
        while self.parents[channel] != channel:
            self.parents[channel] = self.parents[self.parents[channel]]
            channel = self.parents[channel]
        return channel

    def unite(self, some: Numbers, others: Numbers) -> None:
        """Make the channels the same, one by one."""
        for one, other in zip(some.tolist(), others.tolist(), strict=True):
            first, second = sorted((self.root(one), self.root(other)))
            self.parents[second] = first

    def fix(self, channels: Numbers, reason: str) -> None:
        """Say that the channels can't be cut."""
        if channels.size:
            self.fixed.append((channels, reason))

    def rank(self, value: str) -> int:
        """The number of axes. Raises _NoRuleError if unknown."""
        if value not in self.shapes:
            raise _NoRuleError("has an input of unknown shape")
        return len(self.shapes[value])

    def pixels(self, value: str) -> int:
        """The product of all axes after the second. Raises _NoRuleError if one is unknown."""
        self.rank(value)
        sizes = [size for size in self.shapes[value][2:] if size is not None]
        if len(sizes) != len(self.shapes[value]) - 2:
            raise _NoRuleError("has an input of unknown size")
        return prod(sizes)


class _NoRuleError(Exception):
    """An operator does something to channels that can't be followed; the text says what."""


@dataclass(frozen=True, eq=False)
class _Site:
    """The node that a rule is asked about; `name` as in messages."""

    index: int
    node: Any  # onnx.NodeProto
    name: str

    def attribute(self, name: str, default: Any) -> Any:
        """The value of an attribute."""
        return attribute(self.node, name, default)


_Rule = Callable[[Flow, _Site], Numbers]


def follow_channels(model: onnx.ModelProto) -> Flow:
    """The channels of every value of the main graph. Raises ModelError for weights not loaded."""
    layers = weighted_layers(model)
    flow = Flow(_shapes(model), constant_arrays(model), {i.node.output[0]: i for i in layers})
    for value in model.graph.input:
        if value.name not in flow.constants and len(flow.shapes.get(value.name, ())) >= 2:
            channels = flow.new(flow.shapes[value.name][1] or 0)
            flow.values[value.name] = channels
            flow.fix(channels, f"the network's input {value.name!r} has them")
    for index, name in enumerate(node_names(model.graph)):
        _follow(flow, _Site(index, model.graph.node[index], name))
    for value in model.graph.output:
        flow.fix(_channels(flow, value.name), f"the network's output {value.name!r} has them")
    return flow


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """The shape of each value, as far as it can be inferred; None: open or unknown."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers as inputs: inference would copy them, up to 2 GiB."""
    light = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    stored = {tensor.name for tensor in model.graph.initializer}
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(v for v in model.graph.input if v.name not in stored)
    light.graph.output.extend(model.graph.output)
    light.graph.value_info.extend(model.graph.value_info)
    light.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= _SMALL:
            light.graph.initializer.append(tensor)
        else:
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return light


def _follow(flow: Flow, site: _Site) -> None:
    """Apply the node's rule, or fix the channels that it reads."""
    node = site.node
    if all(not name or name in flow.constants for name in node.input) or node.op_type == "Shape":
        return
    known = node.domain in ("", "ai.onnx")
    rule = _RULES.get(node.op_type) if known else None
    try:
        if rule is None:
            raise _NoRuleError("may mix its channels")
        if any(node.output[1:]) and node.op_type != "Dropout":
            raise _NoRuleError("has several outputs")
        flow.values[node.output[0]] = rule(flow, site)
    except _NoRuleError as error:
        reason = f"{node.op_type} {site.name} {error}"
        for name in (*node.input, *read_inside(node)):
            flow.fix(_channels(flow, name), reason)
        _fixed_outputs(flow, site, reason)


def _channels(flow: Flow, value: str) -> Numbers:
    """The channels of a value; none if they could not be followed."""
    return flow.values.get(value, np.empty(0, np.intp))


def _fixed_outputs(flow: Flow, site: _Site, reason: str) -> None:
    """Channels that are there to stay, for what an operator without a rule makes."""
    for name in site.node.output:
        shape = flow.shapes.get(name, ())
        if len(shape) >= 2 and shape[1]:
            flow.values[name] = flow.new(shape[1])
            flow.fix(flow.values[name], reason)
    layer = flow.weighted.get(site.node.output[0])
    if layer is not None:
        inputs = flow.new(layer.weight.shape[1] * layer.groups)
        outputs = flow.values.get(site.node.output[0], flow.new(0))
        if len(outputs) != len(layer.weight):
            outputs = flow.new(len(layer.weight))
        flow.fix(np.concatenate([inputs, outputs]), reason)
        flow.layers.append(FlowLayer(layer, inputs, outputs, depthwise=False))


def _data(flow: Flow, site: _Site, number: int = 0) -> Numbers:
    """The channels of an input. Raises _NoRuleError if it has none that are known."""
    channels = _channels(flow, site.node.input[number])
    if not channels.size:
        raise _NoRuleError("reads channels that can't be followed")
    return channels


def _constant(flow: Flow, site: _Site, number: int) -> NDArray[Any]:
    """A constant input. Raises _NoRuleError if it is none."""
    name = site.node.input[number] if number < len(site.node.input) else ""
    if name not in flow.constants:
        raise _NoRuleError(f"has no constant as input {number}")
    return flow.constants[name]


def _integers(flow: Flow, site: _Site, name: str, number: int) -> list[int] | None:
    """A list that is an attribute or, in newer opsets, a constant input; None without one."""
    found = site.attribute(name, None)
    if found is None and number < len(site.node.input) and site.node.input[number]:
        found = _constant(flow, site, number).reshape(-1).tolist()
    return None if found is None else [int(item) for item in found]


def _conv(flow: Flow, site: _Site) -> Numbers:
    """New channels, one a filter; a depthwise convolution keeps its input's."""
    layer, inputs = _layer(flow, site), _data(flow, site)
    depthwise = layer.groups > 1 and layer.weight.shape[1] == 1
    if layer.groups > 1 and not depthwise:
        raise _NoRuleError(f"is a convolution in {layer.groups} groups of equal size")
    filters = layer.weight.shape[0]
    if depthwise:
        outputs = np.repeat(inputs, filters // layer.groups)
        flow.counts.append(Count(site.index, "group", 0, inputs))
    else:
        outputs = flow.new(filters)
        flow.cuts.append(Cut(site.index, 1, 1, inputs))
    flow.cuts.append(Cut(site.index, 1, 0, outputs))
    if len(site.node.input) > 2 and site.node.input[2]:
        _constant(flow, site, 2)
        flow.cuts.append(Cut(site.index, 2, 0, outputs))
    flow.layers.append(FlowLayer(layer, inputs, outputs, depthwise))
    return outputs


def _fully_connected(flow: Flow, site: _Site) -> Numbers:
    """Gemm or MatMul with a constant matrix: new channels, one a row."""
    layer, inputs = _layer(flow, site), _data(flow, site)
    if flow.rank(site.node.input[0]) != 2 or site.attribute("transA", 0):
        raise _NoRuleError("multiplies along another axis")
    outputs = flow.new(layer.weight.shape[0])
    flow.cuts.append(Cut(site.index, 1, 0 if layer.transposed else 1, inputs))
    flow.cuts.append(Cut(site.index, 1, 1 if layer.transposed else 0, outputs))
    if len(site.node.input) > 2 and site.node.input[2]:
        _cut_broadcast(flow, site, 2, outputs, rank=2)
    flow.layers.append(FlowLayer(layer, inputs, outputs, depthwise=False))
    return outputs


def _layer(flow: Flow, site: _Site) -> WeightedLayer:
    """The layer, if its weights are constant."""
    layer = flow.weighted.get(site.node.output[0])
    if layer is None:
        raise _NoRuleError("has no constant floating-point weights")
    return layer


def _cut_broadcast(flow: Flow, site: _Site, number: int, channels: Numbers, rank: int) -> None:
    """A constant operand of a value with `rank` axes: cut it if it has an entry a channel."""
    array = _constant(flow, site, number)
    axis = array.ndim - rank + 1
    if axis >= 0 and array.shape[axis] > 1:
        flow.cuts.append(Cut(site.index, number, axis, channels))


def _elementwise(flow: Flow, site: _Site) -> Numbers:
    """All operands have the same channels, or one for all."""
    rank = flow.rank(site.node.output[0])
    size = flow.shapes[site.node.output[0]][1] if rank >= 2 else None
    operands = [name for name in site.node.input if name and name not in flow.constants]
    if size is None:
        raise _NoRuleError("makes a value of unknown shape")
    found = []
    for name in operands:
        axis = flow.rank(name) - rank + 1
        if axis < 0 or flow.shapes[name][axis] == 1 != size:
            flow.fix(_channels(flow, name), f"{site.node.op_type} {site.name} spreads them")
        elif axis != 1 or not _channels(flow, name).size:
            raise _NoRuleError("has an operand whose channels can't be followed")
        else:
            found.append(_channels(flow, name))
    if not found:
        raise _NoRuleError("makes channels out of one")
    for other in found[1:]:
        flow.unite(found[0], other)
    for number, name in enumerate(site.node.input):
        if name in flow.constants:
            _cut_broadcast(flow, site, number, found[0], rank)
    return found[0]


def _same(flow: Flow, site: _Site) -> Numbers:
    """Every channel by itself, constants are for all."""
    return _data(flow, site)


def _per_channel(flow: Flow, site: _Site) -> Numbers:
    """Batch or instance norm: an entry in each parameter for each channel."""
    channels = _data(flow, site)
    for number in range(1, len(site.node.input)):
        _constant(flow, site, number)
        flow.cuts.append(Cut(site.index, number, 0, channels))
    return channels


def _concat(flow: Flow, site: _Site) -> Numbers:
    """The channels of all inputs, in order, or the same ones side by side."""
    axis = site.attribute("axis", 1)
    parts = [_data(flow, site, number) for number in range(len(site.node.input))]
    if axis in (1, 1 - flow.rank(site.node.input[0])):
        return np.concatenate(parts)
    for part in parts[1:]:
        flow.unite(parts[0], part)
    return parts[0]


def _flatten(flow: Flow, site: _Site) -> Numbers:
    """[N, C, ...] -> [N, C * pixels]."""
    if site.attribute("axis", 1) != 1:
        raise _NoRuleError("flattens from another axis")
    return np.repeat(_data(flow, site), flow.pixels(site.node.input[0]))


def _reshape(flow: Flow, site: _Site) -> Numbers:
    """[N, C, pixels] -> [N, C * pixels], or another arrangement of the pixels alone."""
    channels, pixels = _data(flow, site), flow.pixels(site.node.input[0])
    batch = flow.shapes[site.node.input[0]][0]
    wanted = _integers(flow, site, "shape", 1) or []
    if len(wanted) < 2 or wanted[0] not in (0, -1, batch):
        raise _NoRuleError("moves the batch")
    result = flow.shapes.get(site.node.output[0], ())
    rest = [size or 0 for size in result[2:]]
    if len(result) != len(wanted):
        raise _NoRuleError("makes a value of unknown shape")
    if prod(rest) == pixels and (wanted[1] == 0 or result[1] == len(channels)):
        outputs = channels
    elif prod(rest) == 1 and (wanted[1] == -1 or result[1] == len(channels) * pixels):
        outputs = np.repeat(channels, pixels)
    else:
        raise _NoRuleError("mixes channels and pixels")
    if wanted[1] > 0:
        flow.counts.append(Count(site.index, 1, 1, outputs))
    return outputs


def _pixel_axes(flow: Flow, site: _Site) -> Numbers:
    """Reduce, Slice, Squeeze and their like, along axes after the channels'."""
    number = 3 if site.node.op_type == "Slice" else 1
    axes = _integers(flow, site, "axes", number)
    widens = site.node.op_type == "Unsqueeze"
    rank = flow.rank(site.node.output[0] if widens else site.node.input[0])
    if not axes or any(axis % rank < 2 for axis in axes):
        raise _NoRuleError("works along the channels")
    return _data(flow, site)


def _resize(flow: Flow, site: _Site) -> Numbers:
    """Scales of the pixels alone."""
    number = 1 if site.node.op_type == "Upsample" or len(site.node.input) == 2 else 2
    scales = site.attribute("scales", None)
    scales = _constant(flow, site, number).tolist() if scales is None else scales
    if len(scales) != flow.rank(site.node.input[0]) or scales[0] != 1 or scales[1] != 1:
        raise _NoRuleError("may resize more than the pixels")
    return _data(flow, site)


def _pad(flow: Flow, site: _Site) -> Numbers:
    """New channels before and after the input's, or only pixels."""
    channels, rank = _data(flow, site), flow.rank(site.node.input[0])
    pads = _integers(flow, site, "pads", 1) or []
    if len(pads) != 2 * rank or min(pads[1], pads[rank + 1]) < 0:
        raise _NoRuleError("cuts channels off")
    if not pads[1] and not pads[rank + 1]:
        return channels
    if site.attribute("mode", b"constant") != b"constant":
        raise _NoRuleError("repeats channels")
    before, after = flow.new(pads[1]), flow.new(pads[rank + 1])
    where = "pads" if len(site.node.input) < 2 else 1
    flow.counts.append(Count(site.index, where, 1, before))
    flow.counts.append(Count(site.index, where, rank + 1, after))
    return np.concatenate([before, channels, after])


_UNARY = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal",
    "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh",
    "ThresholdedRelu",
)  # fmt: skip
_POOLS = (
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool",
)  # fmt: skip
_BINARY = ("Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum")
_ALONG_AXES = (
    "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Slice",
    "Squeeze", "Unsqueeze",
)  # fmt: skip
_RULES: dict[str, _Rule] = {
    **dict.fromkeys((*_UNARY, *_POOLS), _same),
    **dict.fromkeys(_BINARY, _elementwise),
    **dict.fromkeys(_ALONG_AXES, _pixel_axes),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), _per_channel),
    **dict.fromkeys(("Gemm", "MatMul"), _fully_connected),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Concat": _concat,
    "Conv": _conv,
    "Flatten": _flatten,
    "Pad": _pad,
    "Reshape": _reshape,
}
