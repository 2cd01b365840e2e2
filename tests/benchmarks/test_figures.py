"""How figures are made of times, without timing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.benchmarks import bench_x86, cases, layers, measure, process
from tests.benchmarks.measure import CaseResult, Figure
from topiarist.compiler.bench import Ratio
from topiarist.compiler.graph import Conv, Graph, Value


def test_the_best_engine_is_the_one_with_the_lower_median() -> None:
    """Over the whole run, not in each round."""
    samples = {"ours": [1.0] * 9, "a": [2.0, 9.0, 9.0] * 3, "b": [3.0] * 9}
    assert measure.over_best(samples, "ours", ["a", "b"]).median == 3.0


def test_geomean_of_ratios() -> None:
    """Of the medians, and of both ends."""
    mean = measure.geomean([Ratio(2.0, 1.0, 4.0), Ratio(8.0, 4.0, 9.0)])
    assert (mean.median, mean.low, mean.high) == pytest.approx((4.0, 2.0, 6.0))


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([4.0, 2.0, 0.5], pytest.approx(np.sqrt(0.2 * 0.4))),
        ([4.0, 2.0, 1.5], 0.4),
        ([0.9, 0.8, 0.5], None),
        ([4.0, 1.0, 0.5], pytest.approx(0.2)),
    ],
)
def test_crossing(speedups: list[float], expected: Any) -> None:
    """Between two densities, at an end, or nowhere."""
    assert layers.crossing((0.1, 0.2, 0.4), speedups) == expected


def test_kinds_of_kernels() -> None:
    """Every kernel is of one kind."""
    assert layers.is_sparse("direct_sparse") and not layers.is_sparse("direct_dense")
    assert layers.is_direct_dense("direct_dense") and not layers.is_direct_dense("block_sparse")


def test_verdicts() -> None:
    """The highest bar that is reached; memory's is one from below."""

    def verdict(value: float | None, at_most: bool = False) -> str:
        figure = Figure("what", 2, 3, value, at_most=at_most)
        return bench_x86._verdict(vars(figure))

    assert [verdict(v) for v in (1.9, 2.0, 3.1, None)] == ["below", "at least", "aim", ""]
    assert verdict(1.9, at_most=True) == "aim" and verdict(3.5, at_most=True) == "below"


def test_largest_pair() -> None:
    """Bytes of input and output of the largest layer."""
    values = {
        name: Value(name, (1, 2, size, size)) for name, size in zip("abc", (4, 8, 4), strict=True)
    }
    nodes = tuple(
        Conv(
            name=f"{x}{y}",
            inputs=(x,),
            output=y,
            weight=np.zeros((2, 2, 1, 1), np.float32),
            bias=np.zeros(2, np.float32),
        )
        for x, y in ("ab", "bc")
    )
    assert process.largest_pair(Graph(nodes, values, ("a",), ("c",))) == 4 * 2 * (64 + 16)


def test_a_case_that_was_measured_is_only_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumable: the file of a case is enough."""
    measured: list[str] = []

    def case(seconds: float) -> CaseResult:
        measured.append("case")
        return CaseResult((Figure("made up", 1, 2, 1.5, 1.4, 1.6),), {"seconds": seconds})

    monkeypatch.setattr(bench_x86, "CASES", {"case": case})
    monkeypatch.setattr(bench_x86, "_measure", lambda name, s, _: bench_x86.measured(name, s))
    arguments = ["bench_x86", "--out", str(tmp_path), "--only", "case", "--seconds", "3"]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", [*arguments, "--json", str(tmp_path / "all.json")])
        bench_x86.main()
        assert "1.50x (1.40 - 1.60)" in capsys.readouterr().out
    assert measured == ["case"]
    (result,) = json.loads((tmp_path / "all.json").read_text())["cases"]
    assert result["details"] == {"seconds": 3.0}
    assert {"machine", "versions", "commit", "against"} <= set(result)


def test_all_cases_have_a_name_and_bars() -> None:
    """Those of the issue's table and what goes with them."""
    assert {"resnet50", "vgg16", "mobilenet_v1", "alexnet", "layers", "threads"} <= set(cases.CASES)


def test_the_table_names_its_setting() -> None:
    """Machine, commit and engines stand above it."""
    result = {
        "machine": {"cpu": "A CPU"},
        "commit": "0123456789abcdef",
        "against": ["ort"],
        "figures": [vars(Figure("w", None, None, None))],
    }
    console = Console(width=120)
    with console.capture() as shown:
        console.print(bench_x86.table([result]))
    assert "A CPU, commit 0123456789ab, against ort" in shown.get()
    assert "not measured" in shown.get()
