"""The dynamic convolution as it takes part in the contest."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.cpu import direct, dynamic
from topiarist.schedules.cpu.core import core_of
from topiarist.schedules.cpu.dynamic import DynamicConfig, Loops, Terms
from topiarist.schedules.cpu.space import tiles
from topiarist.schedules.kernel import ConvKernel, ConvSite, Packed
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.spec import TargetSpec

OUT_BLOCKS = (1, 2, 4, 8, 16)  # they divide vectors
IN_BLOCKS = (32, 64, 128, 256)  # about so many input channels
SPARE_REGISTERS = 4  # beside the sums
EXPOSED = 0.1  # cycles of a load that multiply-adds don't hide
ALIKE = 2  # configurations of one tile and form that are tried first


class DynamicDirect(ConvKernel[DynamicConfig]):
    """Direct convolution over the positions that experts have."""

    name = "dynamic_conv"
    sparse = True
    mixes = True
    tries = 9

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves mixtures whose experts have whole positions of the window."""
        if workload.mixture is None:
            return "its weights are constants"
        if workload.scattered:
            return "zeros are scattered over the experts"
        return None

    def knobs(self, site: ConvSite) -> list[DynamicConfig]:
        """Both forms, tiles of vectors by output channels, blocks of input channels."""
        w, grid = site.workload, site.views.y.layout.grid
        terms = Terms.of(dynamic.mixture_of(w))
        forms = [(False, False)]  # shared, tiles outside
        if 4 * w.in_channels * w.out_channels * len(terms.positions) <= site.target.l2_bytes / 2:
            forms.insert(0, (False, True))  # measured: 1.1x in ResNet-34
        if terms.count:
            forms.append((True, False))
        in_blocks = {_divisor(w.in_channels, near) for near in IN_BLOCKS}
        found = [
            DynamicConfig(*tile, out_block, in_block, *form)
            for out_block in OUT_BLOCKS
            if out_block <= grid.lanes and w.out_channels % out_block == 0
            for tile in tiles(grid, (site.target.registers - SPARE_REGISTERS) // out_block)
            for in_block in in_blocks
            for form in forms
        ]
        # The estimate can't compare forms: the best of each take turns.
        ranked = sorted(found, key=lambda config: self.estimate_us(site, config))
        in_turns = itertools.zip_longest(*(_varied(ranked, *form) for form in forms))
        return [config for turn in in_turns for config in turn if config is not None]

    def fits(self, site: ConvSite, config: DynamicConfig) -> bool:
        """Whether the configuration works between these layouts."""
        if direct.refuses_views(site.workload, site.views) is not None:
            return False
        return Loops.of(site, config) is not None

    def estimate_us(self, site: ConvSite, config: DynamicConfig) -> float:
        """Multiply-adds or loads, sums that are read and written again, mixing, bytes."""
        w, grid, core = site.workload, site.views.y.layout.grid, core_of(site.target)
        terms, vectors = Terms.of(dynamic.mixture_of(w)), config.rows * config.cols
        fmas, loads = vectors * config.out_block, vectors + config.out_block
        step = max(fmas * core.dense_fma, loads * core.dense_load, core.latency) + EXPOSED * loads
        in_blocks = w.in_channels // config.in_block
        visits = w.batch * grid.rows * grid.cols // vectors * (w.out_channels // config.out_block)
        weights = w.in_channels * w.out_channels * terms.count
        far = 4 * weights / core.far_bytes
        if config.shared:
            used = len(terms.by_expert())
            cycles = visits * (w.in_channels * terms.count * step + in_blocks * used * 2 * fmas)
            return (cycles + far) / core.cycles_per_us
        cycles = visits * (w.in_channels * len(terms.positions) * step + in_blocks * 1.5 * fmas)
        mixing = w.batch * (2 * weights / grid.lanes + far)
        return (cycles + mixing) / core.cycles_per_us

    def pack(self, site: ConvSite, config: DynamicConfig, weight: NDArray[np.float32]) -> Packed:
        """The experts in panels, and shares."""
        _loops(site, config)
        return dynamic.pack(site, config, weight)

    def prim_func(self, site: ConvSite, config: DynamicConfig, name: str) -> Any:
        """The loops of either form."""
        return _loops(site, config).prim_func(name)


def _loops(site: ConvSite, config: DynamicConfig) -> Loops:
    loops = Loops.of(site, config)
    if loops is None:
        x, y = site.views.x.layout, site.views.y.layout
        raise ValueError(f"{config} does not fit {x} -> {y}")
    return loops


def _varied(ranked: list[DynamicConfig], shared: bool, tiles_outside: bool) -> list[DynamicConfig]:
    """Those of a form, but of one tile at most `ALIKE` among the first."""
    seen: Counter[DynamicConfig] = Counter()
    early: list[DynamicConfig] = []
    late: list[DynamicConfig] = []
    for config in ranked:
        if (config.shared, config.tiles_outside) == (shared, tiles_outside):
            tile = replace(config, in_block=0)
            (early if seen[tile] < ALIKE else late).append(config)
            seen[tile] += 1
    return early + late


def _divisor(size: int, near: int) -> int:
    """The largest divisor of `size` that is at most `near`."""
    return max(d for d in range(1, min(size, near) + 1) if size % d == 0)
