"""What a convolution kernel is: who it serves, its knobs, its constants, its code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.layout import View
from topiarist.schedules.workload import SINGLE, ConvWorkload
from topiarist.targets.spec import TargetSpec

Packed = tuple[NDArray[np.generic], ...]
CONSTANT_ONLY = "its weights are no constants"  # why most kernels refuse a mixture


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


@dataclass(frozen=True)
class ConvSite:
    """A convolution in its place: the layer, its layouts, the device and its threads."""

    workload: ConvWorkload
    views: ConvViews
    target: TargetSpec
    threads: int = 1


class ConvKernel(ABC, Generic[C]):
    """A convolution kernel; `C` is its configuration.

    Its function takes (x, *constants, bias[, residual], y): flat fp32 buffers, but for the
    constants, which are as `pack` makes them. Of a mixture one of them is computed in a
    network: the shares, which come last, if the kernel `mixes`; else the values, which come first.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # raised when old measurements no longer hold
    sparse: ClassVar[bool]
    weight_in_code: ClassVar[bool] = False  # then code serves one weight: `specialised` makes it
    mixes: ClassVar[bool] = False
    dtype: ClassVar[str] = SINGLE  # that factors are rounded to; sums are fp32 in any case
    tries: ClassVar[int] = 6  # configurations of `knobs` that are worth timing

    @abstractmethod
    def refuses(self, workload: ConvWorkload, target: TargetSpec) -> str | None:
        """Why the kernel can't run the layer on the target, None where it can."""

    @abstractmethod
    def knobs(self, site: ConvSite) -> list[C]:
        """The search space, most promising first."""

    @abstractmethod
    def fits(self, site: ConvSite, config: C) -> bool:
        """Whether the configuration works between these layouts."""

    @abstractmethod
    def estimate_us(self, site: ConvSite, config: C) -> float:
        """Microseconds on one core by counting instructions and footprints; only ranks."""

    def added_error(self, workload: ConvWorkload, config: C) -> float:
        """Error beyond that of rounding factors and sums, relative to the largest output."""
        return 0.0

    @abstractmethod
    def pack(self, site: ConvSite, config: C, weight: NDArray[np.float32]) -> Packed:
        """The constants of a weight [O, C / groups, kh, kw]. Raises ValueError without a fit."""

    @abstractmethod
    def prim_func(self, site: ConvSite, config: C, name: str) -> Any:
        """The TIR function. Raises ValueError without a fit."""

    def specialised(self, site: ConvSite, config: C, name: str, weight: NDArray[np.float32]) -> Any:
        """The TIR function for this weight: the one for any, but where `weight_in_code`."""
        return self.prim_func(site, config, name)
