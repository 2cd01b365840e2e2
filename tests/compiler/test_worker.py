"""The process that measures: what goes wrong in it is told, and takes nothing else with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.compiler import bad_kernels
from tests.schedules.kernel_contract import CASES, ConvCase, make_problem
from topiarist.compiler.layer_bench import FEW_ROUNDS, ROUNDS, Here, LayerBench
from topiarist.compiler.worker import (
    Batch,
    Layer,
    Limits,
    Outcome,
    Steady,
    Variant,
    Worker,
)
from topiarist.errors import BuildError
from topiarist.schedules.cpu.kernels import DirectDense, DirectSparse
from topiarist.schedules.kernel import ConvSite
from topiarist.targets import registry
from topiarist.tuning_logs.record import typical_us

LIMITS = Limits(build=2.0, run=2.0)


def layer_of(case: ConvCase) -> Layer:
    spec = registry.get("host")
    problem = make_problem(case, spec.lanes)
    site = ConvSite(problem.workload, problem.views, spec)
    return Layer(site, problem.weight, problem.bias)


def variants_of(layer: Layer, *kernels: DirectDense) -> list[Variant]:
    """Each kernel with its best configuration."""
    return [Variant(kernel, kernel.knobs(layer.site)[0]) for kernel in kernels]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(1, LIMITS) as worker:
        yield worker


@pytest.mark.parametrize("name", ["density_0.3", "in_place", "residual_pointwise", "batch_3"])
def test_right_kernels_are_timed(worker: Worker, name: str) -> None:
    layer = layer_of(CASES[name])
    sparse = DirectSparse()
    variants = [Variant(sparse, config) for config in sparse.knobs(layer.site)[:2]]
    batch = worker.measure(layer, [*variants, *variants_of(layer, DirectDense())])
    assert [outcome.status for outcome in batch.outcomes] == ["ok"] * len(batch.outcomes)
    for outcome in batch.outcomes:
        assert len(outcome.seconds) in (ROUNDS, FEW_ROUNDS)
        assert all(0 < seconds < 1 for seconds in outcome.seconds)
    assert len(batch.reference) == ROUNDS + 1
    assert {o.reference_us for o in batch.outcomes} == {typical_us(batch.reference)}


def test_bad_kernels_are_named_and_the_others_are_timed(worker: Worker) -> None:
    """One batch with everything that can happen; each process that dies is replaced."""
    layer = layer_of(CASES["density_0.3"])
    kernels = (
        DirectDense(),
        bad_kernels.Wrong(),
        bad_kernels.Crashing(),
        bad_kernels.NotANumber(),
        bad_kernels.Hanging(),
        bad_kernels.Unbuildable(),
        bad_kernels.SlowToBuild(),
        DirectDense(),
    )
    batch = worker.measure(layer, variants_of(layer, *kernels))
    statuses = [outcome.status for outcome in batch.outcomes]
    assert statuses == [
        "ok", "wrong_result", "crash", "wrong_result", "timeout", "build_error", "timeout", "ok"
    ]  # fmt: skip
    messages = [outcome.message for outcome in batch.outcomes]
    assert "of the largest value" in messages[1]
    assert "died with SIGSEGV in run" in messages[2]
    assert "not finite" in messages[3]
    assert "no end after 2 s of run" in messages[4]
    assert "there is no such loop" in messages[5]
    assert "no end after 2 s of build" in messages[6]
    assert all(bool(o.seconds) == (o.status == "ok") for o in batch.outcomes)
    assert all(bool(o.seconds) == (o.reference_us is not None) for o in batch.outcomes)


def test_a_process_that_is_killed_is_replaced(worker: Worker) -> None:
    layer = layer_of(CASES["pointwise"])
    variants = variants_of(layer, DirectDense())
    worker.measure(layer, variants)
    assert worker.child.pid is not None
    os.kill(worker.child.pid, signal.SIGKILL)
    worker.child.death()
    batch: Batch = worker.measure(layer, variants)
    assert batch.outcomes[0].status == "ok"


def test_data_that_does_not_fit_is_an_error_of_ours() -> None:
    layer = layer_of(CASES["pointwise"])
    broken = replace(layer, weight=np.zeros((1, 2, 3, 4), np.float32))
    with Worker(1, LIMITS) as worker, pytest.raises(BuildError, match="measures kernels failed"):
        worker.measure(broken, variants_of(layer, DirectDense()))


def test_machine_code_is_kept_for_other_zeros_only() -> None:
    """And its results are checked against those of the new zeros."""
    layer = layer_of(CASES["density_0.3"])
    other = replace(layer.site.workload.sparsity, density=0.15)
    workload = replace(layer.site.workload, sparsity=other)
    weight = layer.weight * (np.random.default_rng(0).random(layer.weight.shape) < 0.5)
    redrawn = Layer(
        replace(layer.site, workload=workload), weight.astype(np.float32), layer.bias + 1
    )
    bench = LayerBench(Here(1), lambda stage, index: None)
    outcomes, parts = [], []
    for each in (layer, redrawn, layer_of(CASES["pointwise"])):
        outcomes += bench.measure(each, variants_of(each, DirectDense(), DirectSparse())).outcomes
        parts.append(bench.parts)
    assert [outcome.status for outcome in outcomes] == ["ok"] * 6
    assert parts[0] is parts[1] is not parts[2]


def test_batches_are_repeated_while_the_machine_is_disturbed() -> None:
    class Invented:
        def __init__(self, *references: float) -> None:
            self.references = list(references)

        def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
            reference = self.references.pop(0)
            return Batch((Outcome((reference,)),), (reference,) if reference else ())

    steady = Steady(Invented(1.0, 1.2, 1.0, 1.3, 1.3, 0))
    layer = layer_of(CASES["pointwise"])
    found = [steady.measure(layer, []) for _ in range(4)]
    assert [drift for _, drift in found] == [1.0, 1.0, 1.3, None]
    assert [outcomes[0].seconds for outcomes, _ in found] == [(1.0,), (1.0,), (1.3,), (0,)]
    assert steady.disturbed == 3


def test_nothing_to_measure() -> None:
    assert Worker(1).measure(layer_of(CASES["pointwise"]), []) == Batch((), ())
