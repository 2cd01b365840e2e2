"""The nine networks that ship inside the onnx package without weights, given seeded weights.

Their accuracy means nothing; their layers are those of the real networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from topiarist.errors import ModelError

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
_WEIGHTED = ("Conv", "Gemm")
_GAIN = {
    "AveragePool": 0.9,
    "BatchNormalization": 1.09,
    "GlobalAveragePool": 0.5,
    "MaxPool": 2.0,
    "Mul": 1.17,
}  # of the mean square
_SCORES_STD = 3.0  # of the last layer, about
_BRANCH = 0.5
_IR_VERSION = 8  # the graphs are of version 3, which lists weights as inputs


class _Size(NamedTuple):
    """The mean square of a tensor's values, and the part of it that is of negative values."""

    square: float = 1.0
    negative: float = 0.5


def light_names() -> list[str]:
    """The names that `light_model` knows."""
    return sorted(path.stem.removeprefix("light_") for path in _FOLDER.glob("light_*.onnx"))


def light_model(name: str, seed: int = 0) -> onnx.ModelProto:
    """A network with normal weights and mild batch norms; the same seed gives the same model.

    The weights are scaled so that values keep their size from layer to layer and the scores have
    a standard deviation of a few: a softmax of them is not all zeros and a one.
    """
    path = _FOLDER / f"light_{name}.onnx"
    if not path.is_file():
        raise ModelError(f"There is no light model {name!r}; there are {', '.join(light_names())}.")
    model = onnx.load(path)
    _fill_weights(model.graph, np.random.default_rng(seed))
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for node in model.graph.node:
        node.name = ""  # they are only counted: layers get the names of their weights
    model.ir_version = _IR_VERSION
    return model


def _fill_weights(graph: onnx.GraphProto, rng: np.random.Generator) -> None:
    """ConstantOfShape(shape) -> an initializer of that shape, drawn for its reader.

    Small weights ship with their trained values, which don't fit drawn ones: they are drawn, too.
    """
    stored = {tensor.name: tensor for tensor in graph.initializer}
    fillers = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    shape_of = {
        node.output[0]: tuple(int(i) for i in numpy_helper.to_array(stored[node.input[0]]))
        for node in fillers
    }
    for node in fillers:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for name, tensor in stored.items():
        if name in used and tensor.data_type == onnx.TensorProto.FLOAT:
            shape_of[name] = tuple(tensor.dims)
    drawn = [numpy_helper.from_array(values, name) for name, values in _drawn(graph, shape_of, rng)]
    kept = [tensor for name, tensor in stored.items() if name in used and name not in shape_of]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *drawn])
    inputs = [value for value in graph.input if value.name in used]
    del graph.input[:]
    graph.input.extend(inputs)


def _drawn(
    graph: onnx.GraphProto, shape_of: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each weight by name, drawn when its first reader comes, for the size of what that reads."""
    weight_of = {name: name for name in shape_of} | {
        node.output[0]: node.input[0] for node in graph.node if node.op_type == "Unsqueeze"
    }
    factors = {weight_of[name] for name in _read_as_factors(graph) & set(weight_of)}
    waiting = dict.fromkeys(shape_of)
    sizes: dict[str, _Size] = {}
    last = [node.output[0] for node in graph.node if node.op_type in _WEIGHTED][-1]
    added = {name for node in graph.node if node.op_type == "Sum" for name in node.input}
    for node in graph.node:
        out = node.output[0]
        gain = _SCORES_STD if out == last else 1.0
        if node.op_type == "BatchNormalization" and out in added:
            gain = _BRANCH  # or residuals would grow from block to block
        square = sizes.get(node.input[0], _Size()).square
        for slot, name in enumerate(node.input):
            weight = weight_of.get(name)
            if weight not in waiting or node.op_type == "Unsqueeze":
                continue
            del waiting[weight]
            values = rng.standard_normal(shape_of[weight], np.float32)
            if node.op_type in _WEIGHTED and slot == 1:
                values *= np.float32(gain / math.sqrt(square * math.prod(values.shape[1:])))
            elif weight in factors:
                values = (1 + np.float32(0.1) * np.abs(values)) * np.float32(
                    gain if slot == 1 else 1
                )
            else:
                values *= np.float32(0.05)
            yield weight, values
        after = _size_after(node, sizes)
        sizes[out] = _Size(after.square * gain**2, after.negative * gain**2)


def _read_as_factors(graph: onnx.GraphProto) -> set[str]:
    """What scales and variances are read from; some models share one weight between all uses."""
    norms = [node for node in graph.node if node.op_type == "BatchNormalization"]
    scales = {name for node in graph.node if node.op_type == "Mul" for name in node.input}
    return scales.union(*((node.input[1], node.input[4]) for node in norms))


def _size_after(node: onnx.NodeProto, sizes: dict[str, _Size]) -> _Size:
    """About the size of a node's results, from those of its inputs."""
    known = [sizes[name] for name in node.input if name in sizes] or [_Size()]
    if node.op_type in _WEIGHTED:
        return _Size()
    if node.op_type == "Relu":
        return _Size(known[0].square - known[0].negative, 0.0)
    if node.op_type == "Sum":  # what is never negative lifts the rest above zero
        square, negative = (sum(size) for size in zip(*known, strict=True))
        return _Size(square, negative * negative / (2.5 * square))
    gain, largest = _GAIN.get(node.op_type, 1.0), max(known)
    return _Size(largest.square * gain, largest.negative * gain)
