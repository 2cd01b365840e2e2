"""A GPU as a machine that layers' candidates are tried on, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tvm
from numpy.typing import NDArray

from topiarist.compiler.gpu_timer import MOST_CALLS, Launches, failures
from topiarist.compiler.layer_bench import Here, Machine
from topiarist.compiler.measure import Arguments, taking_turns
from topiarist.compiler.parts import Parts
from topiarist.targets.spec import TargetSpec

_Result = TypeVar("_Result")


def machine_of(target: TargetSpec, threads: int) -> Machine:
    """This machine, or its GPU."""
    return Here(threads) if target.gpu is None else OnGpu()


class OnGpu:
    """The first GPU; its process can't go on after a GpuError, which any method may raise."""

    name = "the GPU"
    threads = 1

    def __init__(self) -> None:
        self._launches = Launches(tvm.cuda(0))
        self._device = self._launches.device

    def load(self, parts: Parts, name: str) -> Any:
        """The function's machine code. Raises BuildError."""
        return parts.compiled([name])[name]

    def tensor(self, array: NDArray[Any]) -> Any:
        """In the GPU's memory."""
        with failures("to make room for a layer's data"):
            return tvm.runtime.tensor(array, self._device)

    def turns(self, args: Sequence[Any]) -> Arguments:
        """Copies of the constants take turns."""
        with failures("to make room for a layer's weights"):
            return taking_turns(args, self._device)

    def run(self, function: Any, args: Sequence[Any]) -> None:
        """Launch it, and wait for its end."""
        with failures("to run a kernel"):
            function(*args)
            self._device.sync()

    def seconds(self, function: Any, arguments: Arguments, number: int) -> float:
        """By the GPU's clock, from the second launch of a graph: the first one brings it there."""
        number = min(number, MOST_CALLS)
        with (
            failures("to run a kernel"),
            self._launches.graph(function, arguments, number) as seconds,
        ):
            seconds()
            return seconds() / number

    def together(self, work: Callable[[], _Result]) -> _Result:
        """`work()`: a GPU needs no helpers on the host."""
        return work()
