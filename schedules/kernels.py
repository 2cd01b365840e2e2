"""All convolution kernels. To add one, append it here; see `schedules/kernel.py` for the contract.

The dense kernels take part like the sparse ones, so that no layer can be slower than dense.
"""

from __future__ import annotations

from typing import Any

from topiarist.schedules.cpu.depthwise import Depthwise
from topiarist.schedules.cpu.dynamic_kernel import DynamicDirect
from topiarist.schedules.cpu.kernels import Block8Sparse, BlockSparse, DirectDense, DirectSparse
from topiarist.schedules.cpu.winograd import WinogradDense
from topiarist.schedules.cuda.kernels import (
    CudaCompiled,
    CudaDense,
    CudaMma,
    CudaSparse,
    CudaSparseMma,
    CudaTiled,
)
from topiarist.schedules.kernel import ConvKernel
from topiarist.targets.spec import TargetSpec

CPU_KERNELS: tuple[ConvKernel[Any], ...] = (
    DirectSparse(),
    BlockSparse(),
    Block8Sparse(),
    DirectDense(),
    Depthwise(),
    WinogradDense(),
)
DYNAMIC_KERNELS: tuple[ConvKernel[Any], ...] = (DynamicDirect(),)  # of mixtures, for CPUs
CUDA_KERNELS: tuple[ConvKernel[Any], ...] = (
    CudaCompiled(),
    CudaSparse(),
    CudaDense(),
    CudaTiled(),
    CudaMma(),
    CudaSparseMma(),
)
CONV_KERNELS = (*CPU_KERNELS, *DYNAMIC_KERNELS, *CUDA_KERNELS)


def kernels_for(target: TargetSpec) -> tuple[ConvKernel[Any], ...]:
    """The kernels that take part in the contest on a target."""
    return (*CPU_KERNELS, *DYNAMIC_KERNELS) if target.gpu is None else CUDA_KERNELS


def conv_kernel(name: str) -> ConvKernel[Any]:
    """The kernel of that name."""
    for kernel in CONV_KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"no convolution kernel is called {name!r}")
