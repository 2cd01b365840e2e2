"""What a convolution has to write, in float64 NumPy: whether a candidate computes the right thing.

Candidates run on random values. What lies in lanes and channels that hold no pixel is NaN, so that
a kernel which lets it into a result is found out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.layout import View
from topiarist.schedules.workload import HALF, SINGLE, ConvWorkload

FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]
# Largest difference, as a share of the largest value; fp16 keeps 11 bits of each factor.
TOLERANCES = {SINGLE: 1e-4, HALF: 2e-3}


@dataclass(frozen=True)
class Expectation:
    """Flat buffers to run a layer on, and what it then has to have written where.

    `y_before` holds the residual of a layer that adds in place. `at` are the positions in `y`
    that must have the values `wanted`.
    """

    x: FloatArray
    residual: FloatArray | None
    y_before: FloatArray
    at: NDArray[np.int64]
    wanted: DoubleArray

    def mismatch(self, y: FloatArray, dtype: str = SINGLE) -> str | None:
        """What is wrong with a result of factors in `dtype`, None if nothing is."""
        got = y[self.at].astype(np.float64)
        if not np.isfinite(got).all():
            return f"{int((~np.isfinite(got)).sum())} of {got.size} values are not finite"
        scale = float(np.abs(self.wanted).max()) or 1.0
        worst = float(np.abs(got - self.wanted).max()) / scale
        return None if worst <= TOLERANCES[dtype] else f"off by {worst:.1e} of the largest value"


def expectation(site: ConvSite, weight: FloatArray, bias: FloatArray, seed: int = 0) -> Expectation:
    """Random inputs of a layer in its place, and its output."""
    w, views = site.workload, site.views
    random = np.random.default_rng(seed)

    def image(channels: int, height: int, width: int) -> FloatArray:
        return random.standard_normal((w.batch, channels, height, width)).astype(np.float32)

    x = image(w.in_channels, w.height, w.width)
    residual = image(w.out_channels, w.out_height, w.out_width) if w.residual else None
    y = convolve(w, x, weight, bias, residual)
    buffer = np.full(w.batch * views.y.layout.size, np.nan, np.float32)
    added = None
    if residual is not None and views.in_place:
        buffer = _packed(views.y, residual)
    elif residual is not None and views.residual is not None:
        added = _packed(views.residual, residual)
    at = _defined(views.y, w.batch)
    return Expectation(
        x=_packed(views.x, x),
        residual=added,
        y_before=buffer,
        at=at,
        wanted=_pack(views.y, y)[at].astype(np.float64),
    )


def convolve(
    workload: ConvWorkload,
    x: FloatArray,
    weight: FloatArray,
    bias: FloatArray,
    residual: FloatArray | None,
) -> DoubleArray:
    """The layer with its epilogue [N, O, oh, ow], one tap of the filter after the other."""
    w = workload
    top, left, bottom, right = w.padding
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    groups, size = w.groups, (w.out_height, w.out_width)
    result = np.zeros((w.batch, groups, w.out_channels // groups, size[0] * size[1]))
    for ky, kx in np.ndindex(*w.kernel):
        first = ky * w.dilation[0], kx * w.dilation[1]
        rows, cols = (
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(first, size, w.strides, strict=True)
        )
        seen = padded[:, :, rows, cols].reshape(w.batch, groups, w.in_channels // groups, -1)
        taps = weight[:, :, ky, kx].astype(np.float64)
        result += taps.reshape(groups, -1, w.in_channels // groups) @ seen
    result = result.reshape(w.batch, w.out_channels, *size) + bias[:, None, None]
    if residual is not None:
        result = result + residual
    low, high = w.activation
    return np.clip(result, -np.inf if low is None else low, np.inf if high is None else high)


def _packed(view: View, image: FloatArray) -> FloatArray:
    """The pixels in a buffer of the view's layout; NaN in everything that is not defined."""
    flat = _pack(view, image)
    poisoned = np.full_like(flat, np.nan)
    at = _defined(view, len(image))
    poisoned[at] = flat[at]
    return poisoned


def _pack(view: View, image: NDArray[np.floating]) -> NDArray[np.floating]:
    """[N, view.count, H, W] -> the whole flat buffer."""
    everything = np.full((len(image), view.layout.channels, *image.shape[2:]), np.nan, image.dtype)
    everything[:, view.first : view.first + view.count] = image
    return view.layout.pack(everything)


def _defined(view: View, batch: int) -> NDArray[np.int64]:
    """Positions of the view's pixels; in padded layouts also of its halo and all other lanes."""
    layout, grid = view.layout, view.layout.grid
    if layout.tile is not None:
        of_channel = layout.pixel_offsets().ravel()
    else:
        top, left, bottom, right = layout.halo
        rows, cols = np.arange(-top, grid.rows + bottom), np.arange(-left, grid.cols + right)
        starts = np.asarray(layout.offset(rows[:, None], cols[None, :])).ravel()
        of_channel = (starts[:, None] + np.arange(grid.lanes)).ravel()
    channels = (view.first + np.arange(view.count)) * layout.channel_stride
    images = np.arange(batch) * layout.size
    return (images[:, None, None] + channels[:, None] + of_channel).ravel()
