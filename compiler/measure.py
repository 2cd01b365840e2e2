"""Times one kernel on this machine, on random data of the right shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from topiarist.compiler.program import Ref
from topiarist.compiler.runtime import ThreadPool
from topiarist.errors import BuildError
from topiarist.targets.spec import TargetSpec

REPEATS = 7
SLICE_US = 1500.0  # least time of one repeat
FIRST_QUARTILE = 0.25  # steadier than the minimum, and less disturbed than the median


class Timer:
    """Builds and times kernels; keeps the buffers that their tensors live in."""

    def __init__(self, target: TargetSpec, threads: int) -> None:
        self.target = tvm.target.Target(target.tvm_target)
        self.random = np.random.default_rng(0)
        self._tensors: dict[tuple[str, tuple[int, ...], str], Any] = {}
        self.pool = ThreadPool(threads)

    def time_us(self, function: Any, args: Sequence[Ref | NDArray[Any]]) -> float:
        """Microseconds of a call; buffers are filled with random values once."""
        module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        try:
            built = tvm.compile(module, target=self.target)
        except (RuntimeError, ValueError, TypeError) as error:
            raise BuildError(f"a candidate kernel failed to compile: {error}") from error
        library = built.mod if hasattr(built, "mod") else built
        tensors = [self._tensor(arg) for arg in args]
        device = tvm.cpu()
        once = library.time_evaluator("kernel", device, number=1, repeat=2)
        guess_us = min(self.pool.call(lambda: once(*tensors)).results) * 1e6
        number = max(1, int(SLICE_US / max(guess_us, 0.1)))
        timer = library.time_evaluator("kernel", device, number=number, repeat=REPEATS)
        results = self.pool.call(lambda: timer(*tensors)).results
        return float(np.quantile(np.asarray(results), FIRST_QUARTILE)) * 1e6

    def _tensor(self, arg: Ref | NDArray[Any]) -> Any:
        if not isinstance(arg, Ref):
            return tvm.runtime.tensor(arg)
        key = (arg.buffer, arg.shape, arg.dtype)
        if key not in self._tensors:
            data = self.random.uniform(0.0, 1.0, arg.shape).astype(arg.dtype)
            self._tensors[key] = tvm.runtime.tensor(data)
        return self._tensors[key]
