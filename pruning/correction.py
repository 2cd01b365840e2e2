"""Give the convolutions of a pruned network the statistics that they had in the dense one.

Layer by layer in the order of the file: for each channel
y -> (y - mean_pruned) * std_dense / std_pruned + mean_dense, in the weights and the bias of the
convolution. What comes before is corrected already. Zeros stay zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from topiarist.errors import ModelError
from topiarist.pruning.calibration import Arrays, Images
from topiarist.pruning.forward import chunks, run_chunks
from topiarist.pruning.layers import WeightedLayer, replace_weights, weighted_layers
from topiarist.pruning.refit import refit as fit_layer
from topiarist.pruning.segments import SegmentedRun

MOST_IMAGES = 512
VALUE_BYTES = 512 << 20  # of one value inside the network, for all images
MOST_GAIN = 4.0  # a channel with nearly nothing left is not blown up
_SAME = 1e-6

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """Mean and standard deviation of each channel [C] over images and places."""

    mean: Array
    deviation: Array


def correct_statistics(
    dense: onnx.ModelProto,
    pruned: onnx.ModelProto,
    images: Images,
    *,
    refit: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> onnx.ModelProto:
    """A copy of `pruned`, the same network with other weights, with the statistics of `dense`.

    With `refit` the weights that stay are fitted to the outputs of `dense` before.
    """
    corrected = onnx.ModelProto()
    corrected.CopyFrom(pruned)
    layers = _correctable(corrected)
    if not layers:
        return corrected
    portions = _portions(dense, layers, images)
    wanted = channel_statistics(dense, [layer.node.output[0] for layer in layers], portions)
    changed = _changed(dense, pruned, layers)
    run = SegmentedRun(corrected, portions)
    original = SegmentedRun(dense, portions) if refit else None
    for done, layer in enumerate(layers, 1):
        if original is not None and layer.name in changed:
            _refit(corrected, layer, run, original)
        run.advance_to(layer.node.output[0])
        _correct(corrected, layer.name, wanted[layer.node.output[0]], run.values)
        progress(done / len(layers))
    return corrected


def channel_statistics(
    model: onnx.ModelProto, names: Sequence[str], portions: Sequence[Arrays]
) -> dict[str, ChannelStatistics]:
    """The statistics of the values [N, C, ...] called `names`."""
    sums: dict[str, Array] = {}
    for values in run_chunks(model, portions, names):
        for name, array in values.items():
            sums[name] = sums.get(name, 0.0) + _sums(array)
    return {name: _statistics(total, name) for name, total in sums.items()}


def _changed(
    dense: onnx.ModelProto, pruned: onnx.ModelProto, layers: Sequence[WeightedLayer]
) -> set[str]:
    """The layers with other weights than in the dense network."""
    before = {layer.name: layer.weight for layer in weighted_layers(dense)}
    return {v.name for v in layers if not np.array_equal(before[v.name], v.weight)}


def _refit(
    model: onnx.ModelProto, layer: WeightedLayer, run: SegmentedRun, original: SegmentedRun
) -> None:
    """Change one layer of the model that both runs have not reached yet."""
    data, output = layer.node.input[0], layer.node.output[0]
    run.advance_to(data)
    original.advance_to(output)
    inputs = [values[data] for values in run.values]
    weight = fit_layer(layer, inputs, [values[output] for values in original.values])
    replace_weights(model, {layer.weight_name: layer.as_stored(weight.astype(layer.weight.dtype))})


def _correctable(model: onnx.ModelProto) -> list[WeightedLayer]:
    """Convolutions that have their weight for themselves."""
    layers = weighted_layers(model)
    names = [name for node in model.graph.node for name in node.input]
    return [v for v in layers if v.kind == "Conv" and names.count(v.weight_name) == 1]


def _portions(
    model: onnx.ModelProto, layers: Sequence[WeightedLayer], images: Images
) -> list[Arrays]:
    """As many images as fit in memory while they go through the network."""
    portions = chunks(model, images.first(MOST_IMAGES))
    first = next(run_chunks(model, portions[:1], [layer.node.output[0] for layer in layers]))
    largest = max(array.nbytes for array in first.values())
    return portions[: max(1, VALUE_BYTES // largest)]


def _correct(
    model: onnx.ModelProto, name: str, wanted: ChannelStatistics, values: list[Arrays]
) -> None:
    """Change one layer of the model, and its outputs with it."""
    layer = next(v for v in weighted_layers(model) if v.name == name)
    output = layer.node.output[0]
    total = sum(_sums(portion[output]) for portion in values)
    assert not isinstance(total, int)
    found = _statistics(total, layer.name)
    gain = np.minimum(
        np.where(found.deviation > 0, wanted.deviation / np.maximum(found.deviation, 1e-30), 1.0),
        MOST_GAIN,
    )
    shift = wanted.mean - gain * found.mean
    if np.abs(gain - 1).max() < _SAME and np.abs(shift).max() < _SAME:
        return
    kind = layer.weight.dtype
    weight = layer.weight.astype(np.float64) * gain[:, None, None, None]
    replace_weights(model, {layer.weight_name: layer.as_stored(weight.astype(kind))})
    _set_bias(model, layer, (_bias(model, layer) * gain + shift).astype(kind))
    for portion in values:
        shape = (-1, *[1] * (portion[output].ndim - 2))
        scaled = portion[output] * gain.astype(kind).reshape(shape)
        portion[output] = scaled + shift.astype(kind).reshape(shape)


def _sums(values: NDArray[Any]) -> Array:
    """Count, sum and sum of squares of each channel, [3, C]."""
    rows = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)
    count = np.full(len(rows), rows.shape[1], np.float64)
    return np.stack([count, rows.sum(axis=1), np.einsum("cn,cn->c", rows, rows)])


def _statistics(sums: Array, what: str) -> ChannelStatistics:
    """Of counts and sums [3, C]."""
    count, total, squares = sums
    mean = total / count
    if not np.isfinite(squares).all():
        raise ModelError(f"{what}: its outputs overflow or are NaN for these images")
    return ChannelStatistics(mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0)))


def _bias(model: onnx.ModelProto, layer: WeightedLayer) -> Array:
    """The bias [O], zeros if there is none; ModelError for one that is not in the file."""
    if len(layer.node.input) < 3 or not layer.node.input[2]:
        return np.zeros(len(layer.weight))
    name = layer.node.input[2]
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return _array(tensor)
    for node in model.graph.node:
        if node.op_type == "Constant" and name in node.output:
            return _array(node.attribute[0].t)
    raise ModelError(f"{layer.name}: its bias {name!r} is no constant of the file; fold it first")


def _array(tensor: Any) -> Array:
    """The values of a tensor in float64."""
    values: Array = numpy_helper.to_array(tensor).astype(np.float64)
    return values


def _set_bias(model: onnx.ModelProto, layer: WeightedLayer, bias: NDArray[Any]) -> None:
    """Give the layer a bias of its own; the old one goes where nothing else reads it."""
    graph = model.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    old = layer.node.input[2] if len(layer.node.input) > 2 else ""
    name = f"{layer.weight_name}.corrected_bias"
    while name in taken:
        name += "_"
    node = next(n for n in graph.node if n.output[0] == layer.node.output[0])
    del node.input[2:]
    node.input.append(name)
    graph.initializer.append(numpy_helper.from_array(bias, name))
    if model.ir_version < 4:
        kind = graph.initializer[-1].data_type
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, bias.shape))
    if old and not any(old in n.input for n in graph.node):
        for tensor in [t for t in graph.initializer if t.name == old]:
            graph.initializer.remove(tensor)
        for value in [v for v in graph.input if v.name == old]:
            graph.input.remove(value)
