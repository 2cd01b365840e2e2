"""The knobs of the direct convolution on GPUs, ranked by a cost estimate.

The estimate counts instructions, wavefronts of loads and bytes. None of it was fitted to a device
yet: it ranks, and what it says in microseconds is no forecast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from topiarist.schedules.cuda.thread import QUAD, CudaConfig, refuses_place
from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.workload import BLOCKS, ConvWorkload
from topiarist.targets.cuda import WARP
from topiarist.targets.gpu import Gpu

CHANNELS = (1, 2, 4, 8, 16)
PIXELS = (1, 2, 4, 7, 8)
THREADS = (32, 64, 128, 256)
SPLITS = (1, 2, 4, 8, 16)
CHUNKS = (0, 16)
MOST_SUMS = 128  # accumulators: with inputs, weights and addresses they fill the registers
OTHER_REGISTERS = 32
SCHEDULERS = 4  # of a multiprocessor, each starts an instruction of a warp in a cycle
LOAD_CYCLES = 30  # until a load from the first-level cache arrives
LOADS_IN_FLIGHT = 4  # columns whose loads the compiler overlaps
LAUNCH_US = 2.0
BARRIER_CYCLES = 30


@dataclass(frozen=True)
class LayerTime:
    """What makes a time of counts: a layer in its place, on a target with a GPU."""

    site: ConvSite

    @property
    def gpu(self) -> Gpu:
        """The target's."""
        assert self.site.target.gpu is not None
        return self.site.target.gpu

    def larger_us(self, cycles: float, weight_bytes: float) -> float:
        """What the busiest multiprocessor or the memory needs, and the launch.

        Values and weights move once, at the memory's bandwidth.
        """
        views = self.site.views
        values = self.site.workload.batch * (views.x.layout.size + views.y.layout.size)
        memory = (4 * values + weight_bytes) / self.gpu.bandwidth_gbs
        return LAUNCH_US + max(cycles / self.gpu.clock_ghz, memory) / 1e3


@dataclass(frozen=True)
class Estimator(LayerTime):
    """Microseconds of a layer by counting."""

    sparse: bool

    @property
    def _workload(self) -> ConvWorkload:
        return self.site.workload

    @property
    def _taps(self) -> int:
        w = self._workload
        return w.in_channels // w.groups * math.prod(w.kernel)

    def columns(self, channels: int) -> float:
        """Columns of a row of so many output channels: the union of their nonzeros."""
        if not self.sparse:
            return self._taps
        sparsity = self._workload.sparsity
        parts = max(1, channels // BLOCKS.get(sparsity.pattern, 1))
        return float(self._taps * (1 - (1 - sparsity.density) ** parts))

    def us(self, config: CudaConfig) -> float:
        """The larger of what the multiprocessors and the memory need, and the launch."""
        weights = self.columns(config.channels) * (1 + 1 / config.channels)
        return self.larger_us(self._cycles(config), 4 * weights * self._workload.out_channels)

    def _cycles(self, config: CudaConfig) -> float:
        """Of the busiest multiprocessor."""
        w, c = self._workload, config
        places = w.batch * w.out_height * w.out_width / c.pixels
        blocks = math.ceil(places / c.threads) * (w.out_channels // c.channels)
        warps = math.ceil(blocks / self.gpu.multiprocessors) * math.ceil(c.block_threads / WARP)
        columns = self.columns(c.channels) / c.split
        loads, wavefronts = self._loads(c)
        issue = (loads + c.sums + 3) / SCHEDULERS
        registers = c.sums + c.pixels + c.channels + OTHER_REGISTERS
        resident = min(
            warps, self.gpu.threads / WARP, self.gpu.registers / (WARP * min(registers, 255))
        )
        waiting = LOAD_CYCLES / LOADS_IN_FLIGHT * warps / max(1.0, resident)
        column = max(warps * issue, warps * wavefronts, waiting)
        ends = math.log2(2 * c.split) * c.sums + 2 * c.sums
        chunks = columns / c.chunk if c.chunk else 0.0
        return columns * column + warps * ends + chunks * BARRIER_CYCLES * warps / resident

    def _loads(self, config: CudaConfig) -> tuple[float, float]:
        """Load instructions of a warp for a column, and the 128 bytes that they move."""
        c = config
        inputs = c.pixels / QUAD if c.quads else c.pixels
        weights = c.channels / math.gcd(c.channels, QUAD)
        staging = (1 + c.channels) / c.chunk if c.chunk else 0.0
        return inputs + weights + 1 + staging, c.pixels + weights + 1


def configs(site: ConvSite, *, sparse: bool) -> list[CudaConfig]:
    """Configurations that fit the layer's place, best estimate first."""
    estimate = Estimator(site, sparse)
    found = [c for c in _all() if refuses_place(site.workload, c, site.views) is None]
    return sorted(found, key=estimate.us)


def _all() -> Iterator[CudaConfig]:
    for channels, pixels, threads, split, chunk in itertools.product(
        CHANNELS, PIXELS, THREADS, SPLITS, CHUNKS
    ):
        if channels * pixels > MOST_SUMS:
            continue
        yield CudaConfig(channels, pixels, threads, split, chunk)
        if pixels == QUAD:
            yield CudaConfig(channels, pixels, threads, split, chunk, quads=True)
