"""Activation layouts as values: how the pixels of a tensor lie in memory.

A vector register holds one pixel of each of `sy * sx` sub-images of the picture ("lane-strided"):
pixel (y, x) lives in vector (y % rows, x % cols), lane (y // rows) * sx + x // cols. Every shift
by a filter tap is then a shift by whole, aligned vectors, and a convolution of stride s between
grids with `rows_in = s * rows_out` is a stride of s vectors inside the same lanes.

Vectors are stored either channel by channel with a halo (`tile is None`), which a kernel with
taps needs, or tile by tile with the channels inside (`tile = (R, V)`), which keeps the working
set of a 1x1 convolution small. Lanes past the picture hold garbage in a tiled layout and `fill`
in a padded one; the kernel that writes a padded layout also writes its halo (`halo_fixes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
Halo = tuple[int, int, int, int]  # top, left, bottom, right; in pixels of a sub-image


@dataclass(frozen=True)
class Grid:
    """The pixels of a plane dealt out to `rows * cols` vectors of `sy * sx` lanes.

    A grid that does not cover its plane holds the rest only in a halo: enough for a layer with
    strides, and only a copy of a tensor may be laid out so.
    """

    height: int
    width: int
    sy: int
    sx: int
    rows: int
    cols: int

    @property
    def covers(self) -> bool:
        """Whether every pixel of the plane has a lane of its own."""
        return self.rows * self.sy >= self.height and self.cols * self.sx >= self.width

    @property
    def lanes(self) -> int:
        """Values per vector."""
        return self.sy * self.sx

    def lane_pixels(self, row: int, col: int) -> tuple[IntArray, IntArray]:
        """The pixel (y, x) in each lane of vector (row, col), which may lie in the halo."""
        lane = np.arange(self.lanes)
        return lane // self.sx * self.rows + row, lane % self.sx * self.cols + col

    def __str__(self) -> str:
        return f"{self.height}x{self.width}@{self.sy}x{self.sx}:{self.rows}x{self.cols}"


def make_grid(height: int, width: int, sy: int, sx: int) -> Grid:
    """The smallest grid of `sy` by `sx` sub-images over the plane."""
    return Grid(height, width, sy, sx, -(-height // sy), -(-width // sx))


def halo_of_taps(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
) -> Halo:
    """Rows and columns beyond the sub-images that the taps of a window reach into."""
    top, left = padding[:2]
    sizes = zip(kernel, dilation, strides, (top, left), strict=True)
    after = [max(0, (k - 1) * d - before - (s - 1)) for k, d, s, before in sizes]
    return top, left, after[0], after[1]


@dataclass(frozen=True)
class PlainLayout:
    """Row-major, no padding."""

    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values, all images together."""
        return int(np.prod(self.shape))

    def __str__(self) -> str:
        return "plain"


@dataclass(frozen=True)
class LaneLayout:
    """Lane-strided vectors of one image, padded (`tile is None`) or tiled; images follow."""

    channels: int
    grid: Grid
    halo: Halo = (0, 0, 0, 0)
    tile: tuple[int, int] | None = None
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.tile is None:
            return
        if self.grid.rows % self.tile[0] or self.grid.cols % self.tile[1]:
            raise ValueError(f"tile {self.tile} does not divide the grid {self.grid}")
        if any(self.halo):
            raise ValueError("a tiled layout has no halo")

    @property
    def row_vectors(self) -> int:
        """Vectors per stored row (padded layouts)."""
        return self.grid.cols + self.halo[1] + self.halo[3]

    @property
    def stored_rows(self) -> int:
        """Rows with halo (padded layouts)."""
        return self.grid.rows + self.halo[0] + self.halo[2]

    @cached_property
    def channel_stride(self) -> int:
        """Distance in values between the same pixel of neighbouring channels."""
        lanes = self.grid.lanes
        if self.tile is not None:
            return self.tile[0] * self.tile[1] * lanes
        stride = self.row_vectors * self.stored_rows * lanes
        if lanes == 1:  # a GPU's plane: four values are its widest load, which has to be aligned
            return -(-stride // 4) * 4
        # Planes at a multiple of 4 KB would share few cache sets.
        return stride + lanes if stride * 4 % 4096 < 64 else stride

    @property
    def size(self) -> int:
        """Values per image."""
        if self.tile is None:
            return self.channels * self.channel_stride
        return self.channels * self.grid.rows * self.grid.cols * self.grid.lanes

    def offset(self, row: Any, col: Any) -> Any:
        """Where vector (row, col) of channel 0 starts; integers or integer arrays."""
        lanes = self.grid.lanes
        if self.tile is None:
            return ((row + self.halo[0]) * self.row_vectors + col + self.halo[1]) * lanes
        r, v = self.tile
        tile_index = row // r * (self.grid.cols // v) + col // v
        return tile_index * self.channels * self.channel_stride + (row % r * v + col % v) * lanes

    def pack(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, C, H, W] -> the flat buffer, halo included (what a correct kernel writes)."""
        n = image.shape[0]
        flat = np.zeros((n, self.size), image.dtype)
        base = np.arange(self.channels) * self.channel_stride
        top, left, bottom, right = self.halo
        grid = self.grid
        for row in range(-top, grid.rows + bottom):
            for col in range(-left, grid.cols + right):
                y, x = grid.lane_pixels(row, col)
                inside = (y >= 0) & (y < grid.height) & (x >= 0) & (x < grid.width)
                lane = np.arange(grid.lanes)
                at = base[:, None] + self.offset(row, col) + lane[None, :]
                picked = image[:, :, np.where(inside, y, 0), np.where(inside, x, 0)]
                flat[:, at] = np.where(inside, picked, self.fill)
        return flat.ravel()

    def pixel_offsets(self) -> IntArray:
        """[H, W] positions of the pixels of channel 0. Raises ValueError if some have none."""
        grid = self.grid
        if not grid.covers:
            raise ValueError(f"{grid} does not cover the plane")
        y, x = np.mgrid[: grid.height, : grid.width]
        lane = y // grid.rows * grid.sx + x // grid.cols
        return np.asarray(self.offset(y % grid.rows, x % grid.cols) + lane)

    def unpack(self, flat: NDArray[np.float32]) -> NDArray[np.float32]:
        """The flat buffer -> [N, C, H, W]."""
        base = np.arange(self.channels) * self.channel_stride
        return flat.reshape(-1, self.size)[:, base[:, None, None] + self.pixel_offsets()]

    def __str__(self) -> str:
        order = f"tile{self.tile[0]}x{self.tile[1]}" if self.tile else f"halo{self.halo}"
        return f"lanes({self.grid} {order})"


@dataclass(frozen=True)
class View:
    """Channels `first .. first + count` of a buffer; a concatenation's parts are such views."""

    layout: LaneLayout
    first: int
    count: int

    @property
    def base(self) -> int:
        """Where the first channel starts."""
        return self.first * self.layout.channel_stride

    def at(self, image: Any, channel: Any) -> Any:
        """Where a channel of the view starts, in an image of the batch."""
        return image * self.layout.size + self.base + channel * self.layout.channel_stride


def whole(layout: LaneLayout) -> View:
    """All channels of a buffer."""
    return View(layout, 0, layout.channels)


@dataclass(frozen=True)
class HaloFix:
    """One run of vectors to set: dst = shuffle(src, fill; pick), for `rows` x `cols` vectors.

    `pick[lane]` is the source lane, or -1 for the fill value.
    """

    row: int
    col: int
    rows: int
    cols: int
    source_row: int
    source_col: int
    pick: tuple[int, ...]


def _fix_at(layout: LaneLayout, row: int, col: int) -> tuple[int, int, tuple[int, ...]] | None:
    """Source vector and lanes for the vector (row, col), None where it needs nothing."""
    grid = layout.grid
    y, x = grid.lane_pixels(row, col)
    inside = (y >= 0) & (y < grid.height) & (x >= 0) & (x < grid.width)
    source_row, source_col = row % grid.rows, col % grid.cols
    shift = row // grid.rows * grid.sx + col // grid.cols
    pick = np.where(inside, np.arange(grid.lanes) + shift, -1)
    if (source_row, source_col) == (row, col) and inside.all():
        return None
    return source_row, source_col, tuple(int(p) for p in pick)


def _runs(columns: list[tuple[int, int, int, tuple[int, ...]]]) -> Iterator[list[int]]:
    """Groups of consecutive entries with one pattern and one distance to the source."""
    run: list[int] = []
    for i, (col, _, source_col, pick) in enumerate(columns):
        if run:
            before = columns[run[-1]]
            if (col, source_col, pick) != (before[0] + 1, before[2] + 1, before[3]):
                yield run
                run = []
        run.append(i)
    if run:
        yield run


def halo_fixes(layout: LaneLayout) -> list[HaloFix]:
    """What a producer has to do after writing the interior of a padded layout.

    Interior vectors with lanes past the picture come first, then the halo, whose sources are
    interior vectors.
    """
    if layout.tile is not None:
        return []
    if not layout.grid.covers:
        raise ValueError(f"{layout.grid} does not cover the plane: its halo can't be derived")
    grid, (top, left, bottom, right) = layout.grid, layout.halo
    interior: list[HaloFix] = []
    outside: list[HaloFix] = []
    for row in range(-top, grid.rows + bottom):
        found = []
        for col in range(-left, grid.cols + right):
            fix = _fix_at(layout, row, col)
            if fix is not None:
                found.append((col, *fix))
        for run in _runs(found):
            col, source_row, source_col, pick = found[run[0]]
            inner = 0 <= row < grid.rows and 0 <= col < grid.cols
            _append_merged(
                interior if inner else outside,
                HaloFix(row, col, 1, len(run), source_row, source_col, pick),
            )
    return _interior_only(interior, grid) + outside


def _interior_only(fixes: list[HaloFix], grid: Grid) -> list[HaloFix]:
    for fix in fixes:
        if fix.col + fix.cols > grid.cols:
            raise AssertionError("an interior run may not reach into the halo")
    return fixes


def _append_merged(fixes: list[HaloFix], fix: HaloFix) -> None:
    """Append, or extend the run of the row above when it is the same one row further."""
    for i in range(len(fixes) - 1, max(-1, len(fixes) - 4), -1):
        above = fixes[i]
        same = (above.col, above.cols, above.source_col, above.pick) == (
            fix.col,
            fix.cols,
            fix.source_col,
            fix.pick,
        )
        follows = above.row + above.rows == fix.row
        source_follows = above.source_row + above.rows == fix.source_row
        if same and follows and source_follows:
            fixes[i] = replace(above, rows=above.rows + 1)
            return
    fixes.append(fix)


@dataclass(frozen=True)
class TileAddress:
    """Where the vectors of output tile (ty, tx) lie: base(ty, tx) + step[r][v].

    `row` and `col` each hold (period, outer, inner): base += t // period * outer + t % period *
    inner.
    """

    origin: int
    row: tuple[int, int, int]
    col: tuple[int, int, int]
    steps: tuple[tuple[int, ...], ...]

    def base(self, ty: Any, tx: Any) -> Any:
        """The tile's base as an expression of the tile indices."""
        return self.origin + _axis(ty, self.row) + _axis(tx, self.col)


def _axis(index: Any, axis: tuple[int, int, int]) -> Any:
    period, outer, inner = axis
    if period == 1:
        return index * outer
    return index // period * outer + index % period * inner


def _fit_axis(values: IntArray) -> tuple[int, int, int] | None:
    """(period, outer, inner) that reproduces `values`, which start at 0."""
    n = len(values)
    index = np.arange(n)
    for period in range(1, n + 1):
        if n % period:
            continue
        outer = int(values[period]) if period < n else 0
        inner = int(values[1]) if period > 1 else 0
        if (index // period * outer + index % period * inner == values).all():
            return period, outer, inner
    return None


@lru_cache(maxsize=1 << 14)  # asked for each of a layer's configurations, and each of its densities
def tile_address(
    layout: LaneLayout, tiles: tuple[int, int], tile: tuple[int, int], stride: tuple[int, int]
) -> TileAddress | None:
    """Addresses of `tiles` output tiles of `tile` vectors each, read with `stride`.

    None when the vectors of a tile do not keep one distance to each other in this layout.
    """
    ty, tx = np.arange(tiles[0]), np.arange(tiles[1])
    row = (ty[:, None] * tile[0] + np.arange(tile[0])) * stride[0]
    col = (tx[:, None] * tile[1] + np.arange(tile[1])) * stride[1]
    limit_row = layout.grid.rows + layout.halo[2]
    if row.max() >= limit_row or col.max() >= layout.grid.cols + layout.halo[3]:
        return None
    at = np.asarray(layout.offset(row[:, None, :, None], col[None, :, None, :]))
    base = at[:, :, 0, 0]
    steps = at - base[:, :, None, None]
    if not (steps == steps[0, 0]).all():
        return None
    origin = int(base[0, 0])
    row_axis = _fit_axis(base[:, 0] - origin)
    col_axis = _fit_axis(base[0, :] - origin)
    if row_axis is None or col_axis is None:
        return None
    if not (base == base[:, :1] + base[:1, :] - origin).all():
        return None
    return TileAddress(origin, row_axis, col_axis, tuple(map(tuple, steps[0, 0].tolist())))
