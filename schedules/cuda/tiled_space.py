"""The knobs of the tiled dense convolution, ranked by a cost estimate that no device has seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from topiarist.schedules.cuda.space import BARRIER_CYCLES, SCHEDULERS, LayerTime
from topiarist.schedules.cuda.thread import QUAD
from topiarist.schedules.cuda.tiled import TiledConfig, Tiles, refuses_place
from topiarist.schedules.kernel import ConvSite
from topiarist.targets.cuda import WARP

SUMS = ((4, 4), (8, 4), (4, 8), (8, 8))  # channels and pixels of a thread
ROWS = (4, 8, 16)
COLS = (8, 16, 32)
TAPS = (8, 16)
SPLITS = (1, 2, 4)
OTHER_REGISTERS = 40
STEP_CYCLES = 30  # until the first load from shared memory arrives
STEP_INSTRUCTIONS = 20  # addresses, the loop
LINE = 8  # loads of four values that a cycle of shared memory serves


@dataclass(frozen=True)
class Estimator(LayerTime):
    """Microseconds of a layer by counting."""

    def us(self, config: TiledConfig) -> float:
        """The larger of what the multiprocessors and the memory need, and the launch."""
        w = self.site.workload
        taps = w.in_channels // w.groups * math.prod(w.kernel)
        return self.larger_us(self._cycles(config), 4.0 * w.out_channels * taps)

    def _cycles(self, config: TiledConfig) -> float:
        """Of the busiest multiprocessor."""
        w, c, gpu = self.site.workload, config, self.gpu
        k = Tiles(w, c, self.site.views)
        blocks = math.ceil(k.rows * k.cols * w.groups / gpu.multiprocessors)
        warps = blocks * c.split * c.threads / WARP
        registers = min(c.sums + c.channels + c.pixels + OTHER_REGISTERS, 255)
        fitting = min(gpu.threads / WARP, gpu.registers / (WARP * registers))
        fitting = min(fitting, gpu.shared_bytes / c.shared_bytes * c.split * c.threads / WARP)
        resident = max(1.0, min(warps, fitting))
        copied = c.taps * (c.tile_channels / QUAD + c.tile_pixels) / c.threads
        quads = (c.channels + c.pixels) / QUAD
        step = c.taps * (c.sums + quads) + 3 * copied + STEP_INSTRUCTIONS
        lanes = min(WARP, c.cols)
        lines = c.taps * (c.channels + c.pixels * math.ceil(lanes / LINE)) / QUAD + 2 * copied
        issue = step * WARP / min(gpu.fp32_lanes, WARP * SCHEDULERS)
        alone = (2 * BARRIER_CYCLES + STEP_CYCLES + step) / resident
        ends = warps * (math.log2(2 * c.split) + 2) * c.sums
        return k.steps * warps * max(issue, lines, alone) + ends


def configs(site: ConvSite) -> list[TiledConfig]:
    """Configurations that fit the layer's place, best estimate first."""
    estimate = Estimator(site)
    found = [c for c in _all() if refuses_place(site.workload, c, site.views) is None]
    return sorted(found, key=estimate.us)


def _all() -> Iterator[TiledConfig]:
    for sums, rows, cols, taps, split in itertools.product(SUMS, ROWS, COLS, TAPS, SPLITS):
        yield TiledConfig(*sums, rows, cols, taps, split)
