"""The knobs of convolutions on tensor cores, ranked by a cost estimate that no device has seen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from topiarist.schedules.cuda.fragments import CHANNELS, PIXELS, TAPS, words_of
from topiarist.schedules.cuda.space import BARRIER_CYCLES, SCHEDULERS, LayerTime
from topiarist.schedules.cuda.tensor import TensorConfig, refuses_place
from topiarist.schedules.cuda.thread import QUAD
from topiarist.schedules.cuda.tiled import Tiles
from topiarist.schedules.kernel import ConvSite
from topiarist.targets.cuda import WARP

SIZES = ((32, 8), (32, 16), (32, 32), (64, 16), (64, 32), (32, 64), (64, 64))  # of a warp
ROWS = (1, 2, 4)
COLS = (1, 2, 4)
STEPS = (32, 64)  # taps
SPLITS = (1, 2, 4)
OTHER_REGISTERS = 40
STEP_CYCLES = 60  # until the first load from shared memory arrives, and the first product
STEP_INSTRUCTIONS = 30  # addresses, the loop
COPY_INSTRUCTIONS = 1.6  # of a value: its load, half a conversion, parts of offsets and stores


@dataclass(frozen=True)
class Estimator(LayerTime):
    """Microseconds of a layer by counting."""

    sparse: bool

    def us(self, config: TensorConfig) -> float:
        """The larger of what the multiprocessors and the memory need, and the launch."""
        w = self.site.workload
        taps = w.in_channels // w.groups * math.prod(w.kernel)
        return self.larger_us(self._cycles(config), self._weight_bytes(w.out_channels * taps))

    def _weight_bytes(self, weights: float) -> float:
        """In fp16; of the sparse form half of them, and two bits each for their places."""
        return weights * (1.125 if self.sparse else 2.0)

    def _cycles(self, config: TensorConfig) -> float:
        """Of the busiest multiprocessor."""
        w, c, gpu = self.site.workload, config, self.gpu
        k = Tiles(w, c, self.site.views)
        blocks = math.ceil(k.rows * k.cols * w.groups / gpu.multiprocessors)
        warps = blocks * c.split * c.threads / WARP
        registers = min(c.values(self.sparse) + OTHER_REGISTERS, 255)
        fitting = min(gpu.threads / WARP, gpu.registers / (WARP * registers))
        fitting = min(fitting, gpu.shared_bytes / c.shared_bytes * c.split * c.threads / WARP)
        resident = max(1.0, min(warps, fitting))
        matrices = c.channels / CHANNELS * c.pixels / PIXELS * c.taps / TAPS
        products = c.channels * c.pixels * c.taps * (0.5 if self.sparse else 1.0)
        quads = c.taps / TAPS * (c.pixels / PIXELS + c.channels / CHANNELS * self._weight_quads)
        copied = c.taps * c.tile_pixels / c.threads
        step = matrices * (1 if self.sparse else 2) + quads + COPY_INSTRUCTIONS * copied
        issue = (step + STEP_INSTRUCTIONS) / SCHEDULERS
        lines = 4 * quads + 1.5 * copied
        alone = (2 * BARRIER_CYCLES + STEP_CYCLES + step) / resident
        ends = warps * (math.log2(2 * c.split) + 4) * c.sums
        return k.steps * warps * max(products / gpu.half_lanes, issue, lines, alone) + ends

    @property
    def _weight_quads(self) -> float:
        """Loads of 16 channels' and 32 taps' weights."""
        return words_of(self.sparse) / QUAD + (0.5 if self.sparse else 0.0)


def configs(site: ConvSite, *, sparse: bool) -> list[TensorConfig]:
    """Configurations that fit the layer's place, best estimate first."""
    estimate = Estimator(site, sparse)
    w, views = site.workload, site.views
    found = [c for c in _all() if refuses_place(w, c, views, sparse=sparse) is None]
    return sorted(found, key=estimate.us)


def _all() -> Iterator[TensorConfig]:
    for size, rows, cols, taps, split in itertools.product(SIZES, ROWS, COLS, STEPS, SPLITS):
        yield TensorConfig(*size, rows, cols, taps, split)
