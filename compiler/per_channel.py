"""Relax arithmetic with one constant per channel, read as x * scale + shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.relax_calls import array_of, is_constant, operator_of, shape_of

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ScaleShift:
    """data * scale + shift, float64 arrays of shape [C] along axis 1; None where there is none."""

    data: Any
    scale: Float64Array | None = None
    shift: Float64Array | None = None


def match_scale_shift(expr: Any) -> ScaleShift | None:
    """Read add, subtract, multiply or divide by a per-channel constant; None for all else."""
    operator = operator_of(expr)
    if operator not in ("add", "subtract", "multiply", "divide"):
        return None
    left, right = expr.args
    constant_first = is_constant(left)
    if constant_first == is_constant(right):
        return None
    data, constant = (right, left) if constant_first else (left, right)
    values = _along_channels(array_of(constant), data)
    if values is None:
        return None
    return _read(operator, data, values, constant_first)


def _read(
    operator: str, data: Any, values: Float64Array, constant_first: bool
) -> ScaleShift | None:
    if operator == "add":
        return ScaleShift(data, shift=values)
    if operator == "multiply":
        return ScaleShift(data, scale=values)
    if operator == "subtract" and not constant_first:
        return ScaleShift(data, shift=-values)
    if operator == "subtract":
        return ScaleShift(data, scale=-np.ones_like(values), shift=values)
    if constant_first or not values.all():
        return None
    return ScaleShift(data, scale=1.0 / values)


def _along_channels(array: NDArray[Any], data: Any) -> Float64Array | None:
    """The constant as [C], when broadcasting it over the data varies along axis 1 only."""
    shape = shape_of(data)
    if array.dtype != np.float32 or len(shape) < 2 or array.ndim > len(shape):
        return None
    padded = (1,) * (len(shape) - array.ndim) + array.shape
    if any(size != 1 for axis, size in enumerate(padded) if axis != 1):
        return None
    if padded[1] not in (1, shape[1]):
        return None
    flat = array.reshape(-1).astype(np.float64)
    return np.ascontiguousarray(np.broadcast_to(flat, (shape[1],)))
