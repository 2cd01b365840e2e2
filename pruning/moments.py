"""The second moments of what a layer's weights are multiplied with, from calibration images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.linalg import blas, lapack

from topiarist.errors import CalibrationError
from topiarist.pruning.calibration import Arrays, Images
from topiarist.pruning.cores import on_all_cores
from topiarist.pruning.forward import chunks, run_chunks
from topiarist.pruning.layers import WeightedLayer, attribute
from topiarist.pruning.windows import padding, pair

Array = NDArray[np.float64]

PASS_BYTES = 3 << 30  # of moments that are gathered in one pass over the images
TOGETHER = 8  # images whose moments are added at once
UNFOLDED_BYTES = 32 << 20
DAMPING = 1e-3  # of the mean of the diagonal
MOST_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Moments:
    """The mean of x x^T over all places that a layer reads, [groups, c, c] in float64.

    c = C / groups * kh * kw, in the order of the weight. `places` is how many x there were.
    """

    matrix: Array
    places: int


def gather_moments(
    model: onnx.ModelProto,
    layers: Sequence[WeightedLayer],
    images: Images,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Moments]:
    """The moments of the layers' inputs in one pass over the images.

    Raises CalibrationError where a layer's input has NaN or infinite values or is always zero.
    """
    sums = [_zeros(layer) for layer in layers]
    places = [0] * len(layers)
    portions = chunks(model, images)
    names = [layer.node.input[0] for layer in layers]
    waiting: list[Arrays] = []
    for done, values in enumerate(run_chunks(model, portions, names), 1):
        waiting.append(values)
        if len(waiting) * len(values[names[0]]) < TOGETHER and done < len(portions):
            continue
        add = partial(_add, sums, layers, [[v[name] for v in waiting] for name in names])
        for index, count in enumerate(on_all_cores(add, range(len(layers)))):
            places[index] += count
        waiting = []
        progress(done / len(portions))
    found = [Moments(whole_matrices(s) / max(n, 1), n) for s, n in zip(sums, places, strict=True)]
    for layer, moments in zip(layers, found, strict=True):
        _check(layer, moments)
    return found


def moments_bytes(layer: WeightedLayer) -> int:
    """What the layer's moments take."""
    return _zeros(layer).nbytes


def damped(layer: str, matrix: Array) -> tuple[Array, Array]:
    """H [c, c] with enough damping to be inverted, and its inverse.

    Inputs that are always zero have 1 on the diagonal. Raises CalibrationError where no damping
    helps.
    """
    diagonal = np.diagonal(matrix)
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 0.0
    share = DAMPING
    while 0 < share <= MOST_DAMPING and mean > 0:
        regular = matrix + np.diag(np.where(dead, 1.0, share * mean))
        inverse = invert(regular)
        if inverse is not None:
            return regular, inverse
        share *= 10
    raise CalibrationError(
        f"{layer}: the statistics of its inputs are singular; calibrate with more or other images"
    )


def invert(matrix: Array) -> Array | None:
    """The inverse of a positive definite matrix, both triangles; None if it is not one."""
    factor, failed = lapack.dpotrf(matrix, lower=1)
    if failed:
        return None
    inverse, failed = lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed or not np.isfinite(inverse).all() or np.diagonal(inverse).min() <= 0:
        return None
    lower: Array = np.tril(inverse)
    return lower + np.tril(lower, -1).T


def _zeros(layer: WeightedLayer) -> Array:
    columns = layer.weight[0].size
    return np.zeros((layer.groups, columns, columns))


def _add(
    sums: Sequence[Array],
    layers: Sequence[WeightedLayer],
    inputs: Sequence[Sequence[NDArray[Any]]],
    index: int,
) -> int:
    """Add the moments of some of a layer's inputs; returns how many places they had."""
    total, layer, values = sums[index], layers[index], np.concatenate(inputs[index])
    if layer.kind != "Conv":
        rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
        add_products(total, np.ascontiguousarray(rows.T)[None])
        return len(rows)
    places = 0
    for part in image_parts(layer, values):
        unfolded = unfold(layer, values[part])
        add_products(total, unfolded)
        places += unfolded.shape[2]
    return places


def image_parts(layer: WeightedLayer, values: NDArray[Any]) -> list[slice]:
    """Images [N, ...] in parts that can be unfolded at once."""
    step = max(1, UNFOLDED_BYTES // (8 * layer.weight[0].size * values[0, 0].size))
    return [slice(start, start + step) for start in range(0, len(values), step)]


def add_products(total: Array, columns: NDArray[Any]) -> None:
    """Add x x^T for [groups, c, places] to the upper triangles [groups, c, c]; float32 is quicker.

    The products of float32 are summed up in it, so `columns` should be some thousand places then.
    """
    for upper, x in zip(total, columns, strict=True):
        if x.dtype == np.float32:
            upper += blas.ssyrk(1.0, x.T, trans=1, lower=1).T
        else:
            blas.dsyrk(1.0, x.T, 1.0, upper.T, trans=1, lower=1, overwrite_c=1)


def whole_matrices(upper: Array) -> Array:
    """The symmetric matrices [groups, c, c] with these upper triangles."""
    return np.triu(upper) + np.triu(upper, 1).transpose(0, 2, 1)


def unfold(
    layer: WeightedLayer, values: NDArray[Any], dtype: type[np.floating[Any]] = np.float64
) -> NDArray[Any]:
    """Inputs [N, C, H, W] of a convolution -> [groups, C / groups * kh * kw, places]."""
    height, width = layer.weight.shape[2:]
    one_dimension = values.ndim == 3
    if one_dimension:
        values = values[:, :, None]
    strides, dilations = (
        pair(attribute(layer.node, name, None), one_dimension) for name in ("strides", "dilations")
    )
    span = (dilations[0] * (height - 1) + 1, dilations[1] * (width - 1) + 1)
    vertical, horizontal = padding(layer.node, values.shape[2:], span, strides)
    padded = np.pad(values, ((0, 0), (0, 0), vertical, horizontal))
    windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=(2, 3))
    windows = windows[
        :, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]
    ]  # [N, C, oh, ow, kh, kw]
    columns = windows.transpose(1, 4, 5, 0, 2, 3).astype(dtype, order="C")
    return columns.reshape(layer.groups, layer.weight[0].size, -1)


def _check(layer: WeightedLayer, moments: Moments) -> None:
    """Whether something can be made of them."""
    if not np.isfinite(moments.matrix).all():
        raise CalibrationError(
            f"{layer.name}: its inputs overflow or are NaN for these images; are they scaled as "
            "the network expects?"
        )
    if not np.einsum("gcc->", moments.matrix) > 0:
        raise CalibrationError(
            f"{layer.name}: its inputs are zero for all images; calibrate with other images"
        )
