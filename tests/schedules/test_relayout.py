"""Moves between layouts: bit for bit, halo included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.schedules.building import (
    NAME,
    TARGETS,
    FloatArray,
    bits,
    check_written,
    distinct_nans,
    lane_splits,
    pack_view,
    part_of,
    random_image,
    run,
    vectors_of,
)
from topiarist.schedules.cpu.relayout import (
    from_lanes_prim_func,
    from_lanes_table,
    to_lanes_prim_func,
    to_lanes_tables,
)
from topiarist.schedules.layout import Grid, LaneLayout, PlainLayout, View, make_grid
from topiarist.targets.spec import TargetSpec

CHANNELS = 3
PLANES = [(13, 13), (5, 7), (7, 1), (1, 1)]


def padded(plane: tuple[int, int], lanes: int, split: int = 1) -> LaneLayout:
    """A layout with an uneven halo."""
    grid = make_grid(*plane, *lane_splits(lanes)[split])
    return LaneLayout(CHANNELS, grid, (2, 1, 0, 3))


def tiled(plane: tuple[int, int], lanes: int, split: int = 0) -> LaneLayout:
    """A layout of tiles one vector high."""
    layout = padded(plane, lanes, split)
    return replace(layout, halo=(0, 0, 0, 0), tile=(1, layout.grid.cols))


def to_lanes(
    source: PlainLayout | View,
    target_view: View,
    buffer: FloatArray,
    target: TargetSpec,
    *,
    batch: int,
    threads: int,
    strides: tuple[int, int] = (1, 1),
) -> tuple[FloatArray, FloatArray]:
    """The target's buffer before and after the move."""
    layout = source.layout if isinstance(source, View) else source
    function = to_lanes_prim_func(NAME, source, target_view, batch=batch, threads=threads)
    tables = to_lanes_tables(layout, target_view.layout, strides)
    before = distinct_nans(batch * target_view.layout.size)
    return before, run(function, target, buffer, *tables, before)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 2)])
def test_from_row_major(
    plane: tuple[int, int], batch: int, threads: int, target: TargetSpec
) -> None:
    image = random_image(np.random.default_rng(1), batch, CHANNELS, *plane)
    for layout in (padded(plane, target.lanes), tiled(plane, target.lanes)):
        view = part_of(replace(layout, fill=-np.inf), 2, 1)
        plain = PlainLayout(image.shape)
        before, after = to_lanes(plain, view, image.ravel(), target, batch=batch, threads=threads)
        assert np.array_equal(check_written(view, before, after), image)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("plane", PLANES)
def test_between_lanes(plane: tuple[int, int], target: TargetSpec) -> None:
    """From one split of the lanes to another, padded and tiled."""
    image = random_image(np.random.default_rng(2), 2, CHANNELS, *plane)
    pairs = [
        (padded(plane, target.lanes, 0), tiled(plane, target.lanes, 1)),
        (tiled(plane, target.lanes, 2), padded(plane, target.lanes, 1)),
    ]
    for source, layout in pairs:
        x, y = part_of(source, 1, 2), part_of(layout, 2, 0)
        before, after = to_lanes(x, y, pack_view(x, image), target, batch=2, threads=1)
        assert np.array_equal(check_written(y, before, after), image)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strides", [(2, 2), (3, 1)])
@pytest.mark.parametrize("from_lanes", [False, True])
def test_strides_take_every_so_many_pixels(
    strides: tuple[int, int], from_lanes: bool, target: TargetSpec
) -> None:
    image = random_image(np.random.default_rng(3), 2, CHANNELS, 13, 11)
    picked = image[:, :, :: strides[0], :: strides[1]]
    y = part_of(padded((picked.shape[2], picked.shape[3]), target.lanes), 1, 1)
    source: PlainLayout | View = PlainLayout(image.shape)
    buffer = image.ravel()
    if from_lanes:
        source = part_of(tiled((13, 11), target.lanes), 0, 1)
        buffer = pack_view(source, image)
    before, after = to_lanes(source, y, buffer, target, batch=2, threads=1, strides=strides)
    assert np.array_equal(check_written(y, before, after), picked)


@pytest.mark.parametrize("target", TARGETS)
def test_grids_that_do_not_cover_their_plane(target: TargetSpec) -> None:
    """The last row and column lie in the halo only."""
    sy, sx = lane_splits(target.lanes)[1]
    grid = Grid(4 * sy + 1, 2 * sx + 1, sy, sx, 4, 2)
    image = random_image(np.random.default_rng(4), 2, CHANNELS, grid.height, grid.width)
    view = part_of(LaneLayout(CHANNELS, grid, (0, 1, 1, 1)), 1, 2)
    plain = PlainLayout(image.shape)
    before, after = to_lanes(plain, view, image.ravel(), target, batch=2, threads=1)
    want = pack_view(view, image).reshape(2, -1)
    want = np.where(vectors_of(view), want, before.reshape(2, -1))
    assert np.array_equal(bits(after).reshape(2, -1), bits(want))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 2)])
def test_to_row_major(plane: tuple[int, int], batch: int, threads: int, target: TargetSpec) -> None:
    image = random_image(np.random.default_rng(5), batch, CHANNELS, *plane)
    for layout in (padded(plane, target.lanes), tiled(plane, target.lanes)):
        view = part_of(layout, 2, 1)
        function = from_lanes_prim_func(NAME, view, batch=batch, threads=threads)
        table = from_lanes_table(view.layout)
        got = run(function, target, pack_view(view, image), table, distinct_nans(image.size))
        assert np.array_equal(got.reshape(image.shape), image)
