"""Lets the layers that read channels make up for those that are cut, from calibration images.

Layer after layer, the weight and the bias are fitted anew, so that from the inputs that the cut
network has the layer makes what it made in the whole one, in the mean square. Zeros stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy import linalg

from topiarist.errors import CalibrationError
from topiarist.pruning.calibration import Arrays, Images, batch_size
from topiarist.pruning.channel_order import MOST_COLUMNS
from topiarist.pruning.channels import LayerChannels, Numbers, channel_map
from topiarist.pruning.cores import on_all_cores, one_blas_thread
from topiarist.pruning.correction import VALUE_BYTES
from topiarist.pruning.forward import chunks, run_chunks
from topiarist.pruning.layers import (
    WeightedLayer,
    attribute,
    constant_arrays,
    replace_inputs,
    weighted_layers,
)
from topiarist.pruning.moments import unfold
from topiarist.pruning.obs_rounds import settle
from topiarist.pruning.segments import SegmentedRun

Array = NDArray[np.float64]

MOST_IMAGES = 512
DAMPINGS = (1e-3, 1e-2, 1e-1)  # the last one where there are too few images to try


def compensate(
    model: onnx.ModelProto,
    kept: Mapping[str, Sequence[int] | Numbers],
    images: Images,
    progress: Callable[[float], None] = lambda share: None,
) -> onnx.ModelProto:
    """A copy of the model that no longer reads the channels that `shrink(model, kept)` cuts.

    The layers that read them are refitted, those with more than MOST_COLUMNS inputs not. Raises
    ValueError as `shrink` does, CalibrationError for images that nothing can be fitted to.
    """
    channels = channel_map(model)
    mask = channels.mask(kept)
    reading = [i for i in channels.layers if not i.depthwise and not mask[i.inputs].all()]
    fitted = onnx.ModelProto()
    fitted.CopyFrom(model)
    if not reading:
        return fitted
    layers = [item.layer for item in reading]
    stay = [_kept_columns(item, mask) for item in reading]
    _take_away(fitted, layers, stay)
    _fit_all(model, fitted, layers, stay, images.first(MOST_IMAGES), progress)
    return fitted


def fit_linear(model: onnx.ModelProto, changed: onnx.ModelProto, images: Images) -> onnx.ModelProto:
    """A copy of `changed`, the model with other convolutions, whose fully connected layers
    make up for what they read now. Those with more than MOST_COLUMNS inputs stay.
    """
    fitted = onnx.ModelProto()
    fitted.CopyFrom(changed)
    layers = [v for v in weighted_layers(changed) if v.kind != "Conv"]
    if layers:
        stay = [np.ones(v.weight[0].size, np.bool_) for v in layers]
        _take_away(fitted, layers, stay)
        _fit_all(model, fitted, layers, stay, images)
    return fitted


def _fit_all(
    model: onnx.ModelProto,
    fitted: onnx.ModelProto,
    layers: Sequence[WeightedLayer],
    stay: Sequence[NDArray[np.bool_]],
    images: Images,
    progress: Callable[[float], None] = lambda share: None,
) -> None:
    """Fit layers one after the other; each reads what the fitted ones before it make."""
    portions = _portions(model, layers, images)
    runs = SegmentedRun(model, portions), SegmentedRun(fitted, portions)
    for done, (layer, columns) in enumerate(zip(layers, stay, strict=True), 1):
        if layer.weight[0].size <= MOST_COLUMNS:
            for run in runs:
                run.advance_to(layer.node.input[0])
            weight, gain = _fit(layer, columns, *(run.values for run in runs))
            _put(fitted, layer, weight, gain)
        progress(done / len(layers))


def _portions(
    model: onnx.ModelProto, layers: Sequence[WeightedLayer], images: Images
) -> list[Arrays]:
    """As many images as fit in memory while they go through the network, at least two portions.

    One only where the network takes no fewer at once.
    """
    portions = chunks(model, images)
    if len(portions) == 1 and batch_size(model) is None:
        most = 3 * len(images) // 4
        parts = slice(None, most), slice(most, None)
        portions = [{name: a[part] for name, a in portions[0].items()} for part in parts]
    names = [layer.node.input[0] for layer in layers]
    first = next(run_chunks(model, portions[:1], names))
    largest = max(array.nbytes for array in first.values())
    return portions[: max(2, VALUE_BYTES // largest)]


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


@dataclass(frozen=True, eq=False)
class _Problem:
    """Sums over places for the change D of a weight that is to make up for `missing` outputs.

    `square` is x x^T [k, k] of the cut network's inputs, `missing` is r x^T [O, k] of what the
    outputs lack; the squared error falls by tr(2 D missing^T - D square D^T). D is zero where
    `free` [O, k] is not set.
    """

    square: Array
    missing: Array
    free: NDArray[np.bool_]

    def solve(self, damping: float, columns: int) -> Array:
        """The best D if it is damped in the first columns, by a share of their mean square."""
        diagonal = np.full(len(self.square), damping * np.diagonal(self.square).mean() + 1e-12)
        diagonal[columns:] = 0
        damped = self.square + np.diag(diagonal)
        best: Array = linalg.cho_solve(linalg.cho_factor(damped), self.missing.T).T
        return best if self.free.all() else settle(best, best, self.free, damped)[0]

    def __add__(self, other: _Problem) -> _Problem:
        return _Problem(self.square + other.square, self.missing + other.missing, self.free)

    def gain(self, change: Array) -> float:
        """By how much the squared error falls."""
        return float(np.einsum("ok,ok->", change, 2 * self.missing - change @ self.square))


def _fit(
    layer: WeightedLayer,
    stay: NDArray[np.bool_],
    whole: Sequence[Arrays],
    cut: Sequence[Arrays],
) -> tuple[NDArray[Any], Array]:
    """The weight of the least squared error on the cut network's values, and what its bias gains.

    It is damped towards the weight as it was, as strongly as is best for the last quarter of the
    images; where no fit is good for them, it stays. Without a bias only the weight is fitted.
    """
    kept = np.flatnonzero(stay)
    used = kept if layer.kind == "MatMul" else np.append(kept, stay.size)
    weight = layer.weight.astype(np.float64).reshape(len(layer.weight), -1)
    start = np.zeros((len(weight), used.size))
    start[:, : kept.size] = weight[:, kept]
    others = len(cut) - max(1, len(cut) // 4) if len(cut) > 1 else 1
    fitting = _problem(layer, weight, start, used, whole[:others], cut[:others])
    damping: float | None = DAMPINGS[-1]
    if others < len(cut):
        testing = _problem(layer, weight, start, used, whole[others:], cut[others:])
        damping = _best_damping(fitting, testing, kept.size)
        fitting += testing
    if damping is not None:
        with one_blas_thread():
            start += fitting.solve(damping, kept.size)
    result = np.zeros_like(weight)
    result[:, kept] = start[:, : kept.size]
    gain = start[:, kept.size] if used.size > kept.size else np.zeros(len(weight))
    return result.reshape(layer.weight.shape).astype(layer.weight.dtype), gain


def _best_damping(fitting: _Problem, testing: _Problem, columns: int) -> float | None:
    """The damping whose fit is best for other images, None if each does harm there."""

    def gain(damping: float) -> float:
        return testing.gain(fitting.solve(damping, columns))

    gains = dict(zip(DAMPINGS, on_all_cores(gain, DAMPINGS), strict=True))
    best = max(gains, key=lambda damping: gains[damping])
    return best if gains[best] > 0 else None


def _problem(
    layer: WeightedLayer,
    weight: Array,
    start: Array,
    used: Numbers,
    whole: Sequence[Arrays],
    cut: Sequence[Arrays],
) -> _Problem:
    """What the weight `start` for the used columns lacks in these portions of images."""
    name = layer.node.input[0]
    free = (start != 0) | (used == layer.weight[0].size)

    def multiply(number: int) -> _Problem:
        after = _columns(layer, cut[number][name])[used]
        before = _columns(layer, whole[number][name])[:-1]
        with np.errstate(invalid="ignore", over="ignore"):  # looked at below
            square = after @ after.T
            return _Problem(square, (weight @ before) @ after.T - start @ square, free)

    total = _Problem(np.zeros((used.size, used.size)), np.zeros_like(start), free)
    for part in on_all_cores(multiply, range(len(cut))):
        np.add(total.square, part.square, out=total.square)
        np.add(total.missing, part.missing, out=total.missing)
    if not (np.isfinite(total.square).all() and np.isfinite(total.missing).all()):
        raise CalibrationError(
            f"{layer.name}: its inputs overflow or are NaN for these images; are they scaled as "
            "the network expects?"
        )
    return total


def _columns(layer: WeightedLayer, values: NDArray[Any]) -> Array:
    """What the weight is multiplied with, and a row of ones: [c + 1, places]."""
    if layer.kind == "Conv":
        columns = unfold(layer, values)[0]
    else:
        columns = values.reshape(-1, values.shape[-1]).T.astype(np.float64)
    return np.concatenate([columns, np.ones((1, columns.shape[1]))])
