"""The convolution kernels for GPUs as they take part in the contest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.cpu.kernels import MAX_SPARSE_DENSITY
from topiarist.schedules.cuda import (
    compiled,
    compiled_space,
    direct,
    space,
    tensor,
    tensor_space,
    tiled,
    tiled_space,
)
from topiarist.schedules.cuda.tensor import TensorConfig
from topiarist.schedules.cuda.thread import CudaConfig, Loops, refuses_place
from topiarist.schedules.cuda.tiled import TiledConfig, Tiles
from topiarist.schedules.kernel import CONSTANT_ONLY, ConvKernel, ConvSite, Packed
from topiarist.schedules.workload import HALF, ConvWorkload
from topiarist.targets.spec import TargetSpec


def _refuses(workload: ConvWorkload, target: TargetSpec) -> str | None:
    """Why no kernel for GPUs runs the layer there."""
    if target.gpu is None:
        return f"{target.name} is no GPU"
    return None if workload.mixture is None else CONSTANT_ONLY


def _refuses_density(workload: ConvWorkload) -> str | None:
    """Why skipping zeros doesn't pay."""
    density = workload.sparsity.density
    if density > MAX_SPARSE_DENSITY:
        return f"density {density:.2f} is above {MAX_SPARSE_DENSITY}"
    return None


class CudaDense(ConvKernel[CudaConfig]):
    """Direct dense convolution: several output channels share each load of the input."""

    name = "cuda_dense"
    sparse = False
    tries = 16

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves every convolution on a GPU."""
        return _refuses(workload, target)

    def knobs(self, site: ConvSite) -> list[CudaConfig]:
        """Channels and pixels of a thread, threads, split rows, staging."""
        return space.configs(site, sparse=self.sparse)

    def fits(self, site: ConvSite, config: CudaConfig) -> bool:
        """Whether the configuration works between these layouts."""
        return refuses_place(site.workload, config, site.views) is None

    def estimate_us(self, site: ConvSite, config: CudaConfig) -> float:
        """Instructions, loads and bytes."""
        return space.Estimator(site, self.sparse).us(config)

    def pack(self, site: ConvSite, config: CudaConfig, weight: NDArray[np.float32]) -> Packed:
        """values, offsets and, if sparse, starts."""
        return direct.pack(self._loops(site, config), weight)

    def prim_func(self, site: ConvSite, config: CudaConfig, name: str) -> Any:
        """One kernel, halo included."""
        return direct.make_prim_func(self._loops(site, config), name)

    def _loops(self, site: ConvSite, config: CudaConfig) -> Loops:
        why = refuses_place(site.workload, config, site.views)
        if why is not None:
            raise ValueError(f"{config} does not fit: {why}")
        return Loops(site.workload, config, site.views, self.sparse)


class CudaTiled(ConvKernel[TiledConfig]):
    """Dense convolution whose blocks of threads share weights and inputs in shared memory."""

    name = "cuda_tiled"
    sparse = False
    tries = 8

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves groups with enough output channels."""
        return _refuses(workload, target) or tiled.refuses(workload)

    def knobs(self, site: ConvSite) -> list[TiledConfig]:
        """Tiles of a thread and of a block, taps in a step, teams."""
        return tiled_space.configs(site)

    def fits(self, site: ConvSite, config: TiledConfig) -> bool:
        """Whether the configuration works between these layouts."""
        return tiled.refuses_place(site.workload, config, site.views) is None

    def estimate_us(self, site: ConvSite, config: TiledConfig) -> float:
        """Instructions, loads from shared memory, barriers, bytes."""
        return tiled_space.Estimator(site).us(config)

    def pack(self, site: ConvSite, config: TiledConfig, weight: NDArray[np.float32]) -> Packed:
        """values and offsets."""
        return tiled.pack(self._tiles(site, config), weight)

    def prim_func(self, site: ConvSite, config: TiledConfig, name: str) -> Any:
        """One kernel, halo included."""
        return tiled.make_prim_func(self._tiles(site, config), name)

    def _tiles(self, site: ConvSite, config: TiledConfig) -> Tiles:
        why = tiled.refuses_place(site.workload, config, site.views)
        if why is not None:
            raise ValueError(f"{config} does not fit: {why}")
        return Tiles(site.workload, config, site.views)


class CudaSparse(CudaDense):
    """Direct sparse convolution on the union of the nonzeros of a thread's output channels."""

    name = "cuda_sparse"
    sparse = True

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves any shape; pays only where zeros are many."""
        return _refuses(workload, target) or _refuses_density(workload)


class CudaCompiled(ConvKernel[CudaConfig]):
    """Direct sparse convolution whose code holds the weights and where their inputs lie."""

    name = "cuda_compiled"
    sparse = True
    weight_in_code = True
    tries = 4  # each takes up to 20 s to compile

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves any shape with few enough nonzeros."""
        why = _refuses(workload, target) or _refuses_density(workload)
        return why or compiled.refuses(workload)

    def knobs(self, site: ConvSite) -> list[CudaConfig]:
        """Channels and pixels of a thread, threads, split columns."""
        return compiled_space.configs(site)

    def fits(self, site: ConvSite, config: CudaConfig) -> bool:
        """Whether the configuration works between these layouts."""
        return compiled.refuses_config(site.workload, config, site.views) is None

    def estimate_us(self, site: ConvSite, config: CudaConfig) -> float:
        """Instructions and their way to the multiprocessors, loads, bytes."""
        return compiled_space.Estimator(site).us(config)

    def pack(self, site: ConvSite, config: CudaConfig, weight: NDArray[np.float32]) -> Packed:
        """Nothing: all is in the code."""
        self._loops(site, config)
        return ()

    def prim_func(self, site: ConvSite, config: CudaConfig, name: str) -> Any:
        """No code serves any weight."""
        raise ValueError(f"{self.name} is made for one weight: ask for it as specialised")

    def specialised(
        self, site: ConvSite, config: CudaConfig, name: str, weight: NDArray[np.float32]
    ) -> Any:
        """One kernel, halo included."""
        return compiled.make_prim_func(self._loops(site, config), name, weight)

    def _loops(self, site: ConvSite, config: CudaConfig) -> Loops:
        why = compiled.refuses_config(site.workload, config, site.views)
        if why is not None:
            raise ValueError(f"{config} does not fit: {why}")
        return Loops(site.workload, config, site.views, sparse=True, adjacent=True)


class CudaMma(ConvKernel[TensorConfig]):
    """Dense convolution on tensor cores, in fp16 with sums in fp32."""

    name = "cuda_mma"
    sparse = False
    dtype = HALF
    tries = 8

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves groups with enough output channels, where fp16 is asked for."""
        why = _refuses(workload, target) or tiled.refuses(workload)
        return why or tensor.refuses(workload, target)

    def knobs(self, site: ConvSite) -> list[TensorConfig]:
        """Tiles of a warp and of a block, taps in a step, teams."""
        return tensor_space.configs(site, sparse=self.sparse)

    def fits(self, site: ConvSite, config: TensorConfig) -> bool:
        """Whether the configuration works between these layouts."""
        return self._refuses_place(site, config) is None

    def estimate_us(self, site: ConvSite, config: TensorConfig) -> float:
        """Matrix instructions, copies into shared memory, barriers, bytes."""
        return tensor_space.Estimator(site, self.sparse).us(config)

    def pack(self, site: ConvSite, config: TensorConfig, weight: NDArray[np.float32]) -> Packed:
        """values, if sparse their places, and offsets."""
        return tensor.pack(self._tiles(site, config), weight, sparse=self.sparse)

    def prim_func(self, site: ConvSite, config: TensorConfig, name: str) -> Any:
        """One kernel, halo included."""
        return tensor.make_prim_func(self._tiles(site, config), name, sparse=self.sparse)

    def _tiles(self, site: ConvSite, config: TensorConfig) -> Tiles:
        why = self._refuses_place(site, config)
        if why is not None:
            raise ValueError(f"{config} does not fit: {why}")
        return Tiles(site.workload, config, site.views)

    def _refuses_place(self, site: ConvSite, config: TensorConfig) -> str | None:
        return tensor.refuses_place(site.workload, config, site.views, sparse=self.sparse)


class CudaSparseMma(CudaMma):
    """The same without half of the products, of weights with two zeros in every four channels."""

    name = "cuda_sparse_mma"
    sparse = True

    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Serves N:M patterns that have at most two of four."""
        return super().refuses(workload, target) or tensor.refuses_pattern(workload)
