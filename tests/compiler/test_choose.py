"""The contest of kernels: what it records, and what a log spares it."""

from pathlib import Path

import numpy as np
import pytest

from topiarist.compiler.choose import Chooser
from topiarist.compiler.graph import Conv, FloatArray, Graph, Value
from topiarist.compiler.measure import Timer
from topiarist.compiler.parts import Parts
from topiarist.targets.detect import detect
from topiarist.tuning_logs.store import TuningLog


def one_conv(weight: FloatArray) -> Graph:
    """A 3x3 convolution on 14x14 pixels."""
    o, c = weight.shape[:2]
    values = {"x": Value("x", (1, c, 14, 14)), "y": Value("y", (1, o, 14, 14))}
    node = Conv(
        name="conv",
        inputs=("x",),
        output="y",
        weight=weight,
        bias=np.zeros(o, np.float32),
        padding=(1, 1, 1, 1),
    )
    return Graph((node,), values, ("x",), ("y",))


def sparse_weight(density: float) -> FloatArray:
    """Seeded [16, 16, 3, 3]."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((16, 16, 3, 3)) * (random.random((16, 16, 3, 3)) < density)
    return weight.astype(np.float32)


def chooser(graph: Graph, *, dense: bool = False, log: TuningLog | None = None) -> Chooser:
    """A contest on this machine with one thread."""
    parts = Parts(detect(), 1)
    return Chooser(graph, parts, dense=dense, measure=True, log=log, progress=lambda *_: None)


def test_dense_candidates_take_part() -> None:
    choice = chooser(one_conv(sparse_weight(0.1))).plans()[0].choices["conv"]
    assert {c.kernel for c in choice.timed} >= {"direct_sparse", "direct_dense"}
    assert choice.chosen == min(choice.timed, key=lambda c: c.run_us)
    assert "direct_dense" in choice.reason or choice.chosen.kernel == "direct_dense"


def test_dense_builds_leave_the_sparse_kernels_out() -> None:
    choice = chooser(one_conv(sparse_weight(0.1)), dense=True).plans()[0].choices["conv"]
    assert {c.kernel for c in choice.timed} == {"direct_dense"}


def test_a_log_spares_the_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    first = chooser(one_conv(sparse_weight(0.1)), log=TuningLog(log)).plans()
    assert len(list(TuningLog(log).read())) == sum(
        len(plan.choices["conv"].timed) for plan in first
    )

    def no_timing(self: Timer, function: object, args: object) -> tuple[float, ...]:
        return (1.0,)  # moves between layouts are still timed

    monkeypatch.setattr(Timer, "seconds", no_timing)
    second = chooser(one_conv(sparse_weight(0.1)), log=TuningLog(log)).plans()
    # The plans' order may differ: it depends on the moves.
    assert {p.choices["conv"].timed for p in second} == {p.choices["conv"].timed for p in first}


def test_alike_layers_share_a_choice_and_estimates_need_no_timer() -> None:
    graph = one_conv(sparse_weight(0.1))
    parts = Parts(detect(), 1)
    estimating = Chooser(graph, parts, dense=False, measure=False, progress=lambda *_: None)
    choice = estimating.plans()[0].choices["conv"]
    assert not choice.chosen.measured
    assert "by estimate" in choice.reason
