"""The knobs of the direct convolution kernels, ranked by a cost estimate.

The estimate only orders candidates; the ones that matter are measured.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from topiarist.schedules.cpu.core import Core, core_of
from topiarist.schedules.cpu.direct import MAX_OFFSET, DirectConfig
from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.layout import Grid, LaneLayout
from topiarist.schedules.workload import BLOCKS, ConvWorkload
from topiarist.targets.spec import TargetSpec

FAR_FROM_L1 = 1.75  # times its size: where half of that shows
DENSE_MISS_CYCLES = 0.3  # per vector read in order: the prefetcher hides most of it
SMALLEST_TILE = 2
DENSE_SHARES = (0.5, 1, 6)  # of the first-level cache, which a block of input channels may fill
SPARSE_SHARES = (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 4, 6)


def tiles(grid: Grid, limit: int) -> list[tuple[int, int]]:
    """(rows, cols) of vectors that divide the grid, at most `limit` vectors, large ones first."""
    found = [
        (r, v)
        for r, v in itertools.product(range(1, grid.rows + 1), range(1, grid.cols + 1))
        if r * v <= limit and grid.rows % r == 0 and grid.cols % v == 0
    ]
    return sorted(found, key=lambda t: (-t[0] * t[1], -t[1]))


@dataclass(frozen=True)
class Estimator:
    """Cycles of a direct convolution on one core, from counts of instructions and footprints."""

    workload: ConvWorkload
    target: TargetSpec
    x: LaneLayout
    y: LaneLayout

    @staticmethod
    def of(site: ConvSite) -> Estimator:
        """The estimator of a layer in its place."""
        return Estimator(site.workload, site.target, site.views.x.layout, site.views.y.layout)

    @cached_property
    def core(self) -> Core:
        """The target's core."""
        return core_of(self.target)

    def tile_bytes(self, tile: tuple[int, int]) -> int:
        """Bytes of one input channel that a tile reads."""
        lanes = self.y.grid.lanes
        w = self.workload
        spans = [
            (t - 1) * s + (k - 1) * d + 1
            for t, s, k, d in zip(tile, w.strides, w.kernel, w.dilation, strict=True)
        ]
        if self.x.tile is not None:
            spans = [max(a, b) for a, b in zip(spans, self.x.tile, strict=True)]
        return spans[0] * spans[1] * lanes * 4

    def in_blocks(
        self, tile: tuple[int, int], shares: tuple[float, ...], limit: int | None = None
    ) -> list[int]:
        """Blocks of input channels, at most `limit`, whose reads fill a part of the caches."""
        channels = self.workload.in_channels // self.workload.groups
        most = channels if limit is None else min(channels, limit)
        per_channel = self.tile_bytes(tile)
        found = {most} if most else set()
        for share in shares:
            block = max(8, int(share * self.target.l1d_bytes) // per_channel)
            parts = max(1, round(channels / block))
            found.add(-(-channels // parts))
        return sorted(block for block in found if block <= most)

    @property
    def addressable_channels(self) -> int:
        """Input channels of a block whose offsets fit 16 bits."""
        return MAX_OFFSET // (self.x.channel_stride // self.x.grid.lanes)

    def miss_factor(self, footprint: int) -> float:
        """How much slower reads are when they come from further away."""
        if footprint <= 0.75 * self.target.l1d_bytes:
            return 1.0
        return 1.5 if footprint <= 0.5 * self.target.l2_bytes else 2.5

    def sparse_cycles(self, config: DirectConfig) -> float:
        """The CSR form."""
        w, core = self.workload, self.core
        tile = (config.rows, config.cols)
        vectors = config.rows * config.cols
        grid = self.y.grid
        tiles_all = w.batch * grid.rows * grid.cols / vectors
        in_blocks = math.ceil(w.in_channels / w.groups / config.in_block)
        rows = w.out_channels / config.out_block
        taps = w.in_channels // w.groups * w.kernel[0] * w.kernel[1]
        # A block of channels works on the union of their nonzeros.
        alike = BLOCKS.get(w.sparsity.pattern, 1)
        union = 1 - (1 - w.sparsity.density) ** max(1, config.out_block // alike)
        nonzeros = rows * taps * union
        near = self.target.l1d_bytes * FAR_FROM_L1
        share = (config.in_block * self.tile_bytes(tile) / near) ** 3
        load = vectors * (core.load + core.l2_load * share / (1 + share))
        fma = vectors * config.out_block * core.fma
        if config.out_block > 1:
            # Its inputs are in registers too, beside a weight; what does not fit, spills.
            fma += max(0, vectors * (config.out_block + 1) + 1 - self.target.registers)
        visit = core.visit * vectors * config.out_block + core.turn
        work = tiles_all * (nonzeros * (core.nonzero + max(load, fma)) + rows * in_blocks * visit)
        return work + nonzeros * config.out_block * core.nonzero_bytes / core.far_bytes

    def dense_cycles(self, config: DirectConfig) -> float:
        """The dense form."""
        w, core = self.workload, self.core
        vectors = config.rows * config.cols
        grid = self.y.grid
        tiles_all = w.batch * grid.rows * grid.cols / vectors
        blocks = w.out_channels / config.out_block
        taps = w.in_channels // w.groups * w.kernel[0] * w.kernel[1]
        fmas = vectors * config.out_block
        weights = config.out_block
        if core.lane_fma:
            weights = sum(divmod(weights, self.target.lanes))
        # The latency needs many accumulators in flight.
        loads = (vectors + weights) * core.dense_load
        cycles = max(fmas * core.dense_fma, loads, core.latency) + core.exposed * loads
        x_bytes = config.in_block * self.tile_bytes((config.rows, config.cols))
        if config.weights_outside:
            x_bytes = config.in_block * self.x.channel_stride * 4
        cycles += DENSE_MISS_CYCLES * vectors * (self.miss_factor(x_bytes) - 1)
        in_blocks = math.ceil(w.in_channels / w.groups / config.in_block)
        work = tiles_all * blocks * (taps * cycles + in_blocks * 1.5 * fmas)
        return work + self._weight_cycles(1 if config.weights_outside else tiles_all)

    def fits_registers(self, config: DirectConfig) -> bool:
        """Whether the dense form does without spills.

        LLVM unrolls the taps of a row and keeps what they share of the input; where it has to load
        an input before it multiplies, that takes registers.
        """
        if not self.core.lane_fma:
            return True
        w = self.workload
        span = (config.cols - 1) * w.strides[1] + (w.kernel[1] - 1) * w.dilation[1] + 1
        weights = sum(divmod(config.out_block, self.target.lanes))
        sums = config.rows * config.cols * config.out_block
        return sums + config.rows * span + weights <= self.target.registers

    def _weight_cycles(self, times: float) -> float:
        """Reading the dense weights in order so many times, beyond what the prefetcher hides."""
        w = self.workload
        size = w.out_channels * w.in_channels // w.groups * w.kernel[0] * w.kernel[1] * 4
        if size <= 0.5 * self.target.l2_bytes:
            return 0.0
        return times * size / self.core.far_bytes


def sparse_configs(estimate: Estimator) -> list[DirectConfig]:
    """Configurations of the sparse kernel with one output channel, best estimate first."""
    limit = estimate.target.registers - estimate.core.operands
    found = [
        DirectConfig(*tile, 1, block)
        for tile in tiles(estimate.y.grid, limit)
        if tile[0] * tile[1] >= min(SMALLEST_TILE, estimate.y.grid.rows * estimate.y.grid.cols)
        for block in estimate.in_blocks(tile, SPARSE_SHARES, estimate.addressable_channels)
    ]
    return _mixed(sorted(found, key=estimate.sparse_cycles))


def block_configs(estimate: Estimator, block: int) -> list[DirectConfig]:
    """Configurations of the sparse kernel with `block` output channels, best estimate first."""
    limit = (estimate.target.registers - max(4, estimate.core.operands)) // block
    found = [
        DirectConfig(*tile, block, in_block)
        for tile in tiles(estimate.y.grid, limit)
        for in_block in estimate.in_blocks(tile, SPARSE_SHARES, estimate.addressable_channels)
    ]
    return _mixed(sorted(found, key=estimate.sparse_cycles))


def dense_configs(estimate: Estimator) -> list[DirectConfig]:
    """Configurations of the dense kernel, best estimate first."""
    workload = estimate.workload
    group_out = workload.out_channels // workload.groups
    group_in = workload.in_channels // workload.groups
    found = set()
    for out_block in (1, 2, 3, 4, 6, 8, 12):
        if out_block > group_out:
            continue
        limit = max(1, (estimate.target.registers - 4) // out_block)
        for tile in tiles(estimate.y.grid, limit):
            for block in estimate.in_blocks(tile, DENSE_SHARES):
                in_block = _divisor(group_in, block)
                if not estimate.fits_registers(DirectConfig(*tile, out_block, in_block)):
                    continue
                found.add(DirectConfig(*tile, out_block, in_block))
                if workload.groups == 1:
                    found.add(DirectConfig(*tile, out_block, in_block, weights_outside=True))
    ranked = sorted(
        found, key=lambda c: (estimate.dense_cycles(c), c.rows, c.cols, c.weights_outside)
    )
    return _mixed(ranked)


def _mixed(ranked: list[DirectConfig]) -> list[DirectConfig]:
    """At most two blockings of each tile first: tiles differ more than the estimate can tell."""
    seen: Counter[tuple[int, int, int, bool]] = Counter()
    early: list[DirectConfig] = []
    late: list[DirectConfig] = []
    for config in ranked:
        tile = (config.rows, config.cols, config.out_block, config.weights_outside)
        (early if seen[tile] < 2 else late).append(config)
        seen[tile] += 1
    return early + late


def _divisor(size: int, near: int) -> int:
    """The largest divisor of `size` that is at most `near`."""
    return max(d for d in range(1, min(size, near) + 1) if size % d == 0)
