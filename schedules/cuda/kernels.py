"""The convolution kernels for GPUs as they take part in the contest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.cpu.kernels import MAX_SPARSE_DENSITY
from topiarist.schedules.cuda import direct, space
from topiarist.schedules.cuda.direct import CudaConfig
from topiarist.schedules.kernel import ConvKernel, ConvSite, Packed
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.spec import TargetSpec


class CudaDense(ConvKernel[CudaConfig]):
    """Direct dense convolution: several output channels share each load of the input."""

    name = "cuda_dense"
    sparse = False
    tries = 16

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves every convolution on a GPU."""
        return None if target.gpu is not None else f"{target.name} is no GPU"

    def knobs(self, site: ConvSite) -> list[CudaConfig]:
        """Channels and pixels of a thread, threads, split rows, staging."""
        return space.configs(site, sparse=self.sparse)

    def fits(self, site: ConvSite, config: CudaConfig) -> bool:
        """Whether the configuration works between these layouts."""
        return direct.refuses_place(site.workload, config, site.views) is None

    def estimate_us(self, site: ConvSite, config: CudaConfig) -> float:
        """Instructions, loads and bytes."""
        return space.Estimator.of(site, sparse=self.sparse).us(config)

    def pack(self, site: ConvSite, config: CudaConfig, weight: NDArray[np.float32]) -> Packed:
        """values, offsets and, if sparse, starts."""
        return direct.pack(self._loops(site, config), weight)

    def prim_func(self, site: ConvSite, config: CudaConfig, name: str) -> Any:
        """One kernel, halo included."""
        return direct.make_prim_func(self._loops(site, config), name)

    def _loops(self, site: ConvSite, config: CudaConfig) -> direct.Loops:
        why = direct.refuses_place(site.workload, config, site.views)
        if why is not None:
            raise ValueError(f"{config} does not fit: {why}")
        return direct.Loops(site.workload, config, site.views, self.sparse)


class CudaSparse(CudaDense):
    """Direct sparse convolution on the union of the nonzeros of a thread's output channels."""

    name = "cuda_sparse"
    sparse = True

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves any shape; pays only where zeros are many."""
        if workload.sparsity.density > MAX_SPARSE_DENSITY:
            return f"density {workload.sparsity.density:.2f} is above {MAX_SPARSE_DENSITY}"
        return super().refuses(workload, target)
