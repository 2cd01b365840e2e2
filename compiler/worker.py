"""Candidates are built, checked and timed in a process of their own.

A candidate that hangs is ended after a while, one that crashes takes only that process with it,
and one that computes something else than the reference is found before it is timed. The repeats of
a batch's candidates are interleaved, and a reference kernel is timed before each round, so that a
disturbed machine shows.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from topiarist.errors import BuildError
from topiarist.schedules.kernel import ConvKernel, ConvSite, KernelConfig
from topiarist.tuning_logs.record import DRIFT_LIMIT, Status, typical_us

Arguments = Iterator[list[Any]]
Stage = Literal["start", "prepare", "build", "run"]

RETRIES = 1  # of a batch that the machine was disturbed in
ROUNDS = 7
SLICE_S = 0.0015  # least time of one repeat
FAR_BEHIND = 3.0  # times the batch's fastest; such a candidate is repeated only
FEW_ROUNDS = 3  # times
DIGITS = 10  # of seconds: a tenth of a nanosecond
POLL_S = 0.2
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


@dataclass(frozen=True)
class Layer:
    """A convolution in its place, with its weight [O, C / groups, kh, kw] and bias [O]."""

    site: ConvSite
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """A kernel with its knobs."""

    kernel: ConvKernel[Any]
    config: KernelConfig


@dataclass(frozen=True)
class Outcome:
    """Every repeat in seconds, or what went wrong."""

    seconds: tuple[float, ...] = ()
    status: Status = "ok"
    message: str = ""


@dataclass(frozen=True)
class Batch:
    """The outcomes of variants in their order, and the reference kernel's seconds around them."""

    outcomes: tuple[Outcome, ...]
    reference: tuple[float, ...]


@dataclass(frozen=True)
class Limits:
    """Seconds that a step may take; `run` is for one call of a kernel or one repeat."""

    start: float = 120.0
    prepare: float = 120.0
    build: float = 60.0
    run: float = 10.0


class Measurer(Protocol):
    """What measures a batch: `Worker`, or an invented one."""

    def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
        """The variants' outcomes in their order."""
        ...


class Drift:
    """How steady the machine is, by the reference kernel's seconds; `disturbed` counts when not."""

    def __init__(self) -> None:
        self.disturbed = 0
        self._usual: list[float] = []  # seconds around each measurement

    def of(self, reference: Sequence[float]) -> float | None:
        """The reference kernel's time over its usual one, see `TuningRecord.drift`.

        None without any.
        """
        if not reference:
            return None
        median = float(np.median(reference))
        self._usual.append(median)
        drift = round(max(median / (typical_us(self._usual) * 1e-6), 1.0), 3)
        self.disturbed += drift > DRIFT_LIMIT
        return drift


class Steady:
    """Measures batches, again where the machine was disturbed meanwhile."""

    def __init__(self, measurer: Measurer) -> None:
        self.measurer = measurer
        self._drift = Drift()

    @property
    def disturbed(self) -> int:
        """Batches that were disturbed, repeated or not."""
        return self._drift.disturbed

    def measure(
        self, layer: Layer, variants: Sequence[Variant]
    ) -> tuple[tuple[Outcome, ...], float | None]:
        """The outcomes, and how steady the machine was: see `TuningRecord.drift`."""
        for _ in range(RETRIES + 1):
            batch = self.measurer.measure(layer, variants)
            drift = self._drift.of(batch.reference)
            if drift is None or drift <= DRIFT_LIMIT:
                break
        return batch.outcomes, drift


class Worker:
    """Measures batches of one layer's variants in another process, which it starts as needed."""

    def __init__(self, threads: int, limits: Limits | None = None) -> None:
        self.threads = threads
        self.limits = limits or Limits()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
        """Build, check and time the variants. Raises BuildError if no process can be started."""
        outcomes: dict[int, Outcome] = {}
        reference: tuple[float, ...] = ()
        todo = list(range(len(variants)))
        while todo:
            reply = self._attempt(layer, [variants[i] for i in todo])
            if isinstance(reply, Batch):
                outcomes |= dict(zip(todo, reply.outcomes, strict=True))
                reference = reply.reference
                break
            at, outcome = reply  # the others are tried again without it
            outcomes[todo.pop(at)] = outcome
        return Batch(tuple(outcomes[i] for i in range(len(variants))), reference)

    def _attempt(self, layer: Layer, variants: list[Variant]) -> Batch | tuple[int, Outcome]:
        """The batch, or which variant ended the process and how."""
        connection = self._started()
        stage: Stage = "start"
        at: int | None = None
        try:
            connection.send((layer, variants))
            while True:
                if not self._wait(connection, getattr(self.limits, stage)):
                    limit = getattr(self.limits, stage)
                    outcome = Outcome((), "timeout", f"no end after {limit:g} s of {stage}")
                    break
                reply = connection.recv()
                if isinstance(reply, Batch):
                    return reply
                stage, at = reply
        except (EOFError, ConnectionError):
            outcome = self._death(stage)
        self.close()
        if at is None:
            raise BuildError(
                f"the process that measures kernels failed ({outcome.message}); "
                "is there enough memory?"
            )
        return at, outcome

    def _started(self) -> Connection:
        if self._process is not None and not self._process.is_alive():  # somebody ended it
            self.close()
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(
                target=serve, args=(theirs, self.threads, os.getpid()), daemon=True
            )
            self._process.start()
            theirs.close()
        return self._connection

    @staticmethod
    def _wait(connection: Connection, limit_s: float) -> bool:
        """Whether something came in time. Time in which this process was stopped doesn't count."""
        waited = 0.0
        while waited < limit_s:
            start = time.monotonic()
            if connection.poll(min(POLL_S, limit_s)):
                return True
            waited += min(time.monotonic() - start, 2 * POLL_S)
        return False

    def _death(self, stage: Stage) -> Outcome:
        assert self._process is not None
        self._process.join(5)
        code = self._process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        return Outcome((), "crash", f"the process died with {how} in {stage}")


def serve(connection: Connection, threads: int, parent: int) -> None:
    """The other process: answers batches until nobody asks any more."""
    from topiarist.compiler.runtime import pinned

    _end_with(parent)
    with pinned(threads), contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        bench = _Bench(connection, threads)
        while True:
            layer, variants = connection.recv()
            connection.send(bench.measure(layer, variants))


def _end_with(parent: int) -> None:
    """Die when the parent does, even in the middle of a kernel that never returns."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit


@dataclass
class _Built:
    """A variant ready to call; `seconds` of its repeats so far."""

    index: int
    function: Any
    arguments: Arguments
    number: int = 1
    rounds: int = ROUNDS
    seconds: list[float] = field(default_factory=list)


class _Bench:
    """What the other process keeps: TVM's functions, and the data of the last layer."""

    def __init__(self, connection: Connection, threads: int) -> None:
        from topiarist.compiler.runtime import ThreadPool

        self.connection = connection
        self.threads = threads
        self.pool = ThreadPool(threads)
        self._layer: Layer | None = None

    def measure(self, layer: Layer, variants: list[Variant]) -> Batch:
        """All variants that build and are right, timed in turns."""
        self._tell("prepare")
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
            self._tell("run", each.index)
            wrong = self._check(each)
            if wrong is None:
                right.append(each)
            else:
                failed[each.index] = Outcome((), "wrong_result", wrong)
        reference = self.pool.call(lambda: self._time(right)) if right else ()
        timed = {each.index: Outcome(tuple(each.seconds)) for each in right}
        outcomes = failed | timed
        return Batch(tuple(outcomes[i] for i in range(len(variants))), reference)

    def _tell(self, stage: Stage, index: int | None = None) -> None:
        self.connection.send((stage, index))

    def _prepare(self, layer: Layer) -> None:
        """The data of a layer, kept for its next batch."""
        import tvm

        from topiarist.compiler.check import expectation
        from topiarist.compiler.parts import Parts

        same = self._layer is not None and (
            layer.site == self._layer.site and np.array_equal(layer.weight, self._layer.weight)
        )
        if same:
            return
        if self._layer is None or not _same_code(layer.site, self._layer.site):
            self.parts = Parts(layer.site.target, self.threads)
            self.reference = _Built(-1, *reference_kernel(self.parts))
        self._layer = layer
        self.expected = expectation(layer.site, layer.weight, layer.bias)
        tensor = tvm.runtime.tensor
        self.x, self.bias = tensor(self.expected.x), tensor(layer.bias)
        self.y = tensor(self.expected.y_before)
        residual = self.expected.residual
        self.residual = [] if residual is None else [tensor(residual)]

    def _build(self, index: int, variant: Variant) -> _Built | Outcome:
        from topiarist.compiler.measure import taking_turns

        assert self._layer is not None
        site = self._layer.site
        self._tell("build", index)
        try:
            packed = variant.kernel.pack(site, variant.config, self._layer.weight)
            name = self.parts.convolution(variant.kernel, site, variant.config)
            function = self.parts.compiled([name])[name]
        except Exception as error:  # whatever a kernel's author got wrong
            return Outcome((), "build_error", f"{type(error).__name__}: {error}")
        args = [self.x, *packed, self.bias, *self.residual, self.y]
        return _Built(index, function, taking_turns(args))

    def _check(self, built: _Built) -> str | None:
        """Run once on known data; what is wrong with the result, None if nothing is."""
        self.y.copyfrom(self.expected.y_before)
        try:
            self.pool.call(lambda: built.function(*next(built.arguments)))
        except Exception as error:  # as above: arguments that don't fit, say
            return f"{type(error).__name__}: {error}"
        return self.expected.mismatch(self.y.numpy())

    def _time(self, built: list[_Built]) -> tuple[float, ...]:
        """Time all variants in turns; the reference kernel's seconds before each round."""
        for each in (*built, self.reference):
            self._tell("run", max(each.index, 0))
            each.number = max(1, int(SLICE_S / max(_seconds(each, 1), 1e-7)))
            each.seconds = []
        fastest = max(each.number for each in built)
        for each in built:
            each.rounds = ROUNDS if each.number * FAR_BEHIND >= fastest else FEW_ROUNDS
        for i in range(ROUNDS):
            self.reference.seconds.append(_seconds(self.reference, self.reference.number))
            for each in built:
                if i < each.rounds:
                    self._tell("run", each.index)
                    each.seconds.append(_seconds(each, each.number))
        self.reference.seconds.append(_seconds(self.reference, self.reference.number))
        return tuple(self.reference.seconds)


def _same_code(a: ConvSite, b: ConvSite) -> bool:
    """Whether kernels have the same machine code at both sites: zeros don't change it."""
    return a == replace(b, workload=replace(b.workload, sparsity=a.workload.sparsity))


def reference_kernel(parts: Any) -> tuple[Any, Arguments]:
    """A fully connected layer with weights of 512 KiB: a function that never changes, its args."""
    import tvm

    from topiarist.schedules.cpu import linear

    shape = linear.LinearShape(1, 512, 256)
    lanes = parts.target.lanes
    name = parts.function(
        "reference",
        "reference",
        lambda name: linear.dense_linear_prim_func(name, shape, lanes, threads=1),
    )
    random = np.random.default_rng(0)
    sizes = (shape.inputs, shape.inputs * shape.outputs, shape.outputs, shape.outputs)
    args = [tvm.runtime.tensor(random.random(size, np.float32)) for size in sizes]
    return parts.compiled([name])[name], itertools.repeat(args)


def _seconds(built: _Built, number: int) -> float:
    """The mean of so many calls."""
    start = time.perf_counter()
    for _ in range(number):
        built.function(*next(built.arguments))
    return round((time.perf_counter() - start) / number, DIGITS)
