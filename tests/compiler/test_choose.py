"""The contest of kernels: what it records, and what a log spares it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from topiarist.compiler.choose import MAX_ERROR, Chooser, Mode
from topiarist.compiler.graph import Conv, FloatArray, Graph, Value
from topiarist.compiler.measure import Timer
from topiarist.compiler.parts import Parts
from topiarist.compiler.predictor import Predictor
from topiarist.compiler.recorded import Device, Recorded
from topiarist.errors import MissingRecordsError
from topiarist.schedules.kernels import conv_kernel
from topiarist.targets.detect import detect
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.record import MeasureInput
from topiarist.tuning_logs.sources import TuningLogs
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


def chooser(
    graph: Graph,
    *,
    dense: bool = False,
    log: Path | None = None,
    mode: Mode = "measure",
    max_error: float = MAX_ERROR,
    predictor: Predictor | None = None,
) -> Chooser:
    """A contest on this machine with one thread."""
    spec = detect()
    recorded = None
    if log is not None:
        recorded = Recorded(TuningLogs(TuningLog(log)), Device.here(spec, 1), adds=True)
    return Chooser(
        *(graph, Parts(spec, 1)),
        dense=dense,
        predictor=predictor,
        mode=mode,
        recorded=recorded,
        max_error=max_error,
        progress=lambda *_: None,
    )


def test_dense_candidates_take_part() -> None:
    choice = chooser(one_conv(sparse_weight(0.1))).plans()[0].choices["conv"]
    assert {c.kernel for c in choice.timed} >= {"direct_sparse", "direct_dense"}
    assert choice.chosen == min(choice.timed, key=lambda c: c.run_us)
    assert "direct_dense" in choice.reason or choice.chosen.kernel == "direct_dense"


def test_dense_builds_leave_the_sparse_kernels_out() -> None:
    choice = chooser(one_conv(sparse_weight(0.1)), dense=True).plans()[0].choices["conv"]
    assert choice.timed and not any(conv_kernel(c.kernel).sparse for c in choice.timed)


@pytest.mark.parametrize(
    ("max_error", "kernels"),
    [(0.0, {"direct_dense"}), (2e-6, {"direct_dense", "winograd_dense"})],
)
def test_inexact_kernels_keep_to_the_error_budget(max_error: float, kernels: set[str]) -> None:
    """Of one layer, the whole budget is its own: enough for F(2x2) but not for F(4x4)."""
    plan = chooser(
        one_conv(sparse_weight(1.0)), dense=True, mode="estimate", max_error=max_error
    ).plans()[0]
    timed = plan.choices["conv"].timed
    assert {c.kernel for c in timed} == kernels
    for candidate in timed:
        kernel = conv_kernel(candidate.kernel)
        assert kernel.added_error(plan.workloads["conv"], candidate.config) <= max_error


def test_a_log_spares_the_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    first = chooser(one_conv(sparse_weight(0.1)), log=log).plans()
    assert len(list(TuningLog(log).read())) == sum(
        len(plan.choices["conv"].timed) for plan in first
    )

    def no_timing(self: Timer, function: object, args: object) -> tuple[float, ...]:
        return (1.0,)  # moves between layouts are still timed

    monkeypatch.setattr(Timer, "seconds", no_timing)
    second = chooser(one_conv(sparse_weight(0.1)), log=log).plans()
    # The plans' order may differ: it depends on the moves.
    assert {p.choices["conv"].timed for p in second} == {p.choices["conv"].timed for p in first}


def test_about_the_same_density_finds_the_records(tmp_path: Path) -> None:
    """Within two points; and without any records a strict choice names the layer."""
    log = tmp_path / "log.jsonl"
    with pytest.raises(MissingRecordsError, match=r"no record for 1 layer\(s\).*: conv\. Tune"):
        chooser(one_conv(sparse_weight(0.1)), log=log, mode="strict").plans()
    first = chooser(one_conv(sparse_weight(0.1)), log=log).plans()
    near = chooser(one_conv(sparse_weight(0.115)), log=log, mode="strict").plans()
    assert {p.choices["conv"].chosen for p in near} == {p.choices["conv"].chosen for p in first}
    assert "in the log, alone" in near[0].choices["conv"].reason
    with pytest.raises(MissingRecordsError):
        chooser(one_conv(sparse_weight(0.15)), log=log, mode="strict").plans()


def test_a_dense_build_takes_no_sparse_kernel_from_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    chooser(one_conv(sparse_weight(0.1)), log=log).plans()
    (plan, *_) = chooser(one_conv(sparse_weight(0.1)), log=log, dense=True, mode="strict").plans()
    assert not conv_kernel(plan.choices["conv"].chosen.kernel).sparse


def test_alike_layers_share_a_choice_and_estimates_need_no_timer() -> None:
    graph = one_conv(sparse_weight(0.1))
    choice = chooser(graph, mode="estimate").plans()[0].choices["conv"]
    assert not choice.chosen.measured
    assert "by estimate" in choice.reason


class ManyRowsAreFast:
    """Takes the rows of a tile for speed."""

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        times = np.array([100.0 / what.config.get("rows", 0.5) for what in whats])
        return times, times


def test_a_latency_model_chooses_knobs_where_nothing_can_be_timed() -> None:
    predictor = Predictor(Device.here(detect(), 1), ManyRowsAreFast(), "many rows")
    graph = one_conv(sparse_weight(0.1))
    found = chooser(graph, mode="estimate", predictor=predictor).plans()[0].choices["conv"]
    rows = [getattr(candidate.config, "rows", 0.5) for candidate in found.timed]
    assert found.chosen.config is not None and found.chosen.config.rows == max(rows) > min(rows)
    assert found.chosen.run_us == 100.0 / max(rows) and not found.chosen.measured
    assert len(found.timed) > len(chooser(graph, mode="estimate").plans()[0].choices["conv"].timed)
