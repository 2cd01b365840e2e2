"""Collecting records with an invented measurer and clock, and once for real."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models import Net
from topiarist.compiler import collect as collecting
from topiarist.compiler.collect import CollectReport, CollectStep, collect
from topiarist.compiler.program import Program
from topiarist.compiler.recorded import Device
from topiarist.compiler.trial import Seconds, Trial
from topiarist.compiler.worker import Batch, Layer, Outcome, Variant, Worker
from topiarist.errors import ModelError
from topiarist.targets import registry
from topiarist.tuning_logs import cost_model, regressions
from topiarist.tuning_logs.record import TuningRecord
from topiarist.tuning_logs.sources import TuningLogs
from topiarist.tuning_logs.store import TuningLog

Price = Callable[[Layer, Variant], float]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small convolutions and a fully connected layer."""
    net = Net()
    x = net.conv(net.input(1, 8, 8, 8), 16, 8, name="first")
    x = net.conv(net.node("Relu", x), 8, 16, 1, name="second")
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    x = net.node("Gemm", x, net.weight(4, 8), net.weight(4), name="fc", transB=1)
    path = tmp_path_factory.mktemp("model") / "two.onnx"
    onnx.save(net.model(x), path)
    return path


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a network takes a microsecond, and nothing is compiled for it."""

    def compare(trial: Trial, programs: list[Program]) -> tuple[list[Seconds], float]:
        return [np.full(len(program.calls), 1e-6) for program in programs], 1e-6

    monkeypatch.setattr(collecting.Trial, "compare_watched", compare)


def by_density(layer: Layer, variant: Variant) -> float:
    density = layer.site.workload.sparsity.density if variant.kernel.sparse else 0.4
    return 10.0 + 100.0 * density


@dataclass
class Invented:
    """Measures by a formula; every batch takes a second of an invented clock."""

    price: Price = by_density
    disturbed: Sequence[int] = ()
    now: float = 0.0
    layers: list[Layer] = field(default_factory=list)

    def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
        self.now += 1.0
        self.layers.append(layer)
        outcomes = []
        for variant in variants:
            us = self.price(layer, variant)
            if math.isfinite(us):
                outcomes.append(Outcome((us * 1e-6,) * 3))
            else:
                outcomes.append(Outcome((), "crash", "died with SIGSEGV in run"))
        scale = 1.5 if len(self.layers) in self.disturbed else 1.0
        return Batch(tuple(outcomes), (1e-5 * scale,) * 3)

    def clock(self) -> float:
        return self.now


def run(
    log: Path,
    measurer: Invented,
    budget_s: float,
    models: Sequence[Path] = (),
    seed: int = 0,
    steps: list[CollectStep] | None = None,
) -> CollectReport:
    return collect(
        *(models, registry.get("host"), TuningLogs(TuningLog(log)), measurer),
        budget_s=budget_s,
        seed=seed,
        clock=measurer.clock,
        progress=None if steps is None else steps.append,
    )


def read(log: Path) -> list[TuningRecord]:
    return list(TuningLog(log).read())


@pytest.mark.usefixtures("still")
def test_one_seed_one_collection(model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / f"{name}.jsonl", Invented(), 20.0, [model], seed)
    a, b, c = ([record.input.key for record in read(tmp_path / f"{name}.jsonl")] for name in "abc")
    assert a == b != c
    assert len({*a}) > 100


@pytest.mark.usefixtures("still")
def test_the_budget_ends_it(model: Path, tmp_path: Path) -> None:
    measurer, steps = Invented(), list[CollectStep]()
    report = run(tmp_path / "log.jsonl", measurer, 9.5, [model], steps=steps)
    assert report.seconds == measurer.now == 10.0
    assert [step.elapsed_s for step in steps] == [*range(1, 11)]
    assert report.records == steps[-1].records == len(read(tmp_path / "log.jsonl"))
    assert run(tmp_path / "log.jsonl", Invented(), 0.0, [model]).records == 0


@pytest.mark.usefixtures("still")
def test_another_run_goes_on_with_other_draws(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    run(log, Invented(), 6.0, [model])
    first = read(log)
    run(log, Invented(), 6.0, [model])
    both = read(log)
    assert both[: len(first)] == first
    old, new = ({r.input.key for r in part} for part in (first, both[len(first) :]))
    assert len(new - old) > 0.5 * len(new)


@pytest.mark.usefixtures("still")
def test_what_was_measured_before_a_stop_is_in_the_log(model: Path, tmp_path: Path) -> None:
    def stop(layer: Layer, variant: Variant) -> float:
        if measurer.now > 3:
            raise KeyboardInterrupt
        return by_density(layer, variant)

    measurer = Invented(stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "log.jsonl", measurer, 60.0, [model])
    assert len(read(tmp_path / "log.jsonl")) == 3 * collecting.BATCH


@pytest.mark.usefixtures("still")
def test_a_kernel_that_fails_is_recorded(model: Path, tmp_path: Path) -> None:
    def price(layer: Layer, variant: Variant) -> float:
        return math.inf if variant.kernel.sparse else 50.0

    log = tmp_path / "log.jsonl"
    run(log, Invented(price), 20.0, [model])
    failed = [record for record in read(log) if record.status == "crash"]
    assert failed and all(record.message == "died with SIGSEGV in run" for record in failed)
    assert all(record.drift is None for record in failed)
    assert {r.input.kernel for r in read(log) if r.status == "ok"} >= {"direct_dense"}


@pytest.mark.usefixtures("still")
def test_a_disturbed_batch_is_repeated_and_then_marked(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    report = run(log, Invented(disturbed=(3, 5, 6)), 8.0, [model])
    assert report.disturbed == 3
    assert sum(record.disturbed for record in read(log)) == collecting.BATCH


@pytest.mark.usefixtures("still")
def test_every_draw_has_other_zeros_and_dense_and_sparse_kernels(
    model: Path, tmp_path: Path
) -> None:
    measurer = Invented()
    run(tmp_path / "log.jsonl", measurer, 16.0, [model])
    workloads = {layer.site.workload for layer in measurer.layers}
    assert len({workload.sparsity for workload in workloads}) > 5
    assert {len(layer.weight.shape) for layer in measurer.layers} == {4}
    sites = {layer.site.workload.key for layer in measurer.layers}
    kernels: dict[str, set[str]] = {key: set() for key in sites}
    for record in read(tmp_path / "log.jsonl"):
        if record.measured == "alone":
            kernels[record.input.workload_key].add(record.input.kernel)
    dense = {"direct_dense", "winograd_dense"}
    assert all(found & dense for found in kernels.values())
    assert any(found - dense for found in kernels.values())


@pytest.mark.usefixtures("still")
def test_every_third_draw_is_timed_as_a_network(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    run(log, Invented(), 17.0, [model])  # two layers with eight redraws
    run(log, Invented(), 33.0, [model])
    found = [record for record in read(log) if record.measured == "in network"]
    kernels = {record.input.kernel for record in found}
    assert {"dense_linear", "sparse_linear", "direct_dense"} <= kernels
    densities = {r.input.sparsity["density"] for r in found if r.input.kernel == "sparse_linear"}
    assert len(densities) > 3
    assert any(record.input.workload.get("kind") not in (None, "linear") for record in found)


@pytest.mark.usefixtures("still")
def test_what_the_model_gets_wrong_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in regressions.ROUNDS:
        monkeypatch.setitem(regressions.ROUNDS, name, 10)
    for name, value in (("LEAST_TO_TRAIN", 100), ("RETRAIN_EVERY", 1), ("REDRAWS", 2)):
        monkeypatch.setattr(collecting, name, value)
    asked = []
    chain = collecting.chain

    def remember(random: np.random.Generator, hard: Sequence[collecting.Geometry]) -> object:
        asked.append(list(hard))
        return chain(random, hard)

    monkeypatch.setattr(collecting, "chain", remember)
    steps = list[CollectStep]()
    run(tmp_path / "log.jsonl", Invented(), 50.0, steps=steps)
    assert asked[0] == []
    assert asked[-1] and all(layer.reasonable for layer in asked[-1])
    assert steps[0].error is None and steps[-1].error is not None


@pytest.mark.usefixtures("still")
def test_records_of_old_kernels_do_no_harm(model: Path, tmp_path: Path) -> None:
    """They are neither learned from nor taken for what is known."""
    log = tmp_path / "log.jsonl"
    run(log, Invented(), 3.0, [model])
    (what, *_) = (record.input for record in read(log))
    old = collecting.MeasureInput(**{**vars_of(what), "kernel_version": 99})
    TuningLog(log).append([TuningRecord(old, (1e-3,))])
    before = len(read(log))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collecting, "LEAST_TO_TRAIN", 10)
        patch.setattr(cost_model, "LEAST", 10)
        patch.setattr(regressions, "FEWEST", 4)
        run(log, Invented(), 3.0, [model])
    assert len(read(log)) > before


def vars_of(what: collecting.MeasureInput) -> dict[str, object]:
    return {name: getattr(what, name) for name in what.__dataclass_fields__}


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none"):
        run(tmp_path / "log.jsonl", Invented(), 5.0, [tmp_path / "none.onnx"])
    assert not (tmp_path / "log.jsonl").exists()


def test_a_real_collection(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers, all that is measured once: two draws alone, one as a network."""
    for name, value in (("REDRAWS", 1), ("SITES", 1), ("BATCH", 2), ("PROGRAMS", 2)):
        monkeypatch.setattr(collecting, name, value)
    monkeypatch.setattr("topiarist.compiler.trial.BUDGET_S", 0.05)
    log, spec = tmp_path / "log.jsonl", registry.get("host")

    def enough(step: CollectStep) -> None:
        if step.draws == 2:
            raise KeyboardInterrupt

    with Worker(1) as worker, pytest.raises(KeyboardInterrupt):
        collect([model], spec, TuningLogs(TuningLog(log)), worker, budget_s=300, progress=enough)
    found = read(log)
    assert {record.measured for record in found} == {"alone", "in network"}
    assert all(record.status == "ok" and record.run_us > 0 for record in found)
    assert {record.input.target for record in found} == {Device.here(spec, 1).key}
    assert all(record.drift is not None for record in found if record.measured == "alone")
    # The reference kernel takes microseconds, in either place: milliseconds on no machine.
    assert all(0.1 < (record.reference_us or 0.0) < 1000 for record in found)
