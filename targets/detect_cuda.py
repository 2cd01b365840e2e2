"""The GPUs of this machine, asked of NVIDIA's driver."""

from __future__ import annotations

import ctypes
import importlib.metadata
from typing import Any

from topiarist.targets.spec import TargetSpec

DRIVER = "libcuda.so.1"
RUNTIME = "libcudart.so.13"
RUNTIME_PACKAGE = "nvidia-cuda-runtime"
OLDEST_DRIVER = 13000  # TVM's runtime is linked with CUDA 13
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_INTEGRATED = {"sm_87"}  # whose code no other GPU of its generation runs


def refuses(spec: TargetSpec) -> str | None:
    """Why this machine can't run code built for a GPU, None when it can."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return f"this machine has no NVIDIA driver, which {spec.name} needs"
    if driver.cuInit(0) != 0 or _value(driver.cuDeviceGetCount) == 0:
        return f"NVIDIA's driver finds no GPU on this machine, which {spec.name} needs"
    version = _value(driver.cuDriverGetVersion)
    if version < OLDEST_DRIVER:
        return (
            f"NVIDIA's driver on this machine is for CUDA {version // 1000}.{version % 1000 // 10} "
            f"and {spec.name} needs one for CUDA {OLDEST_DRIVER // 1000}: update it"
        )
    capability = tuple(
        _value(lambda out, a=attribute: driver.cuDeviceGetAttribute(out, a, 0))
        for attribute in (_MAJOR, _MINOR)
    )
    if not _serves(capability, spec.isa):
        return f"this machine's GPU is sm_{capability[0]}{capability[1]}, not {spec.isa}"
    if runtime_library() is None:
        return f"{spec.name} needs CUDA's runtime library: `pip install 'topiarist[cuda]'`"
    return None


def device_name() -> str:
    """What the driver calls this machine's first GPU; only where `refuses` found one."""
    name = ctypes.create_string_buffer(256)
    driver = ctypes.CDLL(DRIVER)
    driver.cuInit(0)
    driver.cuDeviceGetName(name, len(name), 0)
    return name.value.decode(errors="replace")


def runtime_library() -> str | None:
    """CUDA's runtime library: one that the loader finds, or pip's; None where there is none."""
    try:
        ctypes.CDLL(RUNTIME)
        return RUNTIME
    except OSError:
        pass
    try:
        files = importlib.metadata.files(RUNTIME_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == RUNTIME), None)


def _serves(capability: tuple[int, ...], arch: str) -> bool:
    """Machine code runs on its own architecture and later ones of the same generation."""
    major, minor = divmod(int(arch.removeprefix("sm_")), 10)
    if arch in _INTEGRATED or f"sm_{capability[0]}{capability[1]}" in _INTEGRATED:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def _value(function: Any) -> int:
    """What a function of the driver writes into its first argument; 0 where it fails."""
    value = ctypes.c_int()
    return value.value if function(ctypes.byref(value)) == 0 else 0
