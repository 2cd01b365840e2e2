"""Candidates are built, checked and timed in a process of their own.

A candidate that hangs is ended after a while, one that crashes takes only that process with it, and
one that computes something else than the reference is found before it is timed. What a GPU can't
launch or finish counts as a crash: its process can't use the GPU any more. The repeats of a batch's
candidates are interleaved, and a reference kernel is timed before each round, so that a disturbed
machine shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.child import Child, end_with
from topiarist.errors import BuildError, GpuError
from topiarist.schedules.kernel import ConvKernel, ConvSite, KernelConfig
from topiarist.targets import gpu_state
from topiarist.targets.gpu_state import GpuState
from topiarist.tuning_logs.record import (
    DRIFT_LIMIT,
    MeasureInput,
    Status,
    TuningRecord,
    typical_us,
)

Stage = Literal["start", "prepare", "build", "run"]

RETRIES = 1  # of a batch that the machine was disturbed in


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
    """Every repeat in seconds, or what went wrong; what a GPU ran with, and the machine's speed.

    `reference_us` is what the reference kernel took meanwhile, see `TuningRecord`.
    """

    seconds: tuple[float, ...] = ()
    status: Status = "ok"
    message: str = ""
    gpu: GpuState | None = None
    reference_us: float | None = None


def record_of(what: MeasureInput, outcome: Outcome, drift: float | None) -> TuningRecord:
    """What a measurement says."""
    drift = drift if outcome.status == "ok" else None
    return TuningRecord(
        what,
        outcome.seconds,
        status=outcome.status,
        message=outcome.message,
        drift=drift,
        gpu=outcome.gpu,
        reference_us=outcome.reference_us,
    )


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
        self.child = Child(serve, (threads,))

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self.child.close()

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
        """The batch, or which variant ended the process and how.

        Raises BuildError where it was none of them.
        """
        stage: Stage = "start"
        at: int | None = None
        try:
            self.child.send((layer, variants))
            while True:
                reply = self.child.receive(getattr(self.limits, stage))
                if isinstance(reply, Batch):
                    return reply
                if isinstance(reply, Outcome):  # the GPU failed
                    outcome = reply
                    break
                stage, at = reply
        except TimeoutError:
            limit = getattr(self.limits, stage)
            outcome = Outcome((), "timeout", f"no end after {limit:g} s of {stage}")
        except (EOFError, ConnectionError):
            how = self.child.death()
            outcome = Outcome((), "crash", f"the process died with {how} in {stage}")
        self.close()
        if at is None:
            raise BuildError(
                f"the process that measures kernels failed ({outcome.message}); "
                "is there enough memory?"
            )
        return at, outcome


def serve(connection: Connection, threads: int, parent: int) -> None:
    """The other process: answers batches until nobody asks any more, or its GPU fails."""
    from topiarist.compiler.gpu_machine import machine_of
    from topiarist.compiler.layer_bench import LayerBench
    from topiarist.compiler.runtime import pinned

    end_with(parent)
    bench: LayerBench | None = None
    with pinned(threads), contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            layer, variants = connection.recv()
            try:
                if bench is None:
                    machine = machine_of(layer.site.target, threads)
                    bench = LayerBench(machine, lambda *stage: connection.send(stage))
                batch = bench.measure(layer, variants)
            except GpuError as error:
                connection.send(Outcome((), "crash", str(error)))
                return
            if layer.site.target.gpu is not None:
                batch = _with_state(batch, gpu_state.read())
            connection.send(batch)


def _with_state(batch: Batch, state: GpuState) -> Batch:
    return replace(batch, outcomes=tuple(replace(o, gpu=state) for o in batch.outcomes))
