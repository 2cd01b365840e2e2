"""The nine networks that ship inside the onnx package without weights, given seeded weights.

Their accuracy means nothing; their layers are those of the real networks.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from topiarist.errors import ModelError

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
_IR_VERSION = 8  # the graphs are of version 3, which lists weights as inputs


def light_names() -> list[str]:
    """The names that `light_model` knows."""
    return sorted(path.stem.removeprefix("light_") for path in _FOLDER.glob("light_*.onnx"))


def light_model(name: str, seed: int = 0) -> onnx.ModelProto:
    """A network with He-normal weights and mild batch norms; the same seed gives the same model."""
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
    """ConstantOfShape(shape) -> an initializer of that shape, drawn for its reader."""
    shapes = {tensor.name: tensor for tensor in graph.initializer}
    readers = {
        name: (node.op_type, slot) for node in graph.node for slot, name in enumerate(node.input)
    }
    fillers = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    for node in fillers:
        shape = tuple(int(i) for i in numpy_helper.to_array(shapes[node.input[0]]))
        values = _draw(*readers[node.output[0]], shape, rng)
        graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    stale = {tensor.name for tensor in graph.initializer} - used
    for collection in (graph.initializer, graph.input):
        for item in [i for i in collection if i.name in stale]:
            collection.remove(item)


def _draw(
    reader: str, slot: int, shape: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.float32]:
    noise = rng.standard_normal(shape, np.float32)
    if reader in ("Conv", "Gemm") and slot == 1:
        return noise * np.float32(math.sqrt(2 / math.prod(shape[1:])))
    if reader == "BatchNormalization" and slot in (1, 4):
        return 1 + np.float32(0.1) * np.abs(noise)
    return np.float32(0.05) * noise
