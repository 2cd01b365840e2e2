"""What a convolution kernel is: who it serves, its knobs, its constants, its code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.layout import View
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.spec import TargetSpec

Packed = tuple[NDArray[np.generic], ...]


@dataclass(frozen=True)
class KernelConfig:
    """The knobs of a kernel, with plain values; each family has its own. `str` is short."""


C = TypeVar("C", bound=KernelConfig)


@dataclass(frozen=True)
class ConvViews:
    """Where a convolution reads and writes; `in_place` adds to what `y` holds already."""

    x: View
    y: View
    residual: View | None = None
    in_place: bool = False


class ConvKernel(ABC, Generic[C]):
    """A convolution kernel: who it serves, its knobs, its constants, its code.

    The function takes (x, *constants, bias[, residual], y), flat fp32 buffers but for constants.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    sparse: ClassVar[bool]
    tries: ClassVar[int] = 6  # configurations of `knobs` that are worth timing

    @abstractmethod
    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Why the kernel can't run the layer on the target, None where it can."""

    @abstractmethod
    def knobs(self, workload: ConvWorkload, target: TargetSpec, views: ConvViews) -> list[C]:
        """The search space between two layouts, most promising first."""

    @abstractmethod
    def estimate_us(
        self,
        workload: ConvWorkload,
        target: TargetSpec,
        views: ConvViews,
        config: C,
    ) -> float:
        """Microseconds on one core by counting instructions and footprints; only ranks."""

    @abstractmethod
    def fits(self, workload: ConvWorkload, config: C, views: ConvViews) -> bool:
        """Whether the configuration works between these layouts."""

    @abstractmethod
    def pack(
        self,
        weight: NDArray[np.float32],
        workload: ConvWorkload,
        config: C,
        views: ConvViews,
        threads: int,
    ) -> Packed:
        """The constants of a weight [O, C / groups, kh, kw]."""

    @abstractmethod
    def prim_func(
        self,
        name: str,
        workload: ConvWorkload,
        config: C,
        views: ConvViews,
        threads: int,
    ) -> Any:
        """The TIR function."""
