"""The tuner with an invented measurer and clock, and once for real."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.benchmarks import bench_kills
from tests.models import Net
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.parts import Parts
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.recorded import Device, Recorded
from topiarist.compiler.simplify import simplify
from topiarist.compiler.tune import (
    BATCH,
    Task,
    TuneOptions,
    Tuner,
    TuneStep,
    contradicted,
    find_tasks,
    tune_model,
)
from topiarist.compiler.worker import Batch, Layer, Outcome, Variant, Worker
from topiarist.errors import MissingRecordsError, ModelError
from topiarist.pruning.one_shot import prune_model
from topiarist.schedules.kernels import conv_kernel
from topiarist.targets import registry
from topiarist.tuning_logs.record import MeasureInput, Status, TuningRecord
from topiarist.tuning_logs.sources import TuningLogs
from topiarist.tuning_logs.store import TuningLog

Price = Callable[[Variant], float]


def two_convs(path: Path) -> Path:
    """A small network: two convolutions of 90 % zeros and a fully connected layer."""
    net = Net(seed=3)
    x = net.conv(net.input(1, 16, 16, 16), 16, 16, name="first")
    x = net.conv(net.node("Relu", x), 32, 16, 1, name="second")
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    x = net.node("Gemm", x, net.weight(10, 32), net.weight(10), name="fc", transB=1)
    densities = {"first": 0.1, "second": 0.1}
    onnx.save(prune_model(net.model(x), density=0.1, layer_density=densities)[0], path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_convs(tmp_path_factory.mktemp("model") / "two.onnx")


@dataclass
class Invented:
    """Measures by a formula; every batch takes a second of an invented clock."""

    price: Price
    reference: Sequence[float] = ()
    now: float = 0.0
    seen: list[str] = field(default_factory=list)
    batches: int = 0

    def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
        self.now += 1.0
        self.batches += 1
        self.seen += [name_of(layer, variant) for variant in variants]
        outcomes = []
        for variant in variants:
            us = self.price(variant)
            status: Status = "ok" if math.isfinite(us) else "crash"
            message = "" if status == "ok" else "the process died with SIGSEGV in run"
            seconds = (us * 1e-6,) * 3 if status == "ok" else ()
            outcomes.append(Outcome(seconds, status, message))
        scale = 1.5 if self.batches in self.reference else 1.0
        return Batch(tuple(outcomes), (1e-5 * scale,) * 3)

    def clock(self) -> float:
        return self.now


def name_of(layer: Layer, variant: Variant) -> str:
    """What was measured, and where."""
    site = layer.site
    place = f"{site.workload.key} {site.views.x.layout} {site.views.y.layout}"
    return f"{place} {variant.kernel.name} {variant.config}"


def by_size(variant: Variant) -> float:
    """Large tiles of the sparse kernel are the fastest."""
    knobs = vars(variant.config)
    size = knobs.get("rows", 1) * knobs.get("cols", 1)
    return 100.0 / size + (0 if variant.kernel.sparse else 200)


def make_tuner(
    model: Path,
    log: Path,
    measurer: Invented,
    options: TuneOptions,
    steps: list[TuneStep] | None = None,
    budget: float = math.inf,
) -> Tuner:
    graph = simplify(extract_layers(import_model(model)))
    spec = registry.get("host")
    logs = TuningLogs(TuningLog(log))
    recorded = Recorded(logs, Device.here(spec, 1))
    tasks, layouts = find_tasks(graph, Parts(spec, 1), recorded, options)
    return Tuner(
        *(tasks, layouts, logs, measurer, options),
        deadline=budget,
        clock=measurer.clock,
        progress=(lambda step: None) if steps is None else steps.append,
    )


def best_of(tuner: Tuner) -> dict[str, tuple[str, str]]:
    return {
        task.names[0]: (task.best.kernel, str(task.best.config))
        for task in tuner.tasks
        if task.best
    }


def test_trials_are_counted_by_layer_and_layout(model: Path, tmp_path: Path) -> None:
    measurer = Invented(by_size)
    tuner = make_tuner(model, tmp_path / "log.jsonl", measurer, TuneOptions(trials=12))
    assert tuner.run()
    known = [len(task.strategy.taken) for task in tuner.tasks]
    assert set(known) <= {BATCH, 12}  # layouts that are far behind are left after a batch
    assert 12 in known
    assert sum(known) == tuner.measured == len(set(measurer.seen)) == len(measurer.seen)
    records = list(TuningLog(tmp_path / "log.jsonl").read())
    assert len(records) == tuner.measured
    assert {record.drift for record in records} == {1.0}


def test_all_layouts_are_tried(model: Path, tmp_path: Path) -> None:
    """Even if the time is over long before anything has converged."""
    tuner = make_tuner(model, tmp_path / "l.jsonl", Invented(by_size), TuneOptions(), budget=1e3)
    for _ in tuner.tasks:
        task = tuner._next()
        assert task is not None and not task.strategy.taken
        tuner.measure(task, task.strategy.propose(1))
    assert tuner.layouts > 1
    assert all(math.isfinite(total) for total in tuner.totals())


@pytest.mark.parametrize("strategy", ["model", "random", "evolution"])
def test_one_seed_one_order(model: Path, tmp_path: Path, strategy: str) -> None:
    orders = []
    for i, seed in enumerate((1, 1, 2)):
        measurer = Invented(by_size)
        options = TuneOptions(trials=16, strategy=strategy, seed=seed)  # type: ignore[arg-type]
        make_tuner(model, tmp_path / f"{i}.jsonl", measurer, options).run()
        orders.append(measurer.seen)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_what_the_log_has_is_not_measured_again(model: Path, tmp_path: Path) -> None:
    log, options = tmp_path / "log.jsonl", TuneOptions(trials=16)
    first = make_tuner(model, log, Invented(by_size), options)
    first.run()
    second = make_tuner(model, log, again := Invented(by_size), options)
    assert second.run() and not again.seen
    assert second.reused == first.measured
    assert best_of(second) == best_of(first)
    more = make_tuner(model, log, further := Invented(by_size), TuneOptions(trials=20))
    more.run()
    assert len(further.seen) > 0 and more.measured + more.reused <= 20 * len(more.tasks)


def test_a_tuner_that_is_stopped_goes_on(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"

    class Stopped(Exception):
        pass

    def stop(variant: Variant) -> float:
        if next(counter) > 2 * BATCH:
            raise Stopped
        return by_size(variant)

    counter = itertools.count()
    with pytest.raises(Stopped):
        make_tuner(model, log, Invented(stop), TuneOptions(trials=16)).run()
    assert len(list(TuningLog(log).read())) == 2 * BATCH
    resumed = make_tuner(model, log, measurer := Invented(by_size), TuneOptions(trials=16))
    assert resumed.reused == 2 * BATCH
    assert resumed.run()
    assert resumed.measured == len(measurer.seen)


def test_the_budget_ends_the_search(model: Path, tmp_path: Path) -> None:
    measurer = Invented(by_size)
    steps: list[TuneStep] = []
    tuner = make_tuner(model, tmp_path / "l.jsonl", measurer, TuneOptions(), steps, budget=3.0)
    assert not tuner.run()
    assert measurer.batches == 3
    assert [step.eta_s for step in steps] == [2.0, 1.0, 0.0]
    assert steps[0].best is not None and steps[0].layer


def test_without_a_budget_the_search_ends_when_nothing_is_gained(
    model: Path, tmp_path: Path
) -> None:
    tuner = make_tuner(model, tmp_path / "l.jsonl", Invented(by_size), TuneOptions())
    assert tuner.run()
    assert tuner.measured < sum(len(task.variants) for task in tuner.tasks)
    for task in tuner.tasks:
        if len(task.strategy.taken) >= 32:
            best = min(by_size(variant) for variant in task.variants)
            assert task.best_us <= 1.05 * best


def test_what_fails_is_recorded_and_never_chosen(model: Path, tmp_path: Path) -> None:
    def price(variant: Variant) -> float:
        return math.inf if variant.kernel.sparse else by_size(variant)

    log = tmp_path / "log.jsonl"
    tuner = make_tuner(model, log, Invented(price), TuneOptions(trials=16))
    tuner.run()
    assert not any(conv_kernel(kernel).sparse for kernel, _ in best_of(tuner).values())
    crashed = [record for record in TuningLog(log).read() if record.status == "crash"]
    assert len(crashed) == tuner.failed["crash"] > 0
    assert all("SIGSEGV" in record.message for record in crashed)


def test_a_disturbed_batch_is_repeated_and_then_marked(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    measurer = Invented(by_size, reference=(3, 5, 6))
    tuner = make_tuner(model, log, measurer, TuneOptions(trials=24), budget=6.0)
    tuner.run()
    assert tuner.steady.disturbed == 3
    marked = [record for record in TuningLog(log).read() if record.disturbed]
    assert len(marked) == BATCH  # of batches 5 and 6; 4 was a success
    again = make_tuner(model, log, Invented(by_size), TuneOptions(trials=24))
    assert again.reused == tuner.measured - BATCH


def test_what_contradicts_an_earlier_record_is_measured_again(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    tuner = make_tuner(model, log, Invented(by_size), TuneOptions(trials=8))
    tuner.run()
    task = tuner.tasks[0]
    index = min(task.strategy.taken, key=lambda i: (task.strategy.taken[i], i))
    other = TuningRecord(task.whats[index], (task.best_us * 0.5e-6,) * 3)
    TuningLog(log).append([other])
    second = make_tuner(model, log, measurer := Invented(by_size), TuneOptions(trials=8))
    assert second.tasks[0].best_us < task.best_us
    second.run()
    second.confirm()
    assert measurer.seen == [name_of(task.layer, task.variants[index])]
    assert second.tasks[0].best_us == pytest.approx(task.best_us)
    third = make_tuner(model, log, Invented(by_size), TuneOptions(trials=8))
    third.confirm()
    assert third.measured == 0


def test_contradictions() -> None:
    def history(*times: float) -> list[TuningRecord]:
        spec = registry.get("x86-avx2")
        key = Device.named(spec, 1).key
        what = MeasureInput(
            *({"kind": "x"}, "k", 1, {}, "plain", "plain", "none", key),
            {"topiarist": "1", "apache-tvm": "1", "apache-tvm-ffi": "1"},
        )
        return [TuningRecord(what, (us * 1e-6,)) for us in times]

    assert not contradicted([])
    assert not contradicted(history(100))
    assert not contradicted(history(100, 110))
    assert contradicted(history(100, 130))
    assert not contradicted(history(100, 130, 128))
    assert not contradicted(history(100, 130, 102))
    assert contradicted(history(100, 130, 200))


def test_layers_by_name(model: Path, tmp_path: Path) -> None:
    options = TuneOptions(trials=8, layers=("second",))
    tuner = make_tuner(model, tmp_path / "log.jsonl", Invented(by_size), options)
    assert {name for task in tuner.tasks for name in task.names} == {"second"}
    with pytest.raises(ModelError, match=r"no convolution is called nobody"):
        make_tuner(model, tmp_path / "l.jsonl", Invented(by_size), TuneOptions(layers=("nobody",)))


def test_a_task_knows_its_best(model: Path, tmp_path: Path) -> None:
    tuner = make_tuner(model, tmp_path / "l.jsonl", Invented(by_size), TuneOptions())
    task: Task = tuner.tasks[0]
    assert task.best is None and task.best_us == math.inf
    task.observe(0, math.inf)
    assert task.best is None and task.failed == 1
    task.observe(1, 5.0)
    assert task.best is not None and task.best.run_us == 5.0
    assert np.isfinite(task.best_us)


def test_killed_tuners_lose_nothing_that_was_finished(tmp_path: Path) -> None:
    """A small version of `tests/benchmarks/bench_kills.py`, which kills a thousand."""
    counts = bench_kills.run(12, tmp_path)
    assert counts["kills"] == 12
    assert counts["lost"] == counts["broken"] == 0
    assert counts["records"] >= counts["finished"]


@pytest.mark.usefixtures("steady_machine")
def test_tuned_once_compiled_without_measuring(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing: tune, tune again, compile from the log as the tuner decided."""
    log, spec = tmp_path / "log.jsonl", registry.get("host")
    options = TuneOptions(trials=9)
    with pytest.raises(MissingRecordsError, match="there is no tuning log"):
        compile_model(model, log=log, strict=True)
    log.touch()
    with pytest.raises(MissingRecordsError, match=r"3 layer.*first, second"):
        compile_model(model, log=log, strict=True)
    with Worker(1) as worker:
        first = tune_model(model, spec, TuningLogs(TuningLog(log)), worker, options)
        lines = log.read_bytes()
        again = tune_model(model, spec, TuningLogs(TuningLog(log)), worker, options)
    assert first.measured and first.finished and first.network_us
    assert again.measured == 0 and log.read_bytes() == lines
    assert again.network_us == first.network_us

    def never(*args: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr("topiarist.compiler.choose.Chooser._seconds", never)
    monkeypatch.setattr("topiarist.compiler.trial.Trial.compare", never)
    strict = compile_model(model, log=log, strict=True)
    usual = compile_model(model, log=log)
    assert [c.kernel for c in usual.layers] == [c.kernel for c in strict.layers]
    assert [c.config for c in usual.layers] == [c.config for c in strict.layers]
    convs = {c.layer: c for c in strict.layers if c.kind == "conv"}
    for tuned in first.layers:
        for name in tuned.layers if tuned.chosen else ():
            assert convs[name].run_us and tuned.run_us
    assert log.read_bytes() == lines
    assert "in the log, in network" in strict.layers[0].reason
