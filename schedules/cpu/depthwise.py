"""Depthwise convolution: every vector of the input is loaded once per tile, not once per tap.

Loop order: band of tile rows -> channel -> tile. A tile of `rows x cols` output vectors stays in
registers, and so do the channel's weights as far as they fit: a vector of the input is then loaded
once and multiplied into all outputs that it belongs to. Where the weights do not fit, the rows of
the window are a loop, and a vector is loaded once for each.

Bands run from the last to the first: the layer before wrote its last rows last, so they are what
the caches still hold of planes that exceed them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import direct, emit, space
from topiarist.schedules.cpu.core import core_of
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernel import CONSTANT_ONLY, ConvKernel, ConvSite, KernelConfig, Packed
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.spec import TargetSpec

SPARE_REGISTERS = 3  # for vectors of the input on their way


@dataclass(frozen=True)
class DepthwiseConfig(KernelConfig):
    """The knobs: vectors of a tile; whether the window's rows are unrolled, weights and all."""

    rows: int
    cols: int
    unrolled: bool

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}{' unrolled' if self.unrolled else ''}"


class Depthwise(ConvKernel[DepthwiseConfig]):
    """Depthwise convolution with dense weights, any number of outputs for each input channel."""

    name = "depthwise"
    sparse = False

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves one input channel per group, with taps."""
        if workload.mixture is not None:
            return CONSTANT_ONLY
        if workload.groups != workload.in_channels:
            return f"{workload.in_channels} input channels in {workload.groups} groups"
        return "a window of one pixel" if workload.pointwise else None

    def knobs(self, site: ConvSite) -> list[DepthwiseConfig]:
        """Tiles of vectors, with the window unrolled where its weights leave room."""
        kh, kw = site.workload.kernel
        free = site.target.registers - SPARE_REGISTERS
        limits = {False: free - kw, True: free - kh * kw}
        found = [
            DepthwiseConfig(*tile, unrolled)
            for unrolled, limit in limits.items()
            for tile in space.tiles(site.views.y.layout.grid, limit)
        ]
        return sorted(found, key=lambda config: self.estimate_us(site, config))

    def fits(self, site: ConvSite, config: DepthwiseConfig) -> bool:
        """Whether the configuration works between these layouts."""
        return direct.refuses_views(site.workload, site.views) is None and (
            direct.make_kernel(site, _shared(config)) is not None
        )

    def estimate_us(self, site: ConvSite, config: DepthwiseConfig) -> float:
        """Multiply-adds at two a cycle or loads at two a cycle, and the ends of tiles."""
        w, grid = site.workload, site.views.y.layout.grid
        vectors = config.rows * config.cols
        spans = _spans(w, config)
        taps = w.kernel[0] * w.kernel[1]
        repeats = 1 if config.unrolled else w.kernel[0] / w.strides[0]
        loads = spans[0] * spans[1] * repeats
        core = core_of(site.target)
        read = loads * core.dense_load
        # The latency needs many accumulators in flight.
        busy = max(vectors * taps * core.dense_fma, read, taps * core.latency)
        tiles = w.batch * w.out_channels * grid.rows * grid.cols / vectors
        return tiles * (busy + read / 2 + vectors + 8) / core.cycles_per_us

    def pack(self, site: ConvSite, config: DepthwiseConfig, weight: NDArray[np.float32]) -> Packed:
        """The weight, channel by channel."""
        _loops(site, config)
        return (np.ascontiguousarray(weight, np.float32).ravel(),)

    def prim_func(self, site: ConvSite, config: DepthwiseConfig, name: str) -> Any:
        """f(x, weights, bias[, residual], y)."""
        k = _loops(site, config)
        w, views = k.workload, k.views
        with emit.prim_func(name) as builder:
            x = emit.argument("x", w.batch * views.x.layout.size)
            weights = emit.argument("weights", w.out_channels * w.kernel[0] * w.kernel[1])
            bias = emit.argument("bias", w.out_channels)
            residual = None
            if views.residual is not None:
                residual = emit.argument("residual", w.batch * views.residual.layout.size)
            y = emit.argument("y", w.batch * views.y.layout.size)
            _Bands(k, config, direct._Operands(x, bias, residual, y), weights).emit()
            emit.write_halo(y, views.y, w.batch, k.threads)
        return builder.get()


def _shared(config: DepthwiseConfig) -> DirectConfig:
    """The configuration as far as addresses depend on it."""
    return DirectConfig(config.rows, config.cols, 1, 1)


def _loops(site: ConvSite, config: DepthwiseConfig) -> direct._Kernel:
    kernel = direct.make_kernel(site, _shared(config))
    if kernel is None:
        raise ValueError(f"{config} does not fit {site.views.x.layout} -> {site.views.y.layout}")
    return kernel


def _spans(workload: ConvWorkload, config: DepthwiseConfig) -> tuple[int, int]:
    """Rows and columns of input vectors that a tile reads."""
    w = workload
    sizes = zip((config.rows, config.cols), w.strides, w.kernel, w.dilation, strict=True)
    rows, cols = ((tile - 1) * s + (k - 1) * d + 1 for tile, s, k, d in sizes)
    return rows, cols


@dataclass(frozen=True)
class _Bands:
    """The loops; a task is one output channel of one band of tiles."""

    k: direct._Kernel
    config: DepthwiseConfig
    ops: direct._Operands
    weights: Any

    def emit(self) -> None:
        """All loops."""
        w, (bands, cols) = self.k.workload, self.k.geometry.tiles
        with emit.loop(w.batch * bands * w.out_channels, self.k.threads) as task:
            image = task // (bands * w.out_channels)
            band = (bands - 1) - task // w.out_channels % bands
            channel = task % w.out_channels
            taps = w.kernel[0] * w.kernel[1]
            kept = self._weights(channel * taps, taps) if self.config.unrolled else []
            with T.serial(0, cols) as col:
                self._tile(direct._Where(image, band, col), channel, kept)

    def _weights(self, first: Any, count: int) -> list[Any]:
        lanes, by_lane = self.k.lanes, self.k.core.lane_fma
        return [T.bind(w) for w in emit.splats(self.weights, first, count, lanes, by_lane)]

    def _tile(self, where: direct._Where, channel: Any, kept: list[Any]) -> None:
        k, (kh, kw) = self.k, self.k.workload.kernel
        at = k.y_at(where.image, where.ty, where.tx) + channel * k.views.y.layout.channel_stride
        source = channel // k.group_out * k.views.x.layout.channel_stride
        source = source + k.x_at(where.image, where.ty, where.tx)
        if self.config.unrolled:
            start = k.initial(self.ops, at, where, channel)
            sums = self._accumulate(start, source, kept, kh)
            for step, value in zip(k.steps(k.geometry.y), sums, strict=True):
                done = emit.clamp(value, k.workload.activation, k.lanes)
                T.buffer_store(self.ops.y, done, [self._ramp(at + step)])
            return
        totals = k.load(self.ops, at, where, channel, first=True)
        with T.serial(0, kh) as ky:
            row = self._weights((channel * kh + ky) * kw, kw)
            step = k.workload.dilation[0] * k.views.x.layout.row_vectors * k.lanes
            before = [emit.value_of(total) for total in totals]
            after = self._accumulate(before, source + ky * step, row, 1)
            for total, value in zip(totals, after, strict=True):
                emit.assign(total, value)
        k.store(self.ops.y, at, totals, last=True)

    def _ramp(self, at: Any) -> Any:
        return emit.ramp(at, self.k.lanes)

    def _accumulate(self, start: list[Any], source: Any, weights: list[Any], kh: int) -> list[Any]:
        """The tile's sums plus `kh` rows of the window; every input vector is loaded once."""
        sums = list(start)
        row = self.k.views.x.layout.row_vectors * self.k.lanes
        for (iy, ix), uses in self._uses(kh):
            read = T.bind(self.ops.x[self._ramp(source + iy * row + ix * self.k.lanes)])
            for output, tap in uses:
                sums[output] = T.bind(sums[output] + weights[tap] * read)
        return sums

    def _uses(self, kh: int) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
        """Input vectors (row, col) of a tile in order, each with its (output, tap) pairs."""
        w, config = self.k.workload, self.config
        uses: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for ky, kx, r, v in np.ndindex(kh, w.kernel[1], config.rows, config.cols):
            at = r * w.strides[0] + ky * w.dilation[0], v * w.strides[1] + kx * w.dilation[1]
            uses.setdefault(at, []).append((r * config.cols + v, ky * w.kernel[1] + kx))
        yield from sorted(uses.items())
