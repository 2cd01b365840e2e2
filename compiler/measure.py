"""Times one kernel on this machine, on random data of the right shapes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from topiarist.compiler.program import Ref
from topiarist.compiler.runtime import ThreadPool

REPEATS = 7
SLICE_S = 0.0015  # least time of one repeat
FAR_BYTES = 8 << 20  # what a core's own caches don't hold
MOST_COPIES = 64

Clock = Callable[[], float]
Arguments = Iterator[list[Any]]


def taking_turns(args: Sequence[Any], device: Any = None) -> Arguments:
    """The arguments of one call after the other, arrays as tensors: copies of them in turn.

    Arrays are constants. In a network a layer's constants come from memory each time, and a
    kernel that waits for them must not look as fast as it is with constants in the cache.
    """
    size = sum(arg.nbytes for arg in args if isinstance(arg, np.ndarray))
    copies = min(MOST_COPIES, -(-FAR_BYTES // size) + 1) if size else 1
    tensor = tvm.runtime.tensor
    return itertools.cycle(
        [
            [tensor(arg, device) if isinstance(arg, np.ndarray) else arg for arg in args]
            for _ in range(copies)
        ]
    )


def calls_of_slice(seconds: float) -> int:
    """How many calls of so many seconds each are timed together."""
    return max(1, int(SLICE_S / max(seconds, 1e-7)))


class Timer:
    """Times kernels; keeps the buffers that their tensors live in, on the CPU by default."""

    def __init__(self, threads: int, clock: Clock = time.perf_counter, device: Any = None) -> None:
        self.pool = ThreadPool(threads)
        self.clock = clock
        self.device = tvm.cpu(0) if device is None else device
        self.random = np.random.default_rng(0)
        self._tensors: dict[Ref, Any] = {}

    def seconds(
        self, function: Callable[..., None], args: Sequence[Ref | NDArray[Any]]
    ) -> tuple[float, ...]:
        """Seconds of a call, repeated; buffers are filled with random values once."""
        arguments = taking_turns(
            [self._tensor(arg) if isinstance(arg, Ref) else arg for arg in args], self.device
        )
        return self.pool.call(lambda: self.repeats(function, arguments))

    def repeats(self, function: Callable[..., None], arguments: Arguments) -> tuple[float, ...]:
        """Seconds of a call, each over enough calls to be read off a clock."""
        function(*next(arguments))
        number = calls_of_slice(self._time(function, arguments, 1))
        return tuple(self._time(function, arguments, number) for _ in range(REPEATS))

    def _time(self, function: Callable[..., None], arguments: Arguments, number: int) -> float:
        start = self.clock()
        for _ in range(number):
            function(*next(arguments))
        return (self.clock() - start) / number

    def _tensor(self, ref: Ref) -> Any:
        if ref not in self._tensors:
            data = self.random.uniform(0.0, 1.0, ref.shape).astype(ref.dtype)
            self._tensors[ref] = tvm.runtime.tensor(data, self.device)
        return self._tensors[ref]
