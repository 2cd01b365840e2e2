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
from topiarist.pruning.channel_order import MOST_COLUMNS, MOST_IMAGES
from topiarist.pruning.channels import LayerChannels, Numbers, channel_map
from topiarist.pruning.cores import on_all_cores
from topiarist.pruning.correction import VALUE_BYTES
from topiarist.pruning.forward import chunks, run_chunks
from topiarist.pruning.layers import WeightedLayer, attribute, constant_arrays, replace_inputs
from topiarist.pruning.moments import DAMPING, unfold
from topiarist.pruning.segments import SegmentedRun

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
    reading = [i for i in channels.layers if not i.depthwise and not mask[i.inputs].all()]
    fitted = onnx.ModelProto()
    fitted.CopyFrom(model)
    if not reading:
        return fitted
    stay = [_kept_columns(item, mask) for item in reading]
    _take_away(fitted, [item.layer for item in reading], stay)
    portions = _portions(model, reading, images)
    runs = SegmentedRun(model, portions), SegmentedRun(fitted, portions)
    for done, (item, columns) in enumerate(zip(reading, stay, strict=True), 1):
        layer = item.layer
        if layer.weight[0].size <= MOST_COLUMNS:
            for run in runs:
                _advance_to(run, layer)
            weight, gain = _fit(layer, columns, *(run.values for run in runs))
            _put(fitted, layer, weight, gain)
        progress(done / len(reading))
    return fitted


def _portions(
    model: onnx.ModelProto, reading: Sequence[LayerChannels], images: Images
) -> list[Arrays]:
    """As many images as fit in memory while they go through the network."""
    portions = chunks(model, images.first(MOST_IMAGES))
    names = [item.layer.node.input[0] for item in reading]
    first = next(run_chunks(model, portions[:1], names))
    largest = max(array.nbytes for array in first.values())
    return portions[: max(1, VALUE_BYTES // largest)]


def _take_away(
    model: onnx.ModelProto, layers: Sequence[WeightedLayer], stay: Sequence[NDArray[np.bool_]]
) -> None:
    """Zeros for what the layers no longer read, and a weight and a bias of their own for each."""
    constants = constant_arrays(model)
    places: dict[tuple[int, int], NDArray[Any]] = {}
    for layer, columns in zip(layers, stay, strict=True):
        index = _index(model, layer)
        zero = layer.weight.dtype.type(0)
        weight = np.where(columns.reshape(1, *layer.weight[0].shape), layer.weight, zero)
        places[index, 1] = layer.as_stored(weight)
        if layer.kind != "MatMul":
            name = [*layer.node.input, ""][2]
            old = constants[name].reshape(-1) if name else np.zeros(1, layer.weight.dtype)
            places[index, 2] = np.broadcast_to(old, len(layer.weight))
    replace_inputs(model.graph, places)


def _advance_to(run: SegmentedRun, layer: WeightedLayer) -> None:
    """Run what comes before the layer."""
    name = layer.node.input[0]
    if name not in run.values[0]:
        made = [name in node.output for node in run.model.graph.node]
        run.advance(made.index(True))


def _put(model: onnx.ModelProto, layer: WeightedLayer, weight: NDArray[Any], gain: Array) -> None:
    """Give the layer its new weight, and a bias that is larger by `gain`; Gemm scales both."""
    index = _index(model, layer)
    places = {(index, 1): layer.as_stored(weight)}
    if layer.kind != "MatMul":
        old = constant_arrays(model)[model.graph.node[index].input[2]]
        alpha, beta = (attribute(layer.node, name, 1.0) for name in ("alpha", "beta"))
        places[index, 2] = (old + gain * alpha / (beta or 1.0)).astype(old.dtype)
    replace_inputs(model.graph, places)


def _index(model: onnx.ModelProto, layer: WeightedLayer) -> int:
    """The place of the layer's node, which moves when constants go."""
    return [node.output[0] for node in model.graph.node].index(layer.node.output[0])


def _kept_columns(item: LayerChannels, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which columns [c] of a layer's weight read channels that stay."""
    return np.repeat(mask[item.inputs], item.layer.weight[0, 0].size)


def _fit(
    layer: WeightedLayer,
    stay: NDArray[np.bool_],
    whole: Sequence[Arrays],
    cut: Sequence[Arrays],
) -> tuple[NDArray[Any], Array]:
    """The weight of the least squared error on the cut network's values, and what its bias gains.

    Damped towards the weight as it was. Without a bias to change, only the weight is fitted.
    """
    kept = np.flatnonzero(stay)
    used = kept if layer.kind == "MatMul" else np.append(kept, stay.size)
    square, cross = _products(layer, used, whole, cut)
    weight = layer.weight.astype(np.float64).reshape(len(layer.weight), -1)
    start = np.zeros((len(weight), used.size))
    start[:, : kept.size] = weight[:, kept]
    damping = np.full(used.size, DAMPING * float(np.diagonal(square).mean()) + 1e-12)
    damping[kept.size :] = 0
    missing = weight @ cross[:-1] - start @ square
    start += linalg.solve(square + np.diag(damping), missing.T, assume_a="pos").T
    result = np.zeros_like(weight)
    result[:, kept] = start[:, : kept.size]
    gain: Array = start[:, -1]
    return result.reshape(layer.weight.shape).astype(layer.weight.dtype), gain


def _products(
    layer: WeightedLayer, used: Numbers, whole: Sequence[Arrays], cut: Sequence[Arrays]
) -> tuple[Array, Array]:
    """Means of x x^T [used, used] in the cut network, and [c + 1, used] between the two."""
    name = layer.node.input[0]

    def multiply(number: int) -> tuple[Array, Array, int]:
        after = _columns(layer, cut[number][name])[used]
        before = _columns(layer, whole[number][name])
        return after @ after.T, before @ after.T, after.shape[1]

    square = np.zeros((used.size, used.size))
    cross = np.zeros((layer.weight[0].size + 1, used.size))
    places = 0
    for own, between, count in on_all_cores(multiply, range(len(cut))):
        square += own
        cross += between
        places += count
    return square / places, cross / places


def _columns(layer: WeightedLayer, values: NDArray[Any]) -> Array:
    """What the weight is multiplied with, and a row of ones: [c + 1, places]."""
    if layer.kind == "Conv":
        columns = unfold(layer, values)[0]
    else:
        columns = values.reshape(-1, values.shape[-1]).T.astype(np.float64)
    return np.concatenate([columns, np.ones((1, columns.shape[1]))])
