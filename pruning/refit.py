"""Let a layer of a pruned network give the outputs that the dense network had in its place.

Reconstruction takes a layer's inputs as they were in the dense network. In the pruned one they
are others, and the errors of all layers before add up in them. So, in the order of the file, the
weights that stay are fitted once more: from the inputs as they are to the outputs as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _covariances(
    layer: WeightedLayer, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
) -> tuple[Array, Array]:
    """Of the inputs [groups, c, c], and of outputs with inputs [groups, O / groups, c]."""
    share = -(-len(inputs) // available_cores())
    parts = [slice(s, s + share) for s in range(0, len(inputs), share)]
    sums = sum(on_all_cores(lambda p: _sums(layer, inputs[p], outputs[p]), parts))
    assert not isinstance(sums, int)
    columns, places = layer.weight[0].size, sums[:, -1:, -1:]
    mean = sums[:, :-1, -1] / places[..., 0]
    moments = sums[:, :columns, :-1] / places - mean[:, :columns, None] * mean[:, None]
    square, cross = moments[:, :, :columns], moments[:, :, columns:]
    return whole_matrices(square), cross.swapaxes(1, 2)


def _sums(
    layer: WeightedLayer, inputs: Sequence[NDArray[Any]], outputs: Sequence[NDArray[Any]]
) -> Array:
    """The upper triangles of z z^T over places, z = (inputs, outputs, 1), in each group."""
    rows = len(layer.weight) // layer.groups
    size = layer.weight[0].size + rows + 1
    total = np.zeros((layer.groups, size, size))
    step = max(1, TOGETHER // len(inputs[0]))
    for start in range(0, len(inputs), step):
        values = np.concatenate(inputs[start : start + step])
        wanted = np.concatenate(outputs[start : start + step])
        for part in image_parts(layer, values):
            x = unfold(layer, values[part], np.float32)
            y = np.moveaxis(wanted[part], 1, 0).reshape(layer.groups, rows, -1)
            ones = np.ones((layer.groups, 1, x.shape[2]), np.float32)
            add_products(total, np.concatenate([x, y.astype(np.float32), ones], axis=1))
    return total
