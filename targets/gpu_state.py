"""What a GPU runs with: its clocks, as NVIDIA's management library tells them, and its driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from topiarist.targets.detect_cuda import DRIVER

NVML = "libnvidia-ml.so.1"
_SM, _MEMORY = 1, 2  # NVML_CLOCK_*
_TEXT = 80  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
_BUS_ID = 32  # "00000000:01:00.0"


@dataclass(frozen=True)
class GpuState:
    """Clocks in MHz, the driver's version, and the CUDA version that it serves.

    None is what nobody tells, such as clocks where the management library is missing. Raises
    ValueError for what is neither that nor a clock or a line of text.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    driver: str | None = None
    cuda: str | None = None

    def __post_init__(self) -> None:
        for name in ("sm_mhz", "memory_mhz"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 < value < 10**6):
                raise ValueError(f"gpu.{name} is neither null nor a clock in MHz")
        for name in ("driver", "cuda"):
            value = getattr(self, name)
            is_text = isinstance(value, str) and 0 < len(value) < _TEXT and value.isprintable()
            if value is not None and not is_text:
                raise ValueError(f"gpu.{name} is neither null nor a version")


def read() -> GpuState:
    """The state of this machine's first GPU right now."""
    driver, nvml = _library(DRIVER), _library(NVML)
    cuda = ctypes.c_int()
    known = driver is not None and driver.cuDriverGetVersion(ctypes.byref(cuda)) == 0
    version = f"{cuda.value // 1000}.{cuda.value % 1000 // 10}" if known else None
    if nvml is None or driver is None or nvml.nvmlInit_v2() != 0:
        return GpuState(cuda=version)
    try:
        name = ctypes.create_string_buffer(_TEXT)
        told = nvml.nvmlSystemGetDriverVersion(name, _TEXT) == 0
        clock = _clocks(driver, nvml)
        return GpuState(
            clock(_SM), clock(_MEMORY), name.value.decode() if told else None, cuda=version
        )
    finally:
        nvml.nvmlShutdown()


def _clocks(driver: Any, nvml: Any) -> Callable[[int], int | None]:
    """Tells a clock of the GPU that CUDA calls the first one; the two count differently."""
    bus_id, device = ctypes.create_string_buffer(_BUS_ID), ctypes.c_void_p()
    found = (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetPCIBusId(bus_id, _BUS_ID, 0) == 0
        and nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(device)) == 0
    )

    def clock(which: int) -> int | None:
        mhz = ctypes.c_uint()
        if not found or nvml.nvmlDeviceGetClockInfo(device, which, ctypes.byref(mhz)) != 0:
            return None
        return mhz.value or None

    return clock


def _library(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
