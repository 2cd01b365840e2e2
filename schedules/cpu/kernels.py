"""The direct convolution kernels as they take part in the contest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.cpu import direct, space
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernel import CONSTANT_ONLY, ConvKernel, ConvSite, Packed
from topiarist.schedules.workload import BLOCKS, ConvWorkload
from topiarist.targets.spec import TargetSpec

MAX_SPARSE_DENSITY = 0.75  # above it the sparse form has never won


class _Direct(ConvKernel[DirectConfig]):
    """What the kernels of this family share."""

    def fits(self, site: ConvSite, config: DirectConfig) -> bool:
        """Whether the configuration works between these layouts."""
        if direct.refuses_views(site.workload, site.views) is not None:
            return False
        return direct.make_kernel(site, config) is not None


def _loops(site: ConvSite, config: DirectConfig) -> direct._Kernel:
    kernel = direct.make_kernel(site, config)
    if kernel is None:
        x, y = site.views.x.layout, site.views.y.layout
        raise ValueError(f"{config} does not fit {x} -> {y}")
    return kernel


class DirectSparse(_Direct):
    """Direct sparse convolution, one output channel at a time."""

    name = "direct_sparse"
    version = 2
    sparse = True

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves any shape; pays only where zeros are many."""
        if workload.mixture is not None:
            return None if workload.scattered else "experts have whole positions of the window"
        if workload.sparsity.density > MAX_SPARSE_DENSITY:
            return f"density {workload.sparsity.density:.2f} is above {MAX_SPARSE_DENSITY}"
        return None

    def knobs(self, site: ConvSite) -> list[DirectConfig]:
        """Tiles of vectors and blocks of input channels."""
        return space.sparse_configs(space.Estimator.of(site))

    def estimate_us(self, site: ConvSite, config: DirectConfig) -> float:
        """Nonzeros, ends of rows and cache misses."""
        estimator = space.Estimator.of(site)
        return estimator.sparse_cycles(config) / estimator.core.cycles_per_us

    def pack(self, site: ConvSite, config: DirectConfig, weight: NDArray[np.float32]) -> Packed:
        """values, offsets, starts."""
        packed = direct.pack_sparse(_loops(site, config), weight)
        if packed is None:
            raise ValueError(f"{config}: an offset needs more than 16 bits")
        return packed

    def prim_func(self, site: ConvSite, config: DirectConfig, name: str) -> Any:
        """The CSR loops."""
        return direct.sparse_prim_func(_loops(site, config), name)


class BlockSparse(DirectSparse):
    """Direct sparse convolution, four output channels at a time on the union of their nonzeros."""

    name = "block_sparse"
    block = 4

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves groups of whole blocks of output channels."""
        if workload.out_channels // workload.groups % self.block:
            return f"output channels per group are no multiple of {self.block}"
        return super().refuses(workload, target)

    def knobs(self, site: ConvSite) -> list[DirectConfig]:
        """Tiles of vectors and blocks of input channels."""
        return space.block_configs(space.Estimator.of(site), self.block)


class Block8Sparse(BlockSparse):
    """Direct sparse convolution, eight output channels at a time, for the pattern `block8x1`."""

    name = "block8_sparse"
    block = 8

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves weights whose zeros come in such blocks, where registers hold several vectors."""
        why = super().refuses(workload, target)
        if why is None and BLOCKS.get(workload.sparsity.pattern, 1) < self.block:
            why = f"the zeros are {workload.sparsity.pattern}, not block8x1"
        if why is None and target.registers < 32:
            why = f"{target.registers} registers hold a single vector of 8 output channels"
        return why


class DirectDense(_Direct):
    """Direct dense convolution in the same layouts."""

    name = "direct_dense"
    version = 2
    sparse = False
    tries = 8

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves every convolution with constant weights."""
        return None if workload.mixture is None else CONSTANT_ONLY

    def knobs(self, site: ConvSite) -> list[DirectConfig]:
        """Tiles of vectors by output channels, blocks of input channels, order of the loops."""
        return space.dense_configs(space.Estimator.of(site))

    def estimate_us(self, site: ConvSite, config: DirectConfig) -> float:
        """Multiply-adds, loads and cache misses."""
        estimator = space.Estimator.of(site)
        return estimator.dense_cycles(config) / estimator.core.cycles_per_us

    def pack(self, site: ConvSite, config: DirectConfig, weight: NDArray[np.float32]) -> Packed:
        """The blocked weight."""
        return (direct.pack_dense(_loops(site, config), weight),)

    def prim_func(self, site: ConvSite, config: DirectConfig, name: str) -> Any:
        """The dense loops."""
        return direct.dense_prim_func(_loops(site, config), name)
