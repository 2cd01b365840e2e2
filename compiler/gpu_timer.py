"""Times kernels on a GPU, by its own clock and without what launching costs the host.

A kernel takes a few microseconds, about what a launch from Python takes. So launches are captured
in a CUDA graph, as they are inside a network, and events around the graph's launch tell its time.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from topiarist.compiler.cuda_runtime import CudaRuntime
from topiarist.compiler.measure import REPEATS, Arguments, Timer, calls_of_slice
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Ref
from topiarist.errors import GpuError

MOST_CALLS = 1000  # of a graph
_DEFAULT_STREAM = 0
_RELAXED = 2  # cudaStreamCaptureModeRelaxed: what other threads do meanwhile breaks no capture
_LONGEST = 300  # characters of what CUDA says
_SOURCE = "// CUDA Source"  # begins the kernel's whole code in what TVM says of a failed launch


@contextlib.contextmanager
def failures(doing: str) -> Iterator[None]:
    """Errors of TVM's CUDA runtime inside as GpuError, in one sentence."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).partition(_SOURCE)[0].split())
        raise GpuError(f"the GPU failed {doing}: {reason[:_LONGEST]}") from error


def timer_for(parts: Parts) -> Timer:
    """What times kernels on the target's kind of device."""
    if parts.target.gpu is None:
        return Timer(parts.threads)
    return GpuTimer(parts.device)


class Launches:
    """Times calls that launch kernels on a device, captured as a graph."""

    def __init__(self, device: Any) -> None:
        self._cuda = CudaRuntime()
        self.device = device

    @contextlib.contextmanager
    def graph(
        self, function: Callable[..., None], arguments: Arguments, number: int
    ) -> Iterator[Callable[[], float]]:
        """What launches a graph of so many calls once and returns its seconds.

        The function's machine code has to be loaded, which a capture may not do. Raises GpuError.
        """
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


class GpuTimer(Timer):
    """Keeps its buffers on the GPU."""

    def __init__(self, device: Any) -> None:
        super().__init__(1, device=device)
        self.launches = Launches(device)

    def seconds(
        self, function: Callable[..., None], args: Sequence[Ref | NDArray[Any]]
    ) -> tuple[float, ...]:
        """Seconds of a call, repeated. Raises GpuError."""
        with failures("to run a kernel"):
            return super().seconds(function, args)

    def repeats(self, function: Callable[..., None], arguments: Arguments) -> tuple[float, ...]:
        """Seconds of a call, each over a graph of calls."""
        function(*next(arguments))  # loads the machine code, which a capture may not
        self.device.sync()
        with self.launches.graph(function, arguments, 1) as seconds:
            number = min(MOST_CALLS, calls_of_slice(seconds()))
        with self.launches.graph(function, arguments, number) as seconds:
            seconds()
            return tuple(seconds() / number for _ in range(REPEATS))
