"""What kernels have to compute, in float64 NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.workload import ConvWorkload

Array = NDArray[np.float64]
Clamp = tuple[float | None, float | None]


def clamp(array: Array, bounds: Clamp) -> Array:
    """min(max(array, low), high)."""
    low, high = bounds
    return np.clip(array, -np.inf if low is None else low, np.inf if high is None else high)


def windows(
    image: NDArray[np.float32],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    fill: float = 0.0,
) -> Array:
    """[N, C, H, W] -> [N, C, oh, ow, kh, kw]."""
    top, left, bottom, right = padding
    widths = ((0, 0), (0, 0), (top, bottom), (left, right))
    padded = np.pad(image.astype(np.float64), widths, constant_values=fill)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    return seen[:, :, :: strides[0], :: strides[1], :: dilation[0], :: dilation[1]]


def conv(
    workload: ConvWorkload,
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    residual: NDArray[np.float32] | None,
) -> Array:
    """The convolution with its epilogue."""
    w = workload
    seen = windows(x, w.kernel, w.strides, w.padding, w.dilation)
    parts = [
        np.einsum("ncyxij,ocij->noyx", part, rows.astype(np.float64), optimize=True)
        for part, rows in zip(
            np.split(seen, w.groups, axis=1), np.split(weight, w.groups), strict=True
        )
    ]
    result: Array = np.concatenate(parts, axis=1) + bias[:, None, None].astype(np.float64)
    if residual is not None:
        result = result + residual
    return clamp(result, w.activation)
