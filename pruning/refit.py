"""Let a layer of a pruned network give the outputs that the dense network had in its place.

Reconstruction takes a layer's inputs as they were in the dense network. In the pruned one they
are others, and the errors of all layers before add up in them. So, in the order of the file, the
weights that stay are fitted once more: from the inputs as they are to the outputs as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.pruning.cores import on_all_cores, one_blas_thread
from topiarist.pruning.layers import WeightedLayer
from topiarist.pruning.moments import (
    TOGETHER,
    add_products,
    image_parts,
    invert,
    unfold,
    whole_matrices,
)
from topiarist.pruning.obs_rounds import settle
from topiarist.targets.linux import available_cores

PULL = 0.1  # towards the weights as they are, of the mean of the diagonal

Array = NDArray[np.float64]


def refit(
    layer: WeightedLayer, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
) -> Array:
    """New weights [O, C / groups, kh, kw] of a convolution, zeros where it has zeros.

    `inputs` [N, C, H, W] and `outputs` [N, O, oh, ow] come in portions. Means are left out of it:
    they are the bias's to mend.
    """
    weight = layer.weight.reshape(layer.groups, -1, layer.weight[0].size).astype(np.float64)
    square, cross = _covariances(layer, inputs, outputs)
    fitted = np.empty_like(weight)
    with one_blas_thread():
        for group, matrix in enumerate(square):
            fitted[group] = _fit(weight[group], matrix, cross[group])
    return fitted.reshape(layer.weight.shape)


def _fit(weight: Array, square: Array, cross: Array) -> Array:
    """Least squares on the nonzeros of filters [rows, c], pulled towards what they are."""
    pull = PULL * float(np.diagonal(square).mean())
    if not pull > 0:
        return weight
    matrix = square + pull * np.eye(len(square))
    inverse = invert(matrix)
    if inverse is None:
        return weight
    target = (cross + pull * weight) @ inverse
    return settle(weight, target, weight != 0, matrix)[0]


@dataclass(eq=False)
class _Sums:
    """Over places: x x^T (upper triangles), y x^T, x and y, [groups, ...]."""

    square: Array
    cross: Array
    inputs: Array
    outputs: Array
    places: int = 0


def _covariances(
    layer: WeightedLayer, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
) -> tuple[Array, Array]:
    """Of the inputs [groups, c, c], and of outputs with inputs [groups, O / groups, c]."""
    share = -(-len(inputs) // available_cores())
    parts = [slice(s, s + share) for s in range(0, len(inputs), share)]
    first, *others = on_all_cores(lambda p: _sums(layer, inputs[p], outputs[p]), parts)
    for other in others:
        first.square += other.square
        first.cross += other.cross
        first.inputs += other.inputs
        first.outputs += other.outputs
        first.places += other.places
    x, y = first.inputs / first.places, first.outputs / first.places
    square = whole_matrices(first.square) / first.places - x[:, :, None] * x[:, None]
    return square, first.cross / first.places - y[:, :, None] * x[:, None]


def _sums(
    layer: WeightedLayer, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
) -> _Sums:
    """The sums of some portions, as many at a time as make products large."""
    groups, columns = layer.groups, layer.weight[0].size
    rows = len(layer.weight) // groups
    found = _Sums(
        np.zeros((groups, columns, columns)),
        np.zeros((groups, rows, columns)),
        np.zeros((groups, columns)),
        np.zeros((groups, rows)),
    )
    step = max(1, TOGETHER // len(inputs[0]))
    for start in range(0, len(inputs), step):
        values = np.concatenate(inputs[start : start + step])
        wanted = np.concatenate(outputs[start : start + step])
        for part in image_parts(layer, values):
            x = unfold(layer, values[part])
            y = np.moveaxis(wanted[part], 1, 0).reshape(groups, rows, -1).astype(np.float64)
            add_products(found.square, x)
            found.cross += y @ x.swapaxes(1, 2)
            found.inputs += x.sum(axis=2)
            found.outputs += y.sum(axis=2)
            found.places += x.shape[2]
    return found
