"""A device as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from topiarist.targets.gpu import Gpu
from topiarist.targets.toolchain import TOOLCHAINS, Toolchain


@dataclass(frozen=True)
class Cluster:
    """The cores of one kind in a processor: `mcpu` is LLVM's name of the kind.

    `fma_per_cycle` counts the multiply-adds of whole vectors that start in a cycle. None is what
    nobody told.
    """

    mcpu: str
    cores: int
    clock_ghz: float | None = None
    fma_per_cycle: float | None = None
    out_of_order: bool | None = None


@dataclass(frozen=True)
class TargetSpec:
    """One device that code is compiled for.

    `lanes` is the number of fp32 values in a vector register, `registers` the number of vector
    registers. Cache sizes are in bytes, per core (L3: what one core can use). `peak_gflops` is
    the fp32 FMA peak of one core and `bandwidth_gbs` what it reads in order from beyond its
    second-level cache, where known. Where cores differ (big.LITTLE), all of these are about the
    first of `clusters`, the fastest, and `cores` is the number of its cores.
    """

    name: str
    family: str  # x86, arm, cuda
    isa: str  # avx512, avx2, sse4, neon, ...
    lanes: int
    registers: int
    cores: int
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    tvm_target: dict[str, Any]
    required_features: tuple[str, ...] = ()  # CPU flags that generated code uses
    device_model: str = ""  # CPU or GPU model name, part of tuning record keys
    peak_gflops: float | None = None
    bandwidth_gbs: float | None = None
    clusters: tuple[Cluster, ...] = ()  # of ARM processors
    lane_fma: bool = False  # a multiply-add can take one factor from a lane of a register
    gpu: Gpu | None = None  # where kernels run on one; lanes, registers and caches are then its own

    @property
    def triple(self) -> str:
        """LLVM's name of architecture and system; empty for that of this machine."""
        processor = self.tvm_target.get("host", self.tvm_target)
        return str(processor.get("mtriple", ""))

    @property
    def mcpu(self) -> str:
        """LLVM's name of the cores; empty for a target that has no such thing."""
        return str(self.tvm_target.get("mcpu", ""))

    @property
    def system(self) -> str:
        """linux or android."""
        return "android" if self.triple.endswith("android") else "linux"

    @property
    def toolchain(self) -> Toolchain | None:
        """What links and emulates its programs on another machine, where that is known."""
        return TOOLCHAINS.get(self.triple)

    @property
    def clock_ghz(self) -> float | None:
        """The clock of the cores, where known."""
        return self.clusters[0].clock_ghz if self.clusters else None

    @property
    def fma_per_cycle(self) -> float | None:
        """Multiply-adds of whole vectors that a core starts in a cycle, where known."""
        return self.clusters[0].fma_per_cycle if self.clusters else None

    @property
    def out_of_order(self) -> bool | None:
        """Whether the cores reorder instructions, where known."""
        return self.clusters[0].out_of_order if self.clusters else None

    def to_json(self) -> dict[str, Any]:
        """The specification as plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> TargetSpec:
        """The inverse of `to_json`. Raises KeyError or TypeError on nonsense."""
        typed = {
            "required_features": tuple(values["required_features"]),
            "clusters": tuple(Cluster(**cluster) for cluster in values.get("clusters", ())),
            "gpu": Gpu(**values["gpu"]) if values.get("gpu") else None,
        }
        return TargetSpec(**{**values, **typed})
