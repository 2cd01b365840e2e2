"""How much the batch norm that follows a layer scales each of its outputs."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from topiarist.pruning.layers import WeightedLayer, attribute


def output_scale(model: onnx.ModelProto, layer: WeightedLayer) -> NDArray[np.float64]:
    """|scale| / sqrt(variance + epsilon) for each filter [O]; ones where no batch norm follows.

    It follows if nothing else reads the layer's output. Scales that are all zero count as none.
    """
    output = layer.node.output[0]
    readers = [node for node in model.graph.node if output in node.input]
    ones = np.ones(len(layer.weight))
    if len(readers) != 1 or readers[0].op_type != "BatchNormalization":
        return ones
    if output in {value.name for value in model.graph.output}:
        return ones
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    names = readers[0].input[1], readers[0].input[4]
    if not all(name in stored for name in names):
        return ones
    gain, variance = (numpy_helper.to_array(stored[n]).astype(np.float64) for n in names)
    epsilon = attribute(readers[0], "epsilon", 1e-5)
    scale: NDArray[np.float64] = np.abs(gain) / np.sqrt(variance + epsilon)
    return scale if np.isfinite(scale).all() and scale.any() else ones
