"""Park et al.'s own kernel (ICLR 2017, section 2.1), to compare ours with it.

It fits row-major planes, which no network has here on processors, so it takes part in no contest.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.cpu.core import core_of
from topiarist.schedules.cpu.park_loops import Loops, ParkConfig, row_vectors
from topiarist.schedules.kernel import ConvKernel, ConvSite, ConvViews, Packed
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.spec import TargetSpec

NONZEROS_PER_VISIT = 32  # what column blocks aim at, of one output channel
LEAST_IN_BLOCK = 8
SPARE_REGISTERS = 2  # beside a tile: a weight and an input vector


def column_block(nonzeros: int, outputs: int, channels: int) -> int:
    """Input channels of a column block, of a matrix of `outputs` rows."""
    per_channel = nonzeros / (outputs * channels)
    wanted = NONZEROS_PER_VISIT / per_channel if per_channel else channels
    block = max(LEAST_IN_BLOCK, 2 ** round(math.log2(max(1.0, wanted))))
    return next(b for b in range(min(channels, block), channels + 1) if channels % b == 0)


def refuses_views(views: ConvViews) -> str | None:
    """Why the kernel can't run between these layouts, None where it can."""
    for layout in (views.x.layout, views.y.layout):
        if layout.grid.lanes != 1 or layout.tile is not None:
            return f"{layout} is no plane of rows"
    if any(views.y.layout.halo):
        return f"halo {views.y.layout.halo} of the output, writes none"
    return None


class ParkSparse(ConvKernel[ParkConfig]):
    """Direct sparse convolution as its authors wrote it, between row-major planes."""

    name = "park_sparse"
    sparse = True
    tries = 1

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves stride 1, the same padding on all sides, and rows that fit in the registers."""
        w = workload
        if w.strides != (1, 1) or w.dilation != (1, 1):
            return f"strides {w.strides}, dilation {w.dilation}, not 1"
        if len(set(w.padding)) > 1:
            return f"padding {w.padding} differs between sides"
        if w.residual:
            return "adds no residual"
        if row_vectors(w, target.lanes) > target.registers - SPARE_REGISTERS:
            return f"a row of {w.out_width} outputs does not fit in {target.registers} registers"
        return None

    def knobs(self, site: ConvSite) -> list[ParkConfig]:
        """The one configuration that the authors' rules give."""
        w, target = site.workload, site.target
        registers = target.registers - SPARE_REGISTERS
        rows = min(w.out_height, registers // row_vectors(w, target.lanes))
        outputs, channels = w.out_channels // w.groups, w.in_channels // w.groups
        nonzeros = round(w.sparsity.density * outputs * channels * math.prod(w.kernel))
        return [ParkConfig(rows, column_block(nonzeros, outputs, channels))]

    def fits(self, site: ConvSite, config: ParkConfig) -> bool:
        """Whether the layouts are planes and the blocks divide the channels."""
        channels = site.workload.in_channels // site.workload.groups
        return refuses_views(site.views) is None and channels % config.in_block == 0

    def estimate_us(self, site: ConvSite, config: ParkConfig) -> float:
        """Multiply-adds with their loads, nonzeros and visits."""
        w, core = site.workload, core_of(site.target)
        weights = w.out_channels * w.in_channels // w.groups * math.prod(w.kernel)
        nonzeros = w.batch * w.sparsity.density * weights
        vectors = w.out_height * row_vectors(w, site.target.lanes)
        blocks = w.in_channels // w.groups // config.in_block
        cycles = nonzeros * vectors * core.load
        cycles += nonzeros * -(-w.out_height // config.rows) * core.nonzero
        cycles += w.batch * w.out_channels * blocks * vectors * core.visit
        return cycles / core.cycles_per_us

    def pack(self, site: ConvSite, config: ParkConfig, weight: NDArray[np.float32]) -> Packed:
        """values, stretched indices, starts; rows come by group, column block, output channel."""
        loops = self._loops(site, config)
        stretched = loops.plane.stretched(loops.group_in, site.workload.kernel)
        values, indices, counts = [], [], [np.zeros(1, np.int64)]
        for rows in np.split(weight, site.workload.groups):
            for first in range(0, loops.group_in, config.in_block):
                block = slice(first, first + config.in_block)
                dense = rows[:, block].reshape(loops.group_out, -1)
                row, col = np.nonzero(dense)
                values.append(dense[row, col])
                indices.append(stretched[block].ravel()[col])
                counts.append(np.count_nonzero(dense, axis=1))
        # One value of padding keeps an empty weight's buffers non-empty.
        return (
            np.append(np.concatenate(values), 0).astype(np.float32),
            np.append(np.concatenate(indices), 0).astype(np.int32),
            np.cumsum(np.concatenate(counts)).astype(np.int32),
        )

    def prim_func(self, site: ConvSite, config: ParkConfig, name: str) -> Any:
        """f(x, values, indices, starts, bias, y); the nonzeros are dynamic."""
        return self._loops(site, config).prim_func(name)

    def _loops(self, site: ConvSite, config: ParkConfig) -> Loops:
        if not self.fits(site, config):
            why = refuses_views(site.views) or "blocks do not divide the input channels"
            raise ValueError(f"{config} does not fit: {why}")
        lanes = site.target.lanes
        return Loops(site.workload, config, site.views, lanes, site.threads)
