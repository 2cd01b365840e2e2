"""Kernels built and called, and buffers as a careless neighbour would leave them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray

from topiarist.schedules.layout import LaneLayout, View
from topiarist.targets import registry
from topiarist.targets.detect import runs_here
from topiarist.targets.spec import TargetSpec

FloatArray = NDArray[np.float32]
NAME = "kernel"  # of every function that is built here


def _profile(name: str) -> Any:
    spec = registry.get(name)
    missing = runs_here(spec)
    return pytest.param(
        spec, id=name, marks=pytest.mark.skipif(missing is not None, reason=missing or "")
    )


# Vectors of 4, 8 and 16 lanes.
TARGETS = [_profile(name) for name in ("x86-sse4", "x86-avx2", "x86-avx512")]


def run_all(
    functions: dict[str, Any], target: TargetSpec, calls: dict[str, list[NDArray[Any]]]
) -> dict[str, FloatArray]:
    """Build the functions as one module and call each; their last arguments afterwards."""
    executable = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target.tvm_target))
    results = {}
    for name, arrays in calls.items():
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
        executable[name](*tensors)
        results[name] = tensors[-1].numpy()
    return results


def run(function: Any, target: TargetSpec, *arrays: NDArray[Any]) -> FloatArray:
    """Build and call one function called NAME; its last argument afterwards."""
    return run_all({NAME: function}, target, {NAME: list(arrays)})[NAME]


def distinct_nans(size: int) -> FloatArray:
    """NaNs that differ in their bits, so that no write into them goes unnoticed."""
    return (np.arange(size, dtype=np.uint32) % (1 << 22) | 0x7FC00000).view(np.float32)


def bits(array: FloatArray) -> NDArray[np.uint32]:
    """The bit patterns, which also tell NaNs and zeros apart."""
    return np.ascontiguousarray(array).view(np.uint32)


def random_image(rng: np.random.Generator, *shape: int) -> FloatArray:
    """Normally distributed values."""
    return rng.standard_normal(shape).astype(np.float32)


def _channel_bases(view: View) -> NDArray[np.int64]:
    return (view.first + np.arange(view.count)) * view.layout.channel_stride


def pixels_of(view: View) -> NDArray[np.bool_]:
    """Which values of an image's buffer are pixels of the view's channels."""
    mask = np.zeros(view.layout.size, np.bool_)
    mask[_channel_bases(view)[:, None, None] + view.layout.pixel_offsets()] = True
    return mask


def vectors_of(view: View) -> NDArray[np.bool_]:
    """Which values of an image's buffer lie in vectors of the view's channels, halo included."""
    layout, grid = view.layout, view.layout.grid
    top, left, bottom, right = layout.halo
    rows, cols = np.arange(-top, grid.rows + bottom), np.arange(-left, grid.cols + right)
    starts = np.asarray(layout.offset(rows[:, None], cols[None, :]))
    mask = np.zeros(layout.size, np.bool_)
    at = _channel_bases(view)[:, None, None] + starts
    mask[at[..., None] + np.arange(grid.lanes)] = True
    return mask


def defined_of(view: View) -> NDArray[np.bool_]:
    """What the view's writer has to define: pixels, and in padded layouts all other lanes too."""
    return pixels_of(view) if view.layout.tile is not None else vectors_of(view)


def pack_view(view: View, image: FloatArray) -> FloatArray:
    """[N, view.count, H, W] packed into a buffer; everything not defined is NaN."""
    layout = view.layout
    everything = np.full((len(image), layout.channels, *image.shape[2:]), np.nan, np.float32)
    everything[:, view.first : view.first + view.count] = image
    packed = layout.pack(everything).reshape(len(image), -1)
    nans = distinct_nans(packed.size).reshape(packed.shape)
    return np.where(defined_of(view), packed, nans).ravel()


def unpack_view(view: View, flat: FloatArray) -> FloatArray:
    """The view's channels [N, view.count, H, W]."""
    return view.layout.unpack(flat)[:, view.first : view.first + view.count]


def check_written(view: View, before: FloatArray, after: FloatArray) -> FloatArray:
    """The view's channels, after checks on everything around them.

    The halo and the lanes past the picture of a padded layout must be what `LaneLayout.pack`
    makes of the pixels; values outside the view's vectors must not have changed.
    """
    image = unpack_view(view, after)
    assert np.isfinite(image).all(), "a pixel was not written, or a NaN from outside reached it"
    size = view.layout.size
    got = bits(after).reshape(-1, size)
    want = bits(pack_view(view, image)).reshape(-1, size)
    defined = defined_of(view)
    assert np.array_equal(got[:, defined], want[:, defined]), "halo, or lanes past the picture"
    outside = ~vectors_of(view)
    kept = bits(before).reshape(-1, size)
    assert np.array_equal(got[:, outside], kept[:, outside]), "values outside the view changed"
    return image


def relative_error(got: FloatArray, want: NDArray[np.float64]) -> float:
    """Largest difference relative to the largest value."""
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1.0))


def lane_splits(lanes: int) -> list[tuple[int, int]]:
    """All (sy, sx) of a vector."""
    return [(sy, lanes // sy) for sy in range(1, lanes + 1) if lanes % sy == 0]


def part_of(layout: LaneLayout, first: int, extra: int) -> View:
    """All channels of the layout as channels `first...` of a buffer with `extra` more after."""
    count = layout.channels
    return View(replace(layout, channels=first + count + extra), first, count)
