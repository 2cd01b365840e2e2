"""An ONNX file as a PyTorch module, to be trained and written back under the same names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from topiarist.errors import TrainingError
from topiarist.pruning.gsl.onnx_functions import FUNCTIONS, Call, pads
from topiarist.pruning.layers import (
    WeightedLayer,
    attribute,
    constant_arrays,
    replace_weights,
    weighted_layers,
)


@dataclass(frozen=True)
class _Stored:
    """A tensor that is trained, and what it is in the file; `layer` if it is a layer's weight."""

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    layer: WeightedLayer | None = None

    def array(self) -> NDArray[Any]:
        """As it goes into the file."""
        found = self.tensor.detach().cpu().numpy().reshape(self.shape).astype(self.dtype)
        return found if self.layer is None else self.layer.as_stored(found)


class OnnxNetwork(nn.Module):
    """Walks the graph; convolutions, fully connected layers and batch norms are submodules.

    `layers` has the layers with weights by the names that the compiler knows them by. Takes one
    input and gives the first output, before its softmax if it has one. Raises TrainingError for
    what can't be trained.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.model = model
        self._constants = constant_arrays(model)
        self._input, self._output = _the_input(model), _logits(model)
        self._steps: list[tuple[Any, Callable[..., Any]]] = []
        self._stored: list[_Stored] = []
        self.layers: dict[str, nn.Module] = {}
        weighted = {layer.node.output[0]: layer for layer in weighted_layers(model)}
        parameters: dict[str, nn.Parameter] = {}
        for index, node in enumerate(model.graph.node):
            if node.output[0] in self._constants:
                continue
            module = self._module(node, weighted.get(node.output[0]), parameters)
            if module is not None:
                self.add_module(f"node_{index}", module)
            self._steps.append((node, _function(node) if module is None else module))
        for name, array in self._constants.items():
            if name not in parameters and np.issubdtype(array.dtype, np.floating):
                self._constants[name] = array.astype(np.float32)

    def forward(self, x: Tensor) -> Any:
        """[N, ...] -> the first output."""
        values: dict[str, Any] = {self._input: x}
        for node, function in self._steps:
            if isinstance(function, nn.Module):
                found = function(self._value(values, node.input[0]))
            else:
                found = function(Call(node, [self._value(values, name) for name in node.input]))
            values[node.output[0]] = found
        return values[self._output]

    def to_onnx(self) -> onnx.ModelProto:
        """A copy of the file with the weights of now."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.model)
        replace_weights(copy, {one.name: one.array() for one in self._stored})
        return copy

    def _value(self, values: dict[str, Any], name: str) -> Any:
        if name in values:
            return values[name]
        constant = self._constants.get(name)
        return None if constant is None else torch.tensor(constant)

    def _module(
        self, node: Any, layer: WeightedLayer | None, parameters: dict[str, nn.Parameter]
    ) -> nn.Module | None:
        """The submodule of a node with weights, None for other operators."""
        if node.op_type == "BatchNormalization":
            return self._batch_norm(node, parameters)
        if layer is None:
            return None
        module = self._conv(layer) if layer.kind == "Conv" else self._linear(layer)
        if layer.weight_name in parameters:  # one weight for several layers
            module.weight = parameters[layer.weight_name]
        else:
            parameters[layer.weight_name] = module.weight
            with torch.no_grad():
                module.weight.copy_(_tensor(layer.weight).view_as(module.weight))
            kind = layer.weight.shape, layer.weight.dtype
            self._stored.append(_Stored(layer.weight_name, module.weight, *kind, layer))
        if module.bias is not None:
            module.bias = self._parameter(node.input[2], node, parameters)
        self.layers[layer.name] = module
        return module

    def _conv(self, layer: WeightedLayer) -> nn.Module:
        if len(layer.stored_shape) != 4:
            raise TrainingError(f"{_named(layer.node)} is not a 2-D convolution.")
        out, into, *kernel = layer.weight.shape
        node = layer.node
        strides = tuple(attribute(node, "strides", (1, 1)))
        dilations = tuple(attribute(node, "dilations", (1, 1)))
        conv = _PaddedConv2d(
            into * layer.groups,
            out,
            tuple(kernel),
            strides,
            dilation=dilations,
            groups=layer.groups,
            bias=len(node.input) > 2 and bool(node.input[2]),
        )
        conv.node = node
        return conv

    def _linear(self, layer: WeightedLayer) -> nn.Module:
        node = layer.node
        out, into = layer.weight.shape[:2]
        plain = all(attribute(node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if attribute(node, "transA", 0) or not plain:
            raise TrainingError(f"{_named(node)} scales or transposes: that can't be trained.")
        return nn.Linear(into, out, bias=len(node.input) > 2 and bool(node.input[2]))

    def _batch_norm(self, node: Any, parameters: dict[str, nn.Parameter]) -> nn.Module:
        arrays = [self._constants.get(name) for name in node.input[1:5]]
        if any(array is None for array in arrays):
            raise TrainingError(f"{_named(node)} has statistics that are computed at run time.")
        mean, var = (np.asarray(array) for array in arrays[2:])
        norm = nn.BatchNorm2d(
            mean.size,
            eps=attribute(node, "epsilon", 1e-5),
            momentum=1 - attribute(node, "momentum", 0.9),
        )
        norm.weight = self._parameter(node.input[1], node, parameters)
        norm.bias = self._parameter(node.input[2], node, parameters)
        for buffer, name, like in (
            (norm.running_mean, node.input[3], mean),
            (norm.running_var, node.input[4], var),
        ):
            buffer.copy_(_tensor(like))
            self._stored.append(_Stored(name, buffer, like.shape, like.dtype))
        return norm

    def _parameter(self, name: str, node: Any, parameters: dict[str, nn.Parameter]) -> nn.Parameter:
        """A bias or scale; one that several nodes read is one parameter."""
        if name not in parameters:
            array = self._constants.get(name)
            if array is None:
                raise TrainingError(f"{_named(node)} has a bias that is computed at run time.")
            parameters[name] = nn.Parameter(_tensor(array).reshape(-1))
            self._stored.append(_Stored(name, parameters[name], array.shape, array.dtype))
        return parameters[name]


_TRAINED = ("BatchNormalization", "Conv", "Gemm", "MatMul")


def _function(node: Any) -> Callable[[Call], Any]:
    """What computes a node without weights."""
    if node.domain in ("", "ai.onnx") and node.op_type in FUNCTIONS:
        return FUNCTIONS[node.op_type]
    raise TrainingError(
        f"{_named(node)} can't be trained through: topiarist's training knows "
        f"{', '.join(sorted([*FUNCTIONS, *_TRAINED]))}. Train the network where it was made "
        "(topiarist.pruning.gsl), or cut it before this node."
    )


class _PaddedConv2d(nn.Conv2d):
    """With ONNX's paddings, which may differ from side to side."""

    node: Any

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H', W']."""
        sides = pads(self.node, x.shape[2:], self.kernel_size)
        return super().forward(functional.pad(x, sides) if any(sides) else x)


def _the_input(model: onnx.ModelProto) -> str:
    stored = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in stored]
    if len(names) != 1:
        raise TrainingError(f"Training takes networks with one input, this has {len(names)}.")
    return str(names[0])


def _logits(model: onnx.ModelProto) -> str:
    """The output, or what its softmax reads: losses take scores."""
    name = model.graph.output[0].name
    last = next((node for node in model.graph.node if name in node.output), None)
    return str(last.input[0] if last is not None and last.op_type == "Softmax" else name)


def _named(node: Any) -> str:
    return f"{node.op_type} node {node.name or node.output[0]!r}"


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32))
