"""Benchmarks, by an invented clock that only the engines move."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from topiarist.compiler import bench as benchmarks
from topiarist.compiler.bench import bench, find_model, ratio_interval, time_in_turns
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.engines import Engine
from topiarist.errors import ModelError, TopiaristError


class Machine:
    """A clock, and engines that take their time on it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.calls.append("|")

    def engine(self, name: str, seconds: float) -> Engine:
        def run() -> None:
            self.now += seconds
            self.calls.append(name)

        return Engine(name, 1, "1.0", run)

    def measure(
        self, *contestants: Engine, seconds: float = 1.0, rounds: int | None = None
    ) -> dict[str, list[float]]:
        return time_in_turns(
            contestants, seconds=seconds, rounds=rounds, clock=self.clock, sleep=self.sleep
        )


def test_turns_rotate() -> None:
    machine = Machine()
    machine.measure(machine.engine("a", 0.1), machine.engine("b", 0.2), rounds=2)
    warm_up, *turns = "".join(machine.calls).split("|")
    assert warm_up == "aaabbb"
    assert turns == ["aa", "bb", "bb", "aa"]  # each an untimed run and a timed one


def test_times_are_of_one_run() -> None:
    machine = Machine()
    samples = machine.measure(machine.engine("a", 0.0003), machine.engine("b", 0.01), rounds=3)
    assert samples["a"] == pytest.approx([0.0003] * 3)
    assert samples["b"] == pytest.approx([0.01] * 3)
    assert "a" * 8 in "".join(machine.calls)  # quick: timed over 7 runs together


def test_measures_for_the_time_given() -> None:
    machine = Machine()
    samples = machine.measure(machine.engine("a", 0.01), seconds=10)
    assert 10 <= machine.now < 10.1
    assert len(samples["a"]) > 400


def test_slow_engines_get_a_few_rounds_all_the_same() -> None:
    machine = Machine()
    samples = machine.measure(machine.engine("a", 100.0), seconds=1)
    assert len(samples["a"]) == benchmarks.MIN_ROUNDS


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, None), (-1.0, None), (1.0, 0)])
def test_nothing_to_measure(seconds: float, rounds: int | None) -> None:
    machine = Machine()
    with pytest.raises(ValueError, match="must be positive"):
        machine.measure(machine.engine("a", 1.0), seconds=seconds, rounds=rounds)


def test_a_slow_machine_for_a_while_leaves_the_ratio() -> None:
    load = [1.0] * 10 + [5.0] * 20 + [1.0] * 10
    ratio = ratio_interval([3.0 * f for f in load], [1.0 * f for f in load])
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("count", "low", "high"), [(1, 0, 0), (5, 0, 4), (6, 0, 5), (9, 1, 7), (20, 5, 14)]
)
def test_interval_by_the_tables(count: int, low: int, high: int) -> None:
    ratio = ratio_interval([float(v) for v in range(count)], [1.0] * count)
    assert (ratio.low, ratio.high) == (low, high)


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = random.Random(0)
    draws = [
        ratio_interval([rng.lognormvariate(0, 1) for _ in range(30)], [1.0] * 30)
        for _ in range(1000)
    ]
    assert 0.94 <= sum(r.low <= 1.0 <= r.high for r in draws) / 1000 <= 0.99


def test_against_onnxruntime(tiny_bundle: Path) -> None:
    result = bench(tiny_bundle, threads=1, runs=3)
    assert list(result.engines) == ["topiarist", "ort"]
    document = json.loads(json.dumps(result.to_json()))
    assert document["ratio"]["ort"]["median"] > 0
    ours = document["engines"]["topiarist"]
    assert (ours["runs"], ours["threads"]) == (3, 1)
    assert 0 < ours["p10_ms"] <= ours["median_ms"] <= ours["p90_ms"]


def test_against_nothing(tiny_bundle: Path, tiny_onnx: Path) -> None:
    tiny_onnx.unlink()
    result = bench(tiny_bundle, against=(), runs=2)
    assert (list(result.engines), result.ratio) == (["topiarist"], {})


def test_unknown_engine(tiny_bundle: Path) -> None:
    with pytest.raises(ValueError, match=r"no engine 'tpu'.*ort, openvino"):
        bench(tiny_bundle, against=["ort", "tpu"])


def test_openvino_is_asked_for_only_when_named(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    bench(tiny_bundle, runs=1)
    with pytest.raises(TopiaristError, match=r"pip install topiarist\[bench\]"):
        bench(tiny_bundle, against=["openvino"], runs=1)


def test_against_openvino(tiny_bundle: Path) -> None:
    pytest.importorskip("openvino")
    assert bench(tiny_bundle, against=["openvino"], runs=1).ratio["openvino"].median > 0


def test_the_model_that_was_compiled(tiny_bundle: Path, tiny_onnx: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert find_model(manifest, None) == tiny_onnx
    assert find_model(manifest, Path("other.onnx")) == Path("other.onnx")
    tiny_onnx.write_bytes(tiny_onnx.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="has changed"):
        find_model(manifest, None)
    tiny_onnx.unlink()
    with pytest.raises(ModelError, match="is gone; name it with --model"):
        find_model(manifest, None)
