"""CUDA's runtime library: the calls that TVM's runtime has no functions for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from topiarist.errors import GpuError
from topiarist.targets import detect_cuda


class CudaRuntime:
    """The library on a machine that has it: `detect_cuda.refuses` has asked."""

    def __init__(self) -> None:
        library = detect_cuda.runtime_library()
        assert library is not None
        self._library = ctypes.CDLL(library)

    def call(self, name: str, *args: Any) -> None:
        """A function by its name without `cuda`. Raises GpuError with its message."""
        status = getattr(self._library, f"cuda{name}")(*args)
        if status:
            text = self._library.cudaGetErrorString
            text.restype = ctypes.c_char_p
            raise GpuError(f"the GPU failed to run a kernel: {text(status).decode()}")

    def seconds(self, launch: Callable[[], object], stream: ctypes.c_void_p | None = None) -> float:
        """What the GPU needs for what is launched on a stream, by its own clock."""
        start, end, ms = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        for event in (start, end):
            self.call("EventCreate", ctypes.byref(event))
        try:
            self.call("EventRecord", start, stream)
            launch()
            self.call("EventRecord", end, stream)
            self.call("EventSynchronize", end)
            self.call("EventElapsedTime", ctypes.byref(ms), start, end)
        finally:
            for event in (start, end):
                self.call("EventDestroy", event)
        return ms.value / 1e3
