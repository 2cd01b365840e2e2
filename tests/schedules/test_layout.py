"""Layouts as values: where pixels lie, what a halo holds, how tiles are addressed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.schedules.building import (
    FloatArray,
    bits,
    distinct_nans,
    part_of,
    pixels_of,
    random_image,
    vectors_of,
)
from topiarist.schedules.layout import (
    Grid,
    HaloFix,
    LaneLayout,
    PlainLayout,
    TileAddress,
    View,
    halo_fixes,
    make_grid,
    tile_address,
    whole,
)

CHANNELS = 3
PADDED = {
    "13x13": LaneLayout(CHANNELS, make_grid(13, 13, 4, 4), (1, 1, 1, 1)),
    "even": LaneLayout(CHANNELS, make_grid(16, 8, 2, 4), (1, 1, 1, 1)),
    "no_halo": LaneLayout(CHANNELS, make_grid(5, 7, 4, 2)),
    "halo_beyond_sub_image": LaneLayout(CHANNELS, make_grid(7, 7, 2, 8), (2, 2, 2, 2)),
    "halo_far_beyond": LaneLayout(CHANNELS, make_grid(3, 2, 4, 4), (3, 5, 4, 2)),
    "asymmetric": LaneLayout(CHANNELS, make_grid(5, 9, 2, 4), (1, 2, 0, 3)),
    "one_wide": LaneLayout(CHANNELS, make_grid(9, 1, 2, 2), (1, 1, 1, 1)),
    "one_pixel": LaneLayout(CHANNELS, make_grid(1, 1, 2, 2), (1, 0, 0, 1)),
    "one_row_of_lanes": LaneLayout(CHANNELS, make_grid(6, 30, 1, 16), (2, 1, 1, 2)),
    "roomy": LaneLayout(CHANNELS, Grid(5, 5, 4, 2, 4, 6), (1, 1, 1, 1)),
    "filled": LaneLayout(CHANNELS, make_grid(7, 7, 8, 2), (1, 1, 1, 1), fill=-np.inf),
    "skewed": LaneLayout(CHANNELS, make_grid(24, 24, 4, 4), (1, 1, 1, 1)),
}
TILED = {
    "tile_1x7": LaneLayout(CHANNELS, make_grid(14, 14, 8, 2), tile=(1, 7)),
    "tile_2x2": LaneLayout(CHANNELS, make_grid(13, 13, 4, 4), tile=(2, 2)),
    "tile_3x1": LaneLayout(CHANNELS, make_grid(11, 5, 2, 2), tile=(3, 1)),
    "tile_all": LaneLayout(CHANNELS, make_grid(5, 5, 2, 4), tile=(3, 2)),
}
COVERING = PADDED | TILED
# The planes' last row or column lies in the halo alone.
PARTIAL = {
    "row_short": LaneLayout(CHANNELS, Grid(9, 8, 2, 2, 4, 4), (1, 1, 1, 1)),
    "both_short": LaneLayout(CHANNELS, Grid(9, 13, 2, 4, 4, 3), (0, 0, 1, 1)),
}


def image_for(layout: LaneLayout, batch: int = 2) -> FloatArray:
    """Random pixels for the layout."""
    grid = layout.grid
    rng = np.random.default_rng(5)
    return random_image(rng, batch, layout.channels, grid.height, grid.width)


@pytest.mark.parametrize("name", COVERING)
def test_unpack_inverts_pack(name: str) -> None:
    layout = COVERING[name]
    image = image_for(layout)
    flat = layout.pack(image)
    assert flat.shape == (2 * layout.size,)
    assert np.array_equal(layout.unpack(flat), image)


@pytest.mark.parametrize("name", COVERING)
def test_every_pixel_has_a_place_of_its_own(name: str) -> None:
    layout = COVERING[name]
    at = layout.pixel_offsets()
    places = at[None] + np.arange(layout.channels)[:, None, None] * layout.channel_stride
    assert len(np.unique(places)) == places.size
    assert places.min() >= 0
    assert places.max() < layout.size


@pytest.mark.parametrize("name", COVERING | PARTIAL)
def test_pack_puts_each_pixel_of_each_vector_where_its_lane_says(name: str) -> None:
    """Halo vectors hold the pixels beyond the sub-images; what lies past the picture is `fill`."""
    layout = replace((COVERING | PARTIAL)[name], fill=-1.5)
    image, grid = image_for(layout), layout.grid
    flat = layout.pack(image).reshape(2, -1)
    top, left, bottom, right = layout.halo
    for row in range(-top, grid.rows + bottom):
        for col in range(-left, grid.cols + right):
            start = layout.offset(row, col)
            for lane in range(grid.lanes):
                y, x = lane // grid.sx * grid.rows + row, lane % grid.sx * grid.cols + col
                at = start + lane + np.arange(layout.channels) * layout.channel_stride
                inside = 0 <= y < grid.height and 0 <= x < grid.width
                want = image[:, :, y, x] if inside else np.full((2, layout.channels), -1.5)
                assert np.array_equal(flat[:, at], want), (row, col, lane)


@pytest.mark.parametrize("name", COVERING)
def test_channels_do_not_overlap(name: str) -> None:
    layout = COVERING[name]
    masks = np.stack([vectors_of(View(layout, c, 1)) for c in range(layout.channels)])
    assert masks.sum(axis=0).max() == 1
    assert np.array_equal(masks.any(axis=0), vectors_of(whole(layout)))


def test_channels_keep_away_from_multiples_of_4_kb() -> None:
    layout = PADDED["skewed"]
    vectors = layout.row_vectors * layout.stored_rows
    assert vectors * 16 * 4 % 4096 == 0
    assert layout.channel_stride == (vectors + 1) * 16
    assert LaneLayout(1, make_grid(8, 8, 4, 4)).channel_stride == 4 * 16


@pytest.mark.parametrize("name", PADDED)
def test_halo_fixes_complete_the_interior(name: str) -> None:
    """Pixels and otherwise NaN -> what `pack` makes of them, bit for bit, gaps untouched."""
    layout = PADDED[name]
    packed = layout.pack(image_for(layout)).reshape(2, -1)
    before = distinct_nans(packed.size).reshape(packed.shape)
    flat = np.where(pixels_of(whole(layout)), packed, before)
    for fix in halo_fixes(layout):
        apply_fix(layout, fix, flat)
    want = np.where(vectors_of(whole(layout)), packed, before)
    assert np.array_equal(bits(flat), bits(want))


def apply_fix(layout: LaneLayout, fix: HaloFix, flat: FloatArray) -> None:
    """What a kernel does for one fix, on [N, size]."""
    base = np.arange(layout.channels)[:, None] * layout.channel_stride
    pick = np.asarray(fix.pick)
    lanes = np.arange(layout.grid.lanes)
    for r in range(fix.rows):
        for c in range(fix.cols):
            to = base + layout.offset(fix.row + r, fix.col + c) + lanes
            source = base + layout.offset(fix.source_row + r, fix.source_col + c)
            flat[:, to] = np.where(pick >= 0, flat[:, source + np.maximum(pick, 0)], layout.fill)


@pytest.mark.parametrize("name", PADDED)
def test_halo_fixes_read_the_interior_only(name: str) -> None:
    layout = PADDED[name]
    for fix in halo_fixes(layout):
        assert 0 <= fix.source_row <= fix.source_row + fix.rows <= layout.grid.rows
        assert 0 <= fix.source_col <= fix.source_col + fix.cols <= layout.grid.cols


def test_tiled_layouts_need_no_fixes() -> None:
    assert all(halo_fixes(layout) == [] for layout in TILED.values())


def test_full_grids_without_halo_need_no_fixes() -> None:
    assert halo_fixes(LaneLayout(2, make_grid(8, 8, 4, 4))) == []


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_grids_can_only_be_packed(name: str) -> None:
    layout = PARTIAL[name]
    assert not layout.grid.covers
    with pytest.raises(ValueError, match="does not cover"):
        layout.pixel_offsets()
    with pytest.raises(ValueError, match="does not cover"):
        halo_fixes(layout)


def test_impossible_layouts_are_refused() -> None:
    grid = make_grid(13, 13, 4, 4)
    with pytest.raises(ValueError, match="does not divide"):
        LaneLayout(1, grid, tile=(3, 1))
    with pytest.raises(ValueError, match="no halo"):
        LaneLayout(1, grid, (0, 0, 0, 1), tile=(1, 4))


def test_grids_count_their_lanes() -> None:
    grid = make_grid(7, 13, 2, 8)
    assert (grid.rows, grid.cols, grid.lanes) == (4, 2, 16)
    assert grid.covers


def test_descriptions() -> None:
    assert str(PlainLayout((2, 3))) == "plain"
    assert str(PADDED["13x13"]) == "lanes(13x13@4x4:4x4 halo(1, 1, 1, 1))"
    assert str(TILED["tile_2x2"]) == "lanes(13x13@4x4:4x4 tile2x2)"


def test_views_start_at_their_first_channel() -> None:
    for layout in (PADDED["13x13"], TILED["tile_2x2"]):
        view = part_of(layout, 2, 1)
        assert view.layout.channels == CHANNELS + 3
        assert view.base == 2 * layout.channel_stride


def check_address(
    address: TileAddress,
    layout: LaneLayout,
    tiles: tuple[int, int],
    tile: tuple[int, int],
    stride: tuple[int, int],
) -> None:
    """Every vector of every tile lies where `LaneLayout.offset` has it."""
    for ty, tx, r, v in np.ndindex(*tiles, *tile):
        want = layout.offset((ty * tile[0] + r) * stride[0], (tx * tile[1] + v) * stride[1])
        assert address.base(ty, tx) + address.steps[r][v] == want, (ty, tx, r, v)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("tile", [(1, 1), (1, 4), (2, 2), (3, 4), (6, 2), (4, 3)])
def test_tiles_of_padded_layouts_are_addressed(
    tile: tuple[int, int], stride: tuple[int, int]
) -> None:
    grid = Grid(90, 90, 4, 4, 12 * stride[0], 12 * stride[1])
    layout = LaneLayout(2, grid, (1, 2, 0, 1))
    tiles = 12 // tile[0], 12 // tile[1]
    address = tile_address(layout, tiles, tile, stride)
    assert address is not None
    check_address(address, layout, tiles, tile, stride)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("stored", [(1, 1), (1, 6), (2, 3), (4, 12), (12, 12), (3, 4)])
def test_tiles_of_tiled_layouts_are_addressed_or_declined(
    stored: tuple[int, int], stride: tuple[int, int]
) -> None:
    """Tiles that lie in stored tiles, or consist of whole ones, or neither."""
    grid = Grid(90, 90, 4, 4, 12, 12)
    layout = LaneLayout(5, grid, tile=stored)
    extent = 12 // stride[0], 12 // stride[1]
    found = 0
    for rows, cols in np.ndindex(*extent):
        tile = rows + 1, cols + 1
        if extent[0] % tile[0] or extent[1] % tile[1]:
            continue
        tiles = extent[0] // tile[0], extent[1] // tile[1]
        address = tile_address(layout, tiles, tile, stride)
        if address is not None:
            found += 1
            check_address(address, layout, tiles, tile, stride)
    assert found
    one = tile_address(layout, (extent[0] // 1, extent[1] // 1), (1, 1), stride)
    if stride == (1, 1):
        assert one is not None
        same = tile_address(layout, (12 // stored[0], 12 // stored[1]), stored, stride)
        assert same is not None


def test_tiles_across_stored_tiles_are_declined() -> None:
    layout = LaneLayout(5, Grid(90, 90, 4, 4, 12, 12), tile=(1, 4))
    assert tile_address(layout, (12, 2), (1, 6), (1, 1)) is None
    assert tile_address(layout, (12, 4), (1, 3), (1, 1)) is None


def test_tiles_beyond_the_layout_are_declined() -> None:
    layout = LaneLayout(1, Grid(8, 8, 2, 2, 4, 4), (1, 1, 0, 0))
    assert tile_address(layout, (4, 4), (1, 1), (1, 1)) is not None
    assert tile_address(layout, (5, 4), (1, 1), (1, 1)) is None
    assert tile_address(layout, (4, 3), (1, 2), (1, 1)) is None
