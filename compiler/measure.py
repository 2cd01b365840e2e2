"""Times one kernel on this machine, on random data of the right shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from topiarist.compiler.program import Ref
from topiarist.compiler.runtime import ThreadPool

REPEATS = 7
SLICE_S = 0.0015  # least time of one repeat

Clock = Callable[[], float]


class Timer:
    """Times kernels; keeps the buffers that their tensors live in."""

    def __init__(self, threads: int, clock: Clock = time.perf_counter) -> None:
        self.pool = ThreadPool(threads)
        self.clock = clock
        self.random = np.random.default_rng(0)
        self._tensors: dict[Ref, Any] = {}

    def seconds(
        self, function: Callable[..., None], args: Sequence[Ref | NDArray[Any]]
    ) -> tuple[float, ...]:
        """Seconds of a call, repeated; buffers are filled with random values once."""
        tensors = [self._tensor(arg) for arg in args]

        def repeats() -> tuple[float, ...]:
            function(*tensors)
            number = max(1, int(SLICE_S / max(self._time(function, tensors, 1), 1e-7)))
            return tuple(self._time(function, tensors, number) for _ in range(REPEATS))

        return self.pool.call(repeats)

    def _time(self, function: Callable[..., None], tensors: list[Any], number: int) -> float:
        start = self.clock()
        for _ in range(number):
            function(*tensors)
        return (self.clock() - start) / number

    def _tensor(self, arg: Ref | NDArray[Any]) -> Any:
        if not isinstance(arg, Ref):
            return tvm.runtime.tensor(arg)
        if arg not in self._tensors:
            data = self.random.uniform(0.0, 1.0, arg.shape).astype(arg.dtype)
            self._tensors[arg] = tvm.runtime.tensor(data)
        return self._tensors[arg]
