"""What kernels for a GPU have to know of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU as data. Sizes are in bytes and, but for the second-level cache, per multiprocessor.

    `clock_ghz` is the highest that the maker names, so peaks are upper bounds. `fp32_lanes` counts
    the fp32 multiply-adds that a multiprocessor starts in a cycle, `half_lanes` those that its
    tensor cores do with factors in fp16. `bandwidth_gbs` is that of the device's memory.
    """

    model: str
    arch: str  # sm_90
    multiprocessors: int
    clock_ghz: float
    fp32_lanes: int
    threads: int
    shared_bytes: int
    l1_bytes: int  # shared memory is a part of it
    l2_bytes: int
    bandwidth_gbs: float
    half_lanes: int = 0
    registers: int = 65536

    @property
    def multiplies_half(self) -> bool:
        """Whether its tensor cores take 16x16 matrices of fp16, and sparse ones twice as long."""
        return int(self.arch.removeprefix("sm_")) >= 80

    @property
    def peak_gflops(self) -> float:
        """fp32 multiply-adds of the whole device, without tensor cores, each counted as two."""
        return 2 * self.multiprocessors * self.fp32_lanes * self.clock_ghz

    @property
    def roofline(self) -> str:
        """Its limits for people."""
        peak = f"{self.peak_gflops / 1e3:.1f} TFLOP/s in fp32 without tensor cores"
        return f"{peak}, {self.bandwidth_gbs:g} GB/s"
