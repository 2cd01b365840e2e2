"""Small ONNX models, made in a line or two each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper


class Net:
    """Builds a model node by node; tensors are called by their names."""

    def __init__(self, opset: int = 13, seed: int = 0) -> None:
        self.opset = opset
        self.rng = np.random.default_rng(seed)
        self.inputs: list[Any] = []
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._count = 0

    def input(self, *shape: int | str, name: str = "x", dtype: int = TensorProto.FLOAT) -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def constant(self, array: Any, name: str = "") -> str:
        """An initializer."""
        name = name or f"c{self._next()}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int, name: str = "") -> str:
        """An initializer of He-normal values."""
        fan_in = math.prod(shape[1:]) or 1
        values = self.rng.standard_normal(shape) * math.sqrt(2 / fan_in)
        return self.constant(values.astype(np.float32), name)

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        return self.nodes_of(operator, *inputs, count=1, name=name, **attributes)[0]

    def nodes_of(
        self, operator: str, *inputs: str, count: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """A node with several outputs."""
        outputs = [f"t{self._next()}" for _ in range(count)]
        domain = attributes.pop("domain", "")
        self.nodes.append(
            helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def conv(self, data: str, out: int, into: int, kernel: int = 3, **attributes: Any) -> str:
        """A convolution with a bias and, unless told otherwise, the padding that keeps the size."""
        groups = attributes.get("group", 1)
        name = attributes.pop("name", "")
        if "auto_pad" not in attributes:
            attributes.setdefault("pads", [kernel // 2] * 4)
        weight = self.weight(out, into // groups, kernel, kernel, name=name and f"{name}.weight")
        return self.node("Conv", data, weight, self.weight(out), name=name, **attributes)

    def batch_norm(self, data: str, channels: int, name: str = "", **attributes: Any) -> str:
        """A batch norm with every parameter away from its neutral value."""
        scale, bias, mean = (self.rng.uniform(0.5, 1.5, channels) for _ in range(3))
        variance = self.rng.uniform(0.2, 2.0, channels)
        parameters = [self.constant(a.astype(np.float32)) for a in (scale, bias, mean, variance)]
        return self.node("BatchNormalization", data, *parameters, name=name, **attributes)

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The model with the given outputs."""
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.initializers)
        domains = {node.domain for node in self.nodes} - {""}
        imports = [
            helper.make_opsetid("", self.opset),
            *(helper.make_opsetid(d, 1) for d in domains),
        ]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    def _next(self) -> int:
        self._count += 1
        return self._count


def random_inputs(model: onnx.ModelProto, batch: int = 1, seed: int = 1) -> dict[str, NDArray[Any]]:
    """Normal values for each input that is no initializer; a dynamic first dimension is `batch`."""
    rng = np.random.default_rng(seed)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {}
    for value in model.graph.input:
        if value.name not in weights:
            shape = [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
            inputs[value.name] = rng.standard_normal(shape, np.float32)
    return inputs


def run_onnx(model: onnx.ModelProto, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """What ONNX Runtime says, without its graph optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[NDArray[Any]] = session.run(None, inputs)
    return results


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference, relative to the largest magnitude expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(actual.astype(np.float64) - expected).max()) / scale


def worst_error(actual: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> float:
    """The largest relative error of all outputs."""
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
