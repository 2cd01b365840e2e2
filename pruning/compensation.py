"""Lets the layers that read channels make up for those that are cut, from calibration images.

Layer after layer, the weight and the bias are fitted anew, so that from the inputs that the cut
network has the layer makes what it made in the whole one, in the mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy import linalg

from topiarist.pruning.calibration import Arrays, Images
from topiarist.pruning.channel_order import MOST_COLUMNS
from topiarist.pruning.channels import LayerChannels, Numbers, channel_map
from topiarist.pruning.forward import chunks, run_chunks
from topiarist.pruning.layers import WeightedLayer, attribute, constant_arrays, replace_inputs
from topiarist.pruning.moments import DAMPING, unfold

Array = NDArray[np.float64]


def compensate(
    model: onnx.ModelProto,
    kept: Mapping[str, Sequence[int] | Numbers],
    images: Images,
    progress: Callable[[float], None] = lambda share: None,
) -> onnx.ModelProto:
    """A copy of the model that no longer reads the channels that `shrink(model, kept)` cuts.

    The layers that read them are refitted, those with more than MOST_COLUMNS inputs not. Raises
    ValueError as `shrink` does, CalibrationError for images that the model doesn't take.
    """
    channels = channel_map(model)
    mask = channels.mask(kept)
    constants = constant_arrays(model)
    nodes = {node.output[0]: index for index, node in enumerate(model.graph.node)}
    reading = [i for i in channels.layers if not i.depthwise and not mask[i.inputs].all()]
    stay = {i.layer.name: _kept_columns(i, mask) for i in reading}
    fitted = onnx.ModelProto()
    fitted.CopyFrom(model)
    without = {
        (nodes[i.layer.node.output[0]], 1): i.layer.as_stored(_without(i.layer, stay[i.layer.name]))
        for i in reading
    }
    replace_inputs(fitted.graph, without)
    portions = chunks(model, images)
    for done, item in enumerate(reading, 1):
        layer, index = item.layer, nodes[item.layer.node.output[0]]
        if layer.weight[0].size <= MOST_COLUMNS:
            weight, bias = _fit(layer, stay[layer.name], model, fitted, portions)
            places = {(index, 1): layer.as_stored(weight)}
            if layer.kind != "MatMul":
                places[index, 2] = _new_bias(layer, constants, bias)
            replace_inputs(fitted.graph, places)
        progress(done / len(reading))
    return fitted


def _kept_columns(item: LayerChannels, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which columns [c] of a layer's weight read channels that stay."""
    return np.repeat(mask[item.inputs], item.layer.weight[0, 0].size)


def _without(layer: WeightedLayer, stay: NDArray[np.bool_]) -> NDArray[Any]:
    """The weight with zeros in the columns that go."""
    return np.where(stay.reshape(layer.weight.shape[1:]), layer.weight, layer.weight.dtype.type(0))


def _fit(
    layer: WeightedLayer,
    stay: NDArray[np.bool_],
    whole: onnx.ModelProto,
    cut: onnx.ModelProto,
    portions: Sequence[Arrays],
) -> tuple[NDArray[Any], Array]:
    """The weight of the least squared error on the cut network's values, and what its bias gains.

    Damped towards the weight as it was. Without a bias to change, only the weight is fitted.
    """
    name = layer.node.input[0]
    has_bias = layer.kind != "MatMul"
    kept = np.append(np.flatnonzero(stay), [stay.size] if has_bias else []).astype(np.intp)
    square = np.zeros((kept.size, kept.size))
    cross = np.zeros((stay.size + 1, kept.size))
    places = 0
    runs = zip(run_chunks(whole, portions, [name]), run_chunks(cut, portions, [name]), strict=True)
    for before, after in runs:
        x, reduced = _columns(layer, before[name]), _columns(layer, after[name])[kept]
        square += reduced @ reduced.T
        cross += x @ reduced.T
        places += x.shape[1]
    weight = layer.weight.astype(np.float64).reshape(len(layer.weight), -1)
    start = np.zeros((len(weight), kept.size))
    start[:, : np.count_nonzero(stay)] = weight[:, stay]
    missing = (weight @ cross[:-1] - start @ square) / places
    square /= places
    damping = np.full(kept.size, DAMPING * float(np.diagonal(square).mean()) + 1e-12)
    if has_bias:
        damping[-1] = 0
    start += linalg.solve(square + np.diag(damping), missing.T, assume_a="pos").T
    result = np.zeros_like(weight)
    result[:, stay] = start[:, : np.count_nonzero(stay)]
    return result.reshape(layer.weight.shape).astype(layer.weight.dtype), start[:, -1]


def _columns(layer: WeightedLayer, values: NDArray[Any]) -> Array:
    """What the weight is multiplied with, and a row of ones: [c + 1, places]."""
    if layer.kind == "Conv":
        columns = unfold(layer, values)[0]
    else:
        columns = values.reshape(-1, values.shape[-1]).T.astype(np.float64)
    return np.concatenate([columns, np.ones((1, columns.shape[1]))])


def _new_bias(layer: WeightedLayer, constants: Arrays, gain: Array) -> NDArray[Any]:
    """The layer's bias [O] with the gain added; Gemm scales its product and its bias."""
    names = list(layer.node.input)[2:]
    scale = attribute(layer.node, "alpha", 1.0) / (attribute(layer.node, "beta", 1.0) or 1.0)
    old = constants[names[0]] if names and names[0] else np.zeros(1)
    return (old.reshape(-1) + scale * gain).astype(layer.weight.dtype)
