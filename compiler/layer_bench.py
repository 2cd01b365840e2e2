"""Builds, checks and times one layer's candidates in turns, on whatever machine runs them.

The repeats of all candidates are interleaved, and a reference kernel is timed before each round, so
that a disturbed machine shows.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import tvm
from numpy.typing import NDArray

from topiarist.compiler.check import expectation
from topiarist.compiler.measure import Arguments, calls_of_slice, taking_turns
from topiarist.compiler.parts import Parts
from topiarist.compiler.runtime import ThreadPool
from topiarist.compiler.worker import Batch, Layer, Outcome, Stage, Variant
from topiarist.errors import BoardError, GpuError
from topiarist.schedules.cpu.linear import LinearShape
from topiarist.schedules.kernel import ConvSite
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.record import typical_us

ROUNDS = 7
FAR_BEHIND = 3.0  # times the batch's fastest; such a candidate is repeated only
FEW_ROUNDS = 3  # times
WARM_UP = 10  # calls of the reference kernel
DIGITS = 10  # of seconds: a tenth of a nanosecond

Tell = Callable[[Stage, int | None], None]
_Result = TypeVar("_Result")


class Machine(Protocol):
    """Where kernels run: this machine, or a board. A function is whatever `load` gives."""

    threads: int
    name: str  # for messages

    def load(self, parts: Parts, name: str) -> Any:
        """A function of the parts, ready to run. Raises BuildError."""
        ...

    def tensor(self, array: NDArray[Any]) -> Any:
        """The array in the machine's memory."""
        ...

    def turns(self, args: Sequence[Any]) -> Arguments:
        """The arguments of one call after the other; arrays are constants."""
        ...

    def run(self, function: Any, args: Sequence[Any]) -> None:
        """Call the function."""
        ...

    def seconds(self, function: Any, arguments: Arguments, number: int) -> float:
        """The mean of so many calls, whose constants come from memory."""
        ...

    def together(self, work: Callable[[], _Result]) -> _Result:
        """`work()`, which calls the methods above, with the machine's number of threads."""
        ...


class Here:
    """This process."""

    name = "this machine"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPool(threads)

    def load(self, parts: Parts, name: str) -> Any:
        """The function's machine code."""
        return parts.compiled([name])[name]

    def tensor(self, array: NDArray[Any]) -> Any:
        """In aligned memory."""
        return tvm.runtime.tensor(array)

    def turns(self, args: Sequence[Any]) -> Arguments:
        """Copies of the constants take turns."""
        return taking_turns(args)

    def run(self, function: Any, args: Sequence[Any]) -> None:
        """Call it."""
        function(*args)

    def seconds(self, function: Any, arguments: Arguments, number: int) -> float:
        """By this process's clock."""
        start = time.perf_counter()
        for _ in range(number):
            function(*next(arguments))
        return (time.perf_counter() - start) / number

    def together(self, work: Callable[[], _Result]) -> _Result:
        """In a thread that has so many helpers."""
        return self.pool.call(work)


@dataclass
class _Built:
    """A variant ready to call; `seconds` of its repeats so far."""

    index: int
    function: Any
    arguments: Arguments
    number: int = 1
    rounds: int = ROUNDS
    seconds: list[float] = field(default_factory=list)


class LayerBench:
    """Measures batches; keeps functions and data of the last layer for its next batch.

    `tell(stage, index)` is called before each step that may not return.
    """

    def __init__(self, machine: Machine, tell: Tell) -> None:
        self.machine = machine
        self.tell = tell
        self._layer: Layer | None = None

    def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
        """All variants that build and are right, timed in turns.

        Raises BoardError or GpuError.
        """
        self.tell("prepare", None)
        self._prepare(layer)
        failed: dict[int, Outcome] = {}
        built = []
        for index, variant in enumerate(variants):
            made = self._build(index, variant)
            if isinstance(made, Outcome):
                failed[index] = made
            else:
                built.append(made)
        right = []
        for each in built:
            self.tell("run", each.index)
            wrong = self._check(each, variants[each.index].kernel.dtype)
            if wrong is None:
                right.append(each)
            else:
                failed[each.index] = Outcome((), "wrong_result", wrong)
        reference = self.machine.together(lambda: self._time(right)) if right else ()
        timed = {
            each.index: Outcome(tuple(each.seconds), reference_us=typical_us(reference))
            for each in right
        }
        outcomes = failed | timed
        return Batch(tuple(outcomes[i] for i in range(len(variants))), reference)

    def try_out(self, target: TargetSpec) -> float:
        """Build, check and time the reference kernel. Raises BoardError or BuildError."""
        self.tell("prepare", None)
        return Reference(Parts(target, self.machine.threads), self.machine).seconds()

    def _prepare(self, layer: Layer) -> None:
        """The data of a layer, kept for its next batch."""
        same = self._layer is not None and (
            layer.site == self._layer.site and np.array_equal(layer.weight, self._layer.weight)
        )
        if same:
            return
        if self._layer is None or not _same_code(layer.site, self._layer.site):
            self.parts = Parts(layer.site.target, self.machine.threads)
            self.reference = Reference(self.parts, self.machine)
        self._layer = layer
        self.expected = expectation(layer.site, layer.weight, layer.bias)
        tensor = self.machine.tensor
        self.x, self.bias = tensor(self.expected.x), tensor(layer.bias)
        self.y = tensor(self.expected.y_before)
        residual = self.expected.residual
        self.residual = [] if residual is None else [tensor(residual)]

    def _build(self, index: int, variant: Variant) -> _Built | Outcome:
        assert self._layer is not None
        site = self._layer.site
        self.tell("build", index)
        try:
            packed = variant.kernel.pack(site, variant.config, self._layer.weight)
            weight = self._layer.weight
            name = self.parts.convolution(variant.kernel, site, variant.config, weight)
            function = self.machine.load(self.parts, name)
        except (BoardError, GpuError):
            raise
        except Exception as error:  # whatever a kernel's author got wrong
            return Outcome((), "build_error", f"{type(error).__name__}: {error}")
        args = [self.x, *packed, self.bias, *self.residual, self.y]
        return _Built(index, function, self.machine.turns(args))

    def _check(self, built: _Built, dtype: str) -> str | None:
        """Run once on known data; what is wrong with the result, None if nothing is."""
        self.y.copyfrom(self.expected.y_before)
        args = next(built.arguments)
        try:
            self.machine.together(lambda: self.machine.run(built.function, args))
        except (BoardError, GpuError):
            raise
        except Exception as error:  # as above: arguments that don't fit, say
            return f"{type(error).__name__}: {error}"
        return self.expected.mismatch(self.y.numpy(), dtype)

    def _time(self, built: list[_Built]) -> tuple[float, ...]:
        """Time all variants in turns; the reference kernel's seconds before each round."""
        for each in built:
            self.tell("run", each.index)
            each.number = calls_of_slice(self._seconds(each, 1))
        fastest = max(each.number for each in built)
        for each in built:
            each.rounds = ROUNDS if each.number * FAR_BEHIND >= fastest else FEW_ROUNDS
        reference = []
        for i in range(ROUNDS):
            reference.append(self.reference.seconds())
            for each in built:
                if i < each.rounds:
                    self.tell("run", each.index)
                    each.seconds.append(self._seconds(each, each.number))
        reference.append(self.reference.seconds())
        return tuple(reference)

    def _seconds(self, built: _Built, number: int) -> float:
        return round(self.machine.seconds(built.function, built.arguments, number), DIGITS)


def _same_code(a: ConvSite, b: ConvSite) -> bool:
    """Whether kernels have the same machine code at both sites: zeros don't change it."""
    return a == replace(b, workload=replace(b.workload, sparsity=a.workload.sparsity))


class Reference:
    """A kernel that never changes: what it takes tells how fast the machine is at the moment."""

    def __init__(self, parts: Parts, machine: Machine) -> None:
        self._machine = machine
        self._kernel = _reference_kernel(parts, machine)

    def seconds(self) -> float:
        """The mean of some calls, after others: what ran before, and where, must not show."""
        warm_up = self._machine.seconds(*self._kernel, WARM_UP)
        return round(self._machine.seconds(*self._kernel, calls_of_slice(warm_up)), DIGITS)


def _reference_kernel(parts: Parts, machine: Machine) -> tuple[Any, Arguments]:
    """A fully connected layer with weights of 512 KiB: a function that never changes, its args.

    Raises BoardError if the machine gets it wrong: then no kernel is to blame for its results.
    """
    shape = LinearShape(1, 512, 256)
    lanes, linear = parts.target.lanes, parts.operators.linear
    name = parts.function(
        "reference",
        "reference",
        lambda name: linear.dense_linear_prim_func(name, shape, lanes, threads=1),
    )
    random = np.random.default_rng(0)
    x = random.random(shape.inputs, np.float32)
    weight = random.random((shape.outputs, shape.inputs), np.float32)
    bias = random.random(shape.outputs, np.float32)
    constants = [linear.pack_dense_linear(weight, lanes), bias]
    args = [machine.tensor(array) for array in (x, *constants, np.zeros_like(bias))]
    function = machine.load(parts, name)
    machine.together(lambda: machine.run(function, args))
    if not np.allclose(args[-1].numpy(), weight @ x + bias, rtol=1e-4):
        raise BoardError(f"{machine.name} computes wrong results, even of a plain matrix product")
    return function, itertools.repeat(args)
