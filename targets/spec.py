"""A device as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TargetSpec:
    """One device that code is compiled for.

    `lanes` is the number of fp32 values in a vector register, `registers` the number of vector
    registers. Cache sizes are in bytes, per core (L3: what one core can use). `peak_gflops` is
    the fp32 FMA peak of one core and `bandwidth_gbs` what it reads in order from beyond its
    second-level cache, where known.
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

    def to_json(self) -> dict[str, Any]:
        """The specification as plain JSON values."""
        return asdict(self)
