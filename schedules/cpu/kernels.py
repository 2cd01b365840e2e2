"""The direct convolution kernels as they take part in the contest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.cpu import direct, space
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernel import ConvKernel, ConvViews, Packed
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.spec import TargetSpec

MAX_SPARSE_DENSITY = 0.75  # above it the sparse form has never won
BLOCK = 4


def _loops(
    workload: ConvWorkload, config: DirectConfig, views: ConvViews, threads: int
) -> direct._Kernel:
    kernel = direct.make_kernel(workload, config, views, threads)
    if kernel is None:
        raise ValueError(f"{config} does not fit {views.x.layout} -> {views.y.layout}")
    return kernel


class _Direct(ConvKernel[DirectConfig]):
    """What the kernels of this family share."""

    def fits(self, workload: ConvWorkload, config: DirectConfig, views: ConvViews) -> bool:
        """Whether the configuration works between these layouts."""
        if direct.refuses_views(workload, views) is not None:
            return False
        return direct.make_kernel(workload, config, views, 1) is not None


class DirectSparse(_Direct):
    """Direct sparse convolution, one output channel at a time."""

    name = "direct_sparse"
    sparse = True

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves any shape; pays only where zeros are many."""
        if workload.sparsity.density > MAX_SPARSE_DENSITY:
            return f"density {workload.sparsity.density:.2f} is above {MAX_SPARSE_DENSITY}"
        return None

    def knobs(
        self, workload: ConvWorkload, target: TargetSpec, views: ConvViews
    ) -> list[DirectConfig]:
        """Tiles of vectors and blocks of input channels."""
        return space.sparse_configs(workload, target, views.x.layout, views.y.layout)

    def estimate_us(
        self,
        workload: ConvWorkload,
        target: TargetSpec,
        views: ConvViews,
        config: DirectConfig,
    ) -> float:
        """Nonzeros, ends of rows and cache misses."""
        estimate = space.Estimator(workload, target, views.x.layout, views.y.layout)
        return estimate.sparse_cycles(config) / space.CYCLES_PER_US

    def pack(
        self,
        weight: NDArray[np.float32],
        workload: ConvWorkload,
        config: DirectConfig,
        views: ConvViews,
        threads: int,
    ) -> Packed:
        """values, offsets, starts."""
        packed = direct.pack_sparse(_loops(workload, config, views, threads), weight)
        if packed is None:
            raise ValueError(f"{config}: an offset needs more than 16 bits")
        return packed

    def prim_func(
        self,
        name: str,
        workload: ConvWorkload,
        config: DirectConfig,
        views: ConvViews,
        threads: int,
    ) -> Any:
        """The CSR loops."""
        return direct.sparse_prim_func(_loops(workload, config, views, threads), name)


class BlockSparse(DirectSparse):
    """Direct sparse convolution, four output channels at a time on the union of their nonzeros."""

    name = "block_sparse"

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves groups of four output channels."""
        if workload.out_channels // workload.groups % BLOCK:
            return f"output channels per group are no multiple of {BLOCK}"
        return super().refuses(workload, target)

    def knobs(
        self, workload: ConvWorkload, target: TargetSpec, views: ConvViews
    ) -> list[DirectConfig]:
        """Tiles of vectors and blocks of input channels."""
        return space.block_configs(workload, target, views.x.layout, views.y.layout, BLOCK)


class DirectDense(_Direct):
    """Direct dense convolution in the same layouts."""

    name = "direct_dense"
    sparse = False
    tries = 8

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves every convolution."""
        return None

    def knobs(
        self, workload: ConvWorkload, target: TargetSpec, views: ConvViews
    ) -> list[DirectConfig]:
        """Tiles of vectors by output channels, and blocks of input channels."""
        return space.dense_configs(workload, target, views.x.layout, views.y.layout)

    def estimate_us(
        self,
        workload: ConvWorkload,
        target: TargetSpec,
        views: ConvViews,
        config: DirectConfig,
    ) -> float:
        """Multiply-adds, loads and cache misses."""
        estimate = space.Estimator(workload, target, views.x.layout, views.y.layout)
        return estimate.dense_cycles(config) / space.CYCLES_PER_US

    def pack(
        self,
        weight: NDArray[np.float32],
        workload: ConvWorkload,
        config: DirectConfig,
        views: ConvViews,
        threads: int,
    ) -> Packed:
        """The blocked weight."""
        return (direct.pack_dense(_loops(workload, config, views, threads), weight),)

    def prim_func(
        self,
        name: str,
        workload: ConvWorkload,
        config: DirectConfig,
        views: ConvViews,
        threads: int,
    ) -> Any:
        """The dense loops."""
        return direct.dense_prim_func(_loops(workload, config, views, threads), name)
