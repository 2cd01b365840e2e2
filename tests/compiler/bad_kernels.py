"""Kernels as their authors did not mean them: they crash, hang, or compute something else."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.cpu.kernels import DirectDense
from topiarist.schedules.kernel import ConvSite, Packed

LONG = 1 << 20


class Wrong(DirectDense):
    """Twice the weight."""

    name = "wrong"

    def pack(self, site: ConvSite, config: DirectConfig, weight: NDArray[np.float32]) -> Packed:
        return super().pack(site, config, 2 * weight)


class NotANumber(DirectDense):
    """A weight that is no number."""

    name = "not_a_number"

    def pack(self, site: ConvSite, config: DirectConfig, weight: NDArray[np.float32]) -> Packed:
        return super().pack(site, config, weight * np.float32("nan"))


class Unbuildable(DirectDense):
    """No code."""

    name = "unbuildable"

    def prim_func(self, site: ConvSite, config: DirectConfig, name: str) -> Any:
        raise ValueError("there is no such loop")


class SlowToBuild(DirectDense):
    """Constants that take forever."""

    name = "slow_to_build"

    def pack(self, site: ConvSite, config: DirectConfig, weight: NDArray[np.float32]) -> Packed:
        time.sleep(1000)
        return super().pack(site, config, weight)


class _Other(DirectDense):
    """A function with the arguments of the dense kernel and another body."""

    def prim_func(self, site: ConvSite, config: DirectConfig, name: str) -> Any:
        w, views = site.workload, site.views
        weights = w.out_channels * w.in_channels // w.groups * w.kernel[0] * w.kernel[1]
        with emit.prim_func(name) as builder:
            x = emit.argument("x", w.batch * views.x.layout.size)
            emit.argument("weights", weights)
            emit.argument("bias", w.out_channels)
            y = emit.argument("y", w.batch * views.y.layout.size)
            self.body(x, y)
        return builder.get()

    def body(self, x: Any, y: Any) -> None:
        raise NotImplementedError


class Crashing(_Other):
    """Writes far outside of its buffer."""

    name = "crashing"

    def body(self, x: Any, y: Any) -> None:
        with T.serial(0, 1 << 10) as i:
            T.buffer_store(y, x[0], [i * (1 << 20) + (1 << 19)])


class Hanging(_Other):
    """Loops for hours."""

    name = "hanging"

    def body(self, x: Any, y: Any) -> None:
        with T.serial(0, LONG) as _, T.serial(0, LONG) as i:
            T.buffer_store(y, y[0] * x[i % 7] + x[i % 5], [0])
