"""Winograd convolution F(m x m, r x r) on lane-strided vectors (Lavin and Gray, CVPR 2016).

Every lane works on its own sub-image, so the transforms are plain vector arithmetic. In blocks of
tiles: the patches of the input are transformed to V [frequency][C][tile], multiplied per frequency
with the transformed weight U [frequency][O][C] to M [frequency][O][tile], and M is transformed
back. Of 3x3 taps, m * m outputs take (m + 2)^2 products instead of 9 m * m.

A convolution of stride s is the sum of s * s convolutions of stride 1, of every s-th row and column
of the image with every s-th tap: phases, which count as input channels of their own here. The 7x7
window of stride 2 that ResNets begin with becomes four of 4x4 taps: 49 products for 16 outputs and
phase, instead of 16 * 49 for all four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.cpu.ahead import Ahead
from topiarist.schedules.cpu.core import Core, core_of
from topiarist.schedules.cpu.direct import refuses_views
from topiarist.schedules.cpu.minimal_filter import MOST_PRODUCTS, MinimalFilter
from topiarist.schedules.kernel import (
    CONSTANT_ONLY,
    ConvKernel,
    ConvSite,
    KernelConfig,
    Packed,
)
from topiarist.schedules.layout import View
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.spec import TargetSpec

_SKEW_BYTES = 4096  # planes at a multiple of this share few cache sets
_MOVED_SHARE = 0.75  # of what a core reads in order, for transformed weights
_LOAD = 1.6  # a load relative to those of the direct form

FloatArray = NDArray[np.float32]
Vectors = list[Any]


@dataclass(frozen=True)
class WinogradConfig(KernelConfig):
    """The knobs: outputs per tile edge, tiles of a block, and the product's register tile.

    `rows` and `cols` are 1, 2 or 4 each (1: that axis is convolved directly), `tiles` a divisor
    of the number of tiles, `block_tiles` a divisor of `tiles`.
    """

    rows: int
    cols: int
    tiles: int
    out_block: int
    block_tiles: int

    def __str__(self) -> str:
        return f"F({self.rows}x{self.cols}) {self.tiles}/{self.block_tiles}x{self.out_block}"


def _bind(*values: Any) -> Vectors:
    return [T.bind(value) for value in values]


Transform = Callable[[MinimalFilter, Vectors, int], Vectors]


def _along_both(
    transform: Transform,
    filters: tuple[MinimalFilter, MinimalFilter],
    patch: list[Vectors],
    lanes: int,
) -> list[Vectors]:
    """The transform of the rows of a patch, then of its columns."""
    by_row = [_bind(*transform(filters[1], row, lanes)) for row in patch]
    columns = [transform(filters[0], list(column), lanes) for column in zip(*by_row, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _filters(workload: ConvWorkload, config: WinogradConfig) -> tuple[MinimalFilter, MinimalFilter]:
    """Along both axes."""
    rows, cols = _taps(workload)
    return MinimalFilter(config.rows, rows), MinimalFilter(config.cols, cols)


def _taps(workload: ConvWorkload) -> tuple[int, int]:
    """Taps of a phase, of the one with most."""
    rows, cols = (-(-k // s) for k, s in zip(workload.kernel, workload.strides, strict=True))
    return rows, cols


def _frequencies(workload: ConvWorkload, config: WinogradConfig) -> int:
    rows, cols = _filters(workload, config)
    return rows.products * cols.products


def _inputs(workload: ConvWorkload) -> int:
    """Input channels, each phase counted."""
    return workload.in_channels * workload.strides[0] * workload.strides[1]


@dataclass(frozen=True)
class _Axis:
    """Tiles of `size` along an axis of `extent` vectors; the last may overlap the one before."""

    extent: int
    size: int

    @property
    def count(self) -> int:
        return -(-self.extent // self.size)

    @property
    def overlaps(self) -> bool:
        return self.extent % self.size != 0

    def start(self, index: Any) -> Any:
        """The first vector of a tile."""
        if not self.overlaps:
            return index * self.size
        return T.min(index * self.size, self.extent - self.size)


@dataclass(frozen=True)
class _Winograd:
    """A layer with its knobs as loops."""

    workload: ConvWorkload
    x: View
    y: View
    residual: View | None
    in_place: bool
    threads: int
    core: Core
    config: WinogradConfig

    @property
    def lanes(self) -> int:
        return self.y.layout.grid.lanes

    @property
    def filters(self) -> tuple[MinimalFilter, MinimalFilter]:
        return _filters(self.workload, self.config)

    @property
    def inputs(self) -> int:
        return _inputs(self.workload)

    @property
    def axes(self) -> tuple[_Axis, _Axis]:
        grid = self.y.layout.grid
        return _Axis(grid.rows, self.config.rows), _Axis(grid.cols, self.config.cols)

    @property
    def frequencies(self) -> int:
        return _frequencies(self.workload, self.config)

    @property
    def tile_count(self) -> int:
        return self.axes[0].count * self.axes[1].count

    def plane(self, channels: int) -> int:
        """Distance between frequencies of V or M, in values."""
        size = channels * self.config.tiles * self.lanes
        return size + self.lanes if size * 4 % _SKEW_BYTES < 64 else size

    def segments(self) -> list[tuple[int, int, int]]:
        """(first channel, blocks, channels per block): whole blocks and the rest."""
        block = self.config.out_block
        whole, rest = divmod(self.workload.out_channels, block)
        found = [(0, whole, block), (whole * block, 1, rest)]
        return [(first, count, size) for first, count, size in found if count * size]

    def tile_starts(self, block: Any, within: Any) -> tuple[Any, Any, Any, Any]:
        """First row and column of a tile, and the first ones that no tile before it covers."""
        index = block * self.config.tiles + within
        rows, cols = self.axes
        ty, tx = T.bind(index // cols.count), T.bind(index % cols.count)
        return (
            T.bind(rows.start(ty)),
            T.bind(cols.start(tx)),
            T.bind(ty * rows.size),
            T.bind(tx * cols.size),
        )

    def emit(self, x: Any, weight: Any, bias: Any, residual: Any, y: Any) -> None:
        """All loops."""
        w = self.workload
        v = T.alloc_buffer((self.frequencies * self.plane(self.inputs),), "float32")
        m = T.alloc_buffer((self.frequencies * self.plane(w.out_channels),), "float32")
        blocks = self.tile_count // self.config.tiles
        with T.serial(0, w.batch) as image, T.serial(0, blocks) as block:
            self._transform_input(x, v, image, block)
            self._multiply(v, weight, m)
            self._transform_output(m, bias, residual, y, image, block)

    def _transform_input(self, x: Any, v: Any, image: Any, block: Any) -> None:
        tiles, (down, across) = self.config.tiles, self.workload.strides
        with (
            emit.loop(self.workload.in_channels, self.threads) as c,
            T.serial(0, tiles) as t,
        ):
            row, col, _, _ = self.tile_starts(block, t)
            for phase in range(down * across):
                patch = self._patch(x, image, c, (row, col), divmod(phase, across))
                found = _along_both(MinimalFilter.input_transform, self.filters, patch, self.lanes)
                at = T.bind(((c * down * across + phase) * tiles + t) * self.lanes)
                plane = self.plane(self.inputs)
                for f, value in enumerate(value for line in found for value in line):
                    T.buffer_store(v, value, [emit.ramp(at + f * plane, self.lanes)])

    def _patch(
        self, x: Any, image: Any, c: Any, tile: tuple[Any, Any], phase: tuple[int, int]
    ) -> list[Vectors]:
        """What a tile reads of one phase of a channel; zeros where that phase has no tap."""
        layout, w = self.x.layout, self.workload
        first = [
            start * s + p - pad
            for start, s, p, pad in zip(tile, w.strides, phase, w.padding[:2], strict=True)
        ]
        base = T.bind(self.x.at(image, c) + layout.offset(*first))
        step = [
            layout.offset(1, 0) - layout.offset(0, 0),
            layout.offset(0, 1) - layout.offset(0, 0),
        ]
        read = [
            f.outputs + len(range(p, k, s)) - 1
            for f, p, k, s in zip(self.filters, phase, w.kernel, w.strides, strict=True)
        ]

        def value(i: int, j: int) -> Any:
            if i >= read[0] or j >= read[1]:
                return emit.splat(0.0, self.lanes)
            at = base + i * w.strides[0] * step[0] + j * w.strides[1] * step[1]
            return T.bind(x[emit.ramp(at, self.lanes)])

        rows, cols = (f.products for f in self.filters)
        return [[value(i, j) for j in range(cols)] for i in range(rows)]

    def _multiply(self, v: Any, weight: Any, m: Any) -> None:
        w, c = self.workload, self.config
        with emit.loop(self.frequencies, self.threads) as f:
            for first, count, size in self.segments():
                with T.serial(0, count) as o, T.serial(0, c.tiles // c.block_tiles) as part:
                    channel = first + o * size
                    u_at = T.bind((f * w.out_channels + channel) * self.inputs)
                    sums = [emit.accumulators(c.block_tiles, self.lanes) for _ in range(size)]
                    self._product(sums, (v, self._v_at(f, part)), (weight, u_at), part)
                    for a in range(size):
                        at = (
                            f * self.plane(w.out_channels)
                            + ((channel + a) * c.tiles + part * c.block_tiles) * self.lanes
                        )
                        for t, total in enumerate(sums[a]):
                            to = emit.ramp(at + t * self.lanes, self.lanes)
                            T.buffer_store(m, emit.value_of(total), [to])

    def _v_at(self, f: Any, part: Any) -> Any:
        """Where a frequency's tiles of the first channel start."""
        within = part * self.config.block_tiles * self.lanes
        return T.bind(f * self.plane(self.inputs) + within)

    def _product(
        self, sums: list[Vectors], tiles: tuple[Any, Any], panel: tuple[Any, Any], part: Any
    ) -> None:
        """sums[o][t] = sum over C of U[o][C] V[C][t] from (buffer, start) of each."""
        (v, v_at), (weight, u_at) = tiles, panel
        c, lanes, channels = self.config, self.lanes, self.inputs
        ahead = Ahead.of(channels, len(sums), c.tiles // c.block_tiles)
        for row in sums:
            for total in row:
                emit.assign(total, emit.splat(0.0, lanes))
        with T.serial(0, ahead.parts) as chunk:
            ahead.emit(weight, u_at, part, chunk)
            with T.serial(0, ahead.channels) as within:
                k = chunk * ahead.channels + within
                at = u_at + k * len(sums)
                factors = emit.splats(weight, at, len(sums), lanes, self.core.lane_fma)
                for factor, row in zip(factors, sums, strict=True):
                    for t, total in enumerate(row):
                        read = v[emit.ramp(v_at + (k * c.tiles + t) * lanes, lanes)]
                        emit.assign(total, emit.value_of(total) + factor * read)

    def _transform_output(
        self, m: Any, bias: Any, residual: Any, y: Any, image: Any, block: Any
    ) -> None:
        tiles, lanes = self.config.tiles, self.lanes
        plane = self.plane(self.workload.out_channels)
        edge = self.filters[1].products
        with emit.loop(self.workload.out_channels, self.threads) as o, T.serial(0, tiles) as t:
            at = T.bind((o * tiles + t) * lanes)
            read = [T.bind(m[emit.ramp(at + f * plane, lanes)]) for f in range(self.frequencies)]
            patch = [read[i : i + edge] for i in range(0, len(read), edge)]
            found = _along_both(MinimalFilter.output_transform, self.filters, patch, lanes)
            values = [_bind(*line) for line in found]
            start = T.bind(emit.splat(bias[o], lanes))
            row, col, new_row, new_col = self.tile_starts(block, t)
            for i, line in enumerate(values):
                with _when(self.axes[0].overlaps, row + i >= new_row):
                    for j, value in enumerate(line):
                        with _when(self.axes[1].overlaps, col + j >= new_col):
                            self._store(y, residual, image, o, (row + i, col + j), value + start)

    def _store(
        self, y: Any, residual: Any, image: Any, o: Any, where: tuple[Any, Any], value: Any
    ) -> None:
        """One vector of the output, each exactly once: the residual may lie in it already."""
        to = emit.ramp(self.y.at(image, o) + self.y.layout.offset(*where), self.lanes)
        if self.in_place:
            value = value + y[to]
        elif self.residual is not None:
            at = self.residual.at(image, o) + self.residual.layout.offset(*where)
            value = value + residual[emit.ramp(at, self.lanes)]
        T.buffer_store(y, emit.clamp(value, self.workload.activation, self.lanes), [to])


class _when:
    """`with _when(needed, condition)`: an if where one is needed."""

    def __init__(self, needed: bool, condition: Any) -> None:
        self.frames = [T.If(condition), T.Then()] if needed else []

    def __enter__(self) -> None:
        for frame in self.frames:
            frame.__enter__()

    def __exit__(self, *error: Any) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*error)


def _divisors(size: int, limit: int) -> Iterator[int]:
    return (d for d in range(1, min(size, limit) + 1) if size % d == 0)


class WinogradDense(ConvKernel[WinogradConfig]):
    """Dense convolution by Winograd's minimal filtering, of any stride."""

    name = "winograd_dense"
    sparse = False

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves windows of a few taps per phase of the stride, without groups or dilation."""
        if workload.mixture is not None:
            return CONSTANT_ONLY
        taps = _taps(workload)
        if max(taps) == 1:
            return (
                f"window {_by(workload.kernel)} at stride {_by(workload.strides)} shares no input"
            )
        if max(taps) >= MOST_PRODUCTS:
            return f"{_by(taps)} taps per phase are too many for its precision"
        if any(s > k for k, s in zip(workload.kernel, workload.strides, strict=True)):
            return "the stride passes over inputs"
        if workload.dilation != (1, 1):
            return "dilation must be 1"
        if workload.groups != 1:
            return "groups share no input channels"
        return None

    def knobs(self, site: ConvSite) -> list[WinogradConfig]:
        """Outputs per tile, tiles of a block, and register tiles."""
        grid = site.views.y.layout.grid
        found = set()
        for rows in (1, 2, 4):
            for cols in (1, 2, 4):
                single = (rows, cols) == (1, 1) != (grid.rows, grid.cols)
                if rows > grid.rows or cols > grid.cols or single:
                    continue
                if not _computable(site.workload, rows, cols):
                    continue
                count = -(-grid.rows // rows) * -(-grid.cols // cols)
                found |= set(self._blockings(site, rows, cols, count))
        return sorted(found, key=lambda c: (self.estimate_us(site, c), str(c)))

    def _blockings(
        self, site: ConvSite, rows: int, cols: int, count: int
    ) -> Iterator[WinogradConfig]:
        registers = site.target.registers
        for tiles in _divisors(count, 16):
            for block_tiles in _divisors(tiles, 8):
                for out_block in (2, 3, 4, 6, 8, 12, 16, 24):
                    used = block_tiles * out_block + block_tiles + 1
                    if out_block <= site.workload.out_channels and used <= registers:
                        yield WinogradConfig(rows, cols, tiles, out_block, block_tiles)

    def fits(self, site: ConvSite, config: WinogradConfig) -> bool:
        """Whether the layouts have whole tiles and the block divides them."""
        return _loops(site, config) is not None

    def estimate_us(self, site: ConvSite, config: WinogradConfig) -> float:
        """Multiply-adds, transforms and the reading of the transformed weight."""
        w, grid = site.workload, site.views.y.layout.grid
        frequencies, inputs = _frequencies(w, config), _inputs(w)
        tiles = w.batch * -(-grid.rows // config.rows) * -(-grid.cols // config.cols)
        fmas = config.block_tiles * config.out_block
        core = core_of(site.target)
        loads = (config.block_tiles + config.out_block) * core.dense_load
        step = max(fmas * core.dense_fma, loads * _LOAD, core.latency) + core.exposed * loads
        products = frequencies * tiles * inputs * w.out_channels / fmas * step
        transforms = core.transform * frequencies * tiles * (inputs + w.out_channels)
        weights = frequencies * inputs * w.out_channels * 4
        rounds = tiles / config.tiles
        near = 0.5 * site.target.l2_bytes
        reads = weights * rounds / (_MOVED_SHARE * core.far_bytes) if weights > near else 0.0
        work = frequencies * config.tiles * site.target.lanes * 4 * (inputs + w.out_channels)
        spill = 1.3 if work > site.target.l2_bytes else 1.0
        return (max(products, reads) + transforms * spill) / core.cycles_per_us

    def added_error(self, workload: ConvWorkload, config: WinogradConfig) -> float:
        """That of the axis with more products."""
        return max(f.added_error for f in _filters(workload, config))

    def pack(self, site: ConvSite, config: WinogradConfig, weight: FloatArray) -> Packed:
        """U = G g G^T as [frequency][block of O][C and phase][o], computed in float64."""
        loops = _require(site, config)
        rows, cols = (f.weight_transform() for f in loops.filters)
        phases = _phases(site.workload, weight.astype(np.float64))
        u = np.einsum("ik,ockl,jl->ijoc", rows, phases, cols, optimize=True)
        u = u.reshape(loops.frequencies, *phases.shape[:2])
        parts = [
            u[:, first : first + count * size]
            .reshape(loops.frequencies, count, size, -1)
            .transpose(0, 1, 3, 2)
            .reshape(loops.frequencies, -1)
            for first, count, size in loops.segments()
        ]
        return (np.concatenate(parts, axis=1).ravel().astype(np.float32),)

    def prim_func(self, site: ConvSite, config: WinogradConfig, name: str) -> Any:
        """f(x, u, bias[, residual], y)."""
        loops = _require(site, config)
        w, views = site.workload, site.views
        with emit.prim_func(name) as builder:
            x = emit.argument("x", w.batch * views.x.layout.size)
            weight = emit.argument("u", loops.frequencies * w.out_channels * loops.inputs)
            bias = emit.argument("bias", w.out_channels)
            residual = None
            if views.residual is not None:
                residual = emit.argument("residual", w.batch * views.residual.layout.size)
            y = emit.argument("y", w.batch * views.y.layout.size)
            loops.emit(x, weight, bias, residual, y)
            emit.write_halo(y, views.y, w.batch, site.threads)
        return builder.get()


def _by(pair: Sequence[int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _computable(workload: ConvWorkload, rows: int, cols: int) -> bool:
    """Whether these tiles take few enough products, and share some along every axis."""
    filters = [MinimalFilter(m, r) for m, r in zip((rows, cols), _taps(workload), strict=True)]
    return all(f.products <= MOST_PRODUCTS and (f.outputs == 1 or f.taps > 1) for f in filters)


def _phases(workload: ConvWorkload, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weight [O, C, kh, kw] as [O, C * phases, taps, taps], with zeros where one has fewer."""
    (kh, kw), (sy, sx) = workload.kernel, workload.strides
    padded = np.pad(weight, ((0, 0), (0, 0), (0, -kh % sy), (0, -kw % sx)))
    o, c, height, width = padded.shape
    split = padded.reshape(o, c, height // sy, sy, width // sx, sx)
    return split.transpose(0, 1, 3, 5, 2, 4).reshape(o, c * sy * sx, height // sy, width // sx)


def _loops(site: ConvSite, config: WinogradConfig) -> _Winograd | None:
    views = site.views
    if refuses_views(site.workload, views) is not None:
        return None
    loops = _Winograd(
        site.workload,
        views.x,
        views.y,
        views.residual,
        views.in_place,
        site.threads,
        core_of(site.target),
        config,
    )
    grid = views.y.layout.grid
    if config.rows > grid.rows or config.cols > grid.cols:
        return None
    if not _computable(site.workload, config.rows, config.cols):
        return None
    if loops.tile_count % config.tiles or config.tiles % config.block_tiles:
        return None
    return loops


def _require(site: ConvSite, config: WinogradConfig) -> _Winograd:
    loops = _loops(site, config)
    if loops is None:
        x, y = site.views.x.layout, site.views.y.layout
        raise ValueError(f"{config} does not fit {x} -> {y}")
    return loops
