"""The knobs of the convolution whose code holds the weights, ranked by a cost estimate.

Every warp runs its code once, from top to bottom. So besides multiply-adds and loads it counts how
the code itself gets to a multiprocessor. None of it was fitted to a device yet: it ranks.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from topiarist.schedules.cuda.compiled import AHEAD, MOST_CODE, code_of, refuses_config
from topiarist.schedules.cuda.space import MOST_SUMS, SCHEDULERS, SPLITS, THREADS, LayerTime
from topiarist.schedules.cuda.thread import CudaConfig
from topiarist.schedules.kernel import ConvSite
from topiarist.targets.cuda import WARP

PIXELS = (1, 2, 4, 7)
BLOCKS_OF_CHANNELS = 6  # sizes to try, the largest that divide
OTHER_REGISTERS = AHEAD + 16  # inputs on their way, addresses
INSTRUCTION_BYTES = 16
FETCH_BYTES = 32  # of new code that a multiprocessor gets in a cycle; an assumption
LOAD_CYCLES = 200  # until a load from the second-level cache arrives
MISALIGNED = 1.5  # lines of 128 bytes that a warp's row of pixels touches, where taps shift it


@dataclass(frozen=True)
class Estimator(LayerTime):
    """Microseconds of a layer by counting."""

    def us(self, config: CudaConfig) -> float:
        """The larger of what the multiprocessors and the memory need, and the launch."""
        return self.larger_us(self._cycles(config), weight_bytes=0)

    def loads(self, config: CudaConfig) -> float:
        """Input values that a thread of all columns loads, for all blocks of channels together."""
        w, density = self.site.workload, self.site.workload.sparsity.density
        taps = range(w.kernel[0])
        pixels = range(config.pixels)
        rows = Counter(y * w.dilation[0] + v * w.strides[0] for y in taps for v in pixels)
        of_column = sum(1 - (1 - density) ** (config.channels * uses) for uses in rows.values())
        columns = w.in_channels // w.groups * w.kernel[1]
        return of_column * columns * w.out_channels / config.channels

    def _cycles(self, config: CudaConfig) -> float:
        """Of the busiest multiprocessor."""
        w, c, gpu = self.site.workload, config, self.gpu
        rows = w.out_channels // c.channels
        tiles = math.ceil(w.batch * w.out_height * w.out_width / c.pixels / c.threads)
        blocks = math.ceil(tiles * rows / gpu.multiprocessors)
        warps = blocks * c.block_threads / WARP
        sums, loads = code_of(w, c.pixels) / rows / c.split, self.loads(c) / rows / c.split
        registers = min(c.sums + OTHER_REGISTERS, 255)
        resident = min(warps, gpu.threads / WARP, gpu.registers / (WARP * registers))
        issue = warps * (sums + loads) * WARP / min(gpu.fp32_lanes, WARP * SCHEDULERS)
        lines = warps * loads * (1.0 if w.pointwise else MISALIGNED)
        waiting = warps / resident * (1 + loads / AHEAD) * LOAD_CYCLES
        new = min(rows, blocks) * c.split * (sums + loads) * INSTRUCTION_BYTES / FETCH_BYTES
        ends = warps * (math.log2(2 * c.split) + 2) * c.sums
        return max(issue, lines, waiting, new) + ends


def configs(site: ConvSite) -> list[CudaConfig]:
    """Configurations that fit the layer's place, best estimate first."""
    estimate = Estimator(site)
    found = [c for c in _all(site) if refuses_config(site.workload, c, site.views) is None]
    return sorted(found, key=estimate.us)


def _all(site: ConvSite) -> Iterator[CudaConfig]:
    w = site.workload
    outputs = w.out_channels // w.groups
    sizes = [size for size in range(1, MOST_SUMS + 1) if outputs % size == 0]
    for channels, pixels, threads, split in itertools.product(
        sizes[-BLOCKS_OF_CHANNELS:], PIXELS, THREADS, SPLITS
    ):
        if channels * pixels <= MOST_SUMS and code_of(w, pixels) <= MOST_CODE:
            yield CudaConfig(channels, pixels, threads, split)
