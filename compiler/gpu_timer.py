"""Times kernels on a GPU, by its own clock and without what launching costs the host.

A kernel takes a few microseconds, about what a launch from Python takes. So launches are captured
in a CUDA graph, as they are inside a network, and events around the graph's launch tell its time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from topiarist.compiler.cuda_runtime import CudaRuntime
from topiarist.compiler.measure import REPEATS, Arguments, Timer, calls_of_slice
from topiarist.compiler.parts import Parts

MOST_CALLS = 1000  # of a graph
_DEFAULT_STREAM = 0
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: what other threads do meanwhile breaks no capture


def timer_for(parts: Parts) -> Timer:
    """What times kernels on the target's kind of device."""
    if parts.target.gpu is None:
        return Timer(parts.threads)
    return GpuTimer(parts.device)


class GpuTimer(Timer):
    """Keeps its buffers on the GPU."""

    def __init__(self, device: Any) -> None:
        super().__init__(1, device=device)
        self._cuda = CudaRuntime()

    def repeats(self, function: Callable[..., None], arguments: Arguments) -> tuple[float, ...]:
        """Seconds of a call, each over a graph of calls. Raises BuildError for one that fails."""
        function(*next(arguments))  # loads the machine code, which a capture may not
        self.device.sync()
        with self.graph(function, arguments, 1) as seconds:
            number = min(MOST_CALLS, calls_of_slice(seconds()))
        with self.graph(function, arguments, number) as seconds:
            seconds()
            return tuple(seconds() / number for _ in range(REPEATS))

    @contextlib.contextmanager
    def graph(
        self, function: Callable[..., None], arguments: Arguments, number: int
    ) -> Iterator[Callable[[], float]]:
        """What launches a graph of so many calls once and returns its seconds."""
        stream, graph, executable = (ctypes.c_void_p() for _ in range(3))
        self._cuda.call("StreamCreate", ctypes.byref(stream))
        self.device.set_raw_stream(stream.value)
        try:
            self._cuda.call("StreamBeginCapture", stream, _RELAXED)
            try:
                for _ in range(number):
                    function(*next(arguments))
            finally:
                self._cuda.call("StreamEndCapture", stream, ctypes.byref(graph))
            self._cuda.call(
                "GraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
            )
            yield lambda: self._cuda.seconds(
                lambda: self._cuda.call("GraphLaunch", executable, stream), stream
            )
        finally:
            self.device.set_raw_stream(_DEFAULT_STREAM)
            for name, handle in (("GraphExec", executable), ("Graph", graph), ("Stream", stream)):
                if handle:
                    self._cuda.call(f"{name}Destroy", handle)
