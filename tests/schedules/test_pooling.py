"""Pooling between lane-strided buffers, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.schedules import references
from tests.schedules.building import (
    NAME,
    TARGETS,
    FloatArray,
    check_written,
    distinct_nans,
    lane_splits,
    pack_view,
    part_of,
    random_image,
    relative_error,
    run,
)
from topiarist.schedules.cpu.pooling import (
    average_scale,
    global_average_prim_func,
    pool_prim_func,
)
from topiarist.schedules.layout import Grid, Halo, LaneLayout, View, make_grid
from topiarist.targets.spec import TargetSpec

TOLERANCE = 1e-6


@dataclass(frozen=True)
class PoolCase:
    """A pooling layer; `ceil` counts windows that begin inside and end beyond the padding."""

    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (2, 2)
    padding: Halo = (1, 1, 1, 1)
    plane: tuple[int, int] = (13, 13)
    channels: int = 5
    batch: int = 1
    threads: int = 1
    ceil: bool = False
    include_pad: bool = False
    tiled_output: bool = False
    part: bool = False
    split: int = 1

    def out_extent(self, axis: int) -> int:
        """Rows (0) or columns (1) of the result."""
        span = self.plane[axis] + self.padding[axis] + self.padding[axis + 2] - self.kernel[axis]
        steps = -(-span // self.strides[axis]) if self.ceil else span // self.strides[axis]
        return steps + 1

    @property
    def beyond(self) -> Halo:
        """The padding with what windows reach beyond it."""
        top, left, bottom, right = self.padding
        over = [
            max(0, (self.out_extent(i) - 1) * self.strides[i] + self.kernel[i] - covered)
            for i, covered in ((0, self.plane[0] + top), (1, self.plane[1] + left))
        ]
        return top, left, max(bottom, over[0]), max(right, over[1])


CASES = {
    "3x3_stride_2": PoolCase(),
    "3x3_stride_1": PoolCase(strides=(1, 1), part=True, batch=3),
    "2x2": PoolCase(kernel=(2, 2), padding=(0, 0, 0, 0), plane=(14, 10), tiled_output=True),
    "2x2_ceil": PoolCase(kernel=(2, 2), padding=(0, 0, 0, 0), ceil=True, split=0),
    "3x3_ceil": PoolCase(padding=(0, 0, 0, 0), plane=(14, 14), ceil=True, split=2),
    "asymmetric": PoolCase(padding=(0, 0, 1, 1), plane=(12, 11), include_pad=True),
    "include_pad": PoolCase(include_pad=True, tiled_output=True, part=True),
    "include_pad_ceil": PoolCase(padding=(1, 0, 1, 0), plane=(8, 8), include_pad=True, ceil=True),
    "3x1": PoolCase(kernel=(3, 1), strides=(1, 2), padding=(1, 0, 1, 0), plane=(7, 5)),
    "stride_beyond_kernel": PoolCase(kernel=(1, 2), strides=(3, 3), padding=(0, 0, 0, 0)),
    "threads": PoolCase(threads=2, batch=3, part=True, split=0),
    "one_wide": PoolCase(plane=(9, 1), kernel=(3, 1), padding=(1, 0, 1, 0)),
}


def views_of(case: PoolCase, lanes: int, fill: float) -> tuple[View, View]:
    """Input and output; the halo is the least that the windows need."""
    splits = lane_splits(lanes)
    sy, sx = splits[case.split % len(splits)]
    grid = make_grid(case.out_extent(0), case.out_extent(1), sy, sx)
    rows, cols = grid.rows * case.strides[0], grid.cols * case.strides[1]
    top, left = case.padding[:2]
    after = [
        max(0, k - 1 - before - (s - 1))
        for k, before, s in zip(case.kernel, (top, left), case.strides, strict=True)
    ]
    halo = top, left, after[0], after[1]
    x = LaneLayout(case.channels, Grid(*case.plane, sy, sx, rows, cols), halo, fill=fill)
    y = LaneLayout(case.channels, grid, (1, 2, 2, 1))
    if case.tiled_output:
        y = replace(y, halo=(0, 0, 0, 0), tile=(1, grid.cols))
    around = (2, 3) if case.part else (0, 0)
    return part_of(x, *around), part_of(y, *around)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_maximum(name: str, target: TargetSpec) -> None:
    """Exact; padding does not count, even where all values are negative."""
    case = CASES[name]
    image = random_image(np.random.default_rng(1), case.batch, case.channels, *case.plane) - 5
    x, y = views_of(case, target.lanes, -np.inf)
    seen = references.windows(image, case.kernel, case.strides, case.beyond, fill=-np.inf)
    before = distinct_nans(case.batch * y.layout.size)
    function = pool_prim_func(
        NAME,
        "max",
        x,
        y,
        kernel=case.kernel,
        strides=case.strides,
        padding=case.padding[:2],
        batch=case.batch,
        threads=case.threads,
    )
    after = run(function, target, pack_view(x, image), before)
    assert np.array_equal(check_written(y, before, after), seen.max(axis=(4, 5)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_average(name: str, target: TargetSpec) -> None:
    """Padding counts only with `include_pad`, and what lies beyond it never."""
    case = CASES[name]
    image = random_image(np.random.default_rng(2), case.batch, case.channels, *case.plane)
    x, y = views_of(case, target.lanes, 0.0)
    before = distinct_nans(case.batch * y.layout.size)
    function = pool_prim_func(
        NAME,
        "avg",
        x,
        y,
        kernel=case.kernel,
        strides=case.strides,
        padding=case.padding[:2],
        batch=case.batch,
        threads=case.threads,
    )
    scale = average_scale(
        y.layout,
        *case.plane,
        kernel=case.kernel,
        strides=case.strides,
        padding=case.padding,
        count_include_pad=case.include_pad,
    )
    after = run(function, target, pack_view(x, image), scale, before)
    got = check_written(y, before, after)
    assert relative_error(got, average(case, image)) < TOLERANCE


def average(case: PoolCase, image: FloatArray) -> references.Array:
    """The mean over each window's values that count."""
    total = references.windows(image, case.kernel, case.strides, case.beyond).sum(axis=(4, 5))
    counted = np.ones((1, 1, *case.plane), np.float32)
    beyond = case.beyond
    if case.include_pad:
        top, left, bottom, right = case.padding
        counted = np.pad(counted, ((0, 0), (0, 0), (top, bottom), (left, right)), mode="edge")
        beyond = 0, 0, beyond[2] - bottom, beyond[3] - right
    seen = references.windows(counted, case.kernel, case.strides, beyond)
    return np.asarray(total / seen.sum(axis=(4, 5)))


GLOBAL = {
    "padded": LaneLayout(5, make_grid(13, 13, 2, 2), (1, 0, 2, 1)),
    "odd": LaneLayout(5, make_grid(5, 7, 2, 2)),
    "tiled": LaneLayout(5, make_grid(7, 7, 2, 2), tile=(2, 2)),
    "one_pixel": LaneLayout(5, make_grid(1, 1, 2, 2)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", GLOBAL)
def test_global_average(name: str, threads: int, target: TargetSpec) -> None:
    """Of part of a buffer; lanes past the picture, NaN or fill, do not count."""
    layout = GLOBAL[name]
    height, width = layout.grid.height, layout.grid.width
    grid = make_grid(height, width, *lane_splits(target.lanes)[1])
    tile = (1, grid.cols) if layout.tile else None
    view = part_of(replace(layout, grid=grid, tile=tile, fill=7.0), 2, 1)
    image = random_image(np.random.default_rng(3), 3, 5, height, width)
    function = global_average_prim_func(NAME, view, batch=3, threads=threads)
    got = run(function, target, pack_view(view, image), distinct_nans(15))
    want = image.astype(np.float64).mean(axis=(2, 3))
    assert relative_error(got.reshape(3, 5), want) < TOLERANCE
