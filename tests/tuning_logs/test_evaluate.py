"""Scores, decisions and held-out parts, against what a pencil gives."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tuning_logs.conftest import make_record
from tests.tuning_logs.invented import SPARSE, make_what, records
from topiarist.tuning_logs import evaluate, regressions
from topiarist.tuning_logs.cost_model import LEAST, Dataset, LatencyModel, layer_of
from topiarist.tuning_logs.evaluate import (
    Scores,
    cross_validated,
    decisions,
    evaluate_model,
    flop_baseline,
    leave_one_out,
    nearest_baseline,
)
from topiarist.tuning_logs.record import TuningRecord


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few trees: what is looked at is not how good they are."""
    for name in regressions.ROUNDS:
        monkeypatch.setitem(regressions.ROUNDS, name, 5)


def array(*values: float) -> Any:
    return np.array(values, np.float64)


def test_scores_by_hand() -> None:
    scores = Scores.of(array(109, 190, 300, 520), array(100, 200, 400, 500))
    assert scores.records == 4
    assert scores.mape == pytest.approx((0.09 + 0.05 + 0.25 + 0.04) / 4)
    assert scores.median == pytest.approx(0.07)
    assert scores.within_10 == 0.75
    assert (scores.spearman, scores.pairwise) == (pytest.approx(1), pytest.approx(1))


def test_pairs_in_order() -> None:
    assert Scores.of(array(3, 2, 1), array(1, 2, 3)).pairwise == pytest.approx(0)
    assert Scores.of(array(1, 3, 2), array(1, 2, 3)).pairwise == pytest.approx(2 / 3)
    assert Scores.of(array(1, 2, 2), array(1, 2, 3)).pairwise == pytest.approx(2.5 / 3)
    assert Scores.of(array(1, 2, 3), array(1, 1, 3)).pairwise == pytest.approx(1)


def test_nothing_to_compare_is_not_a_number() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(Scores.of(array(), array()).mape)
        one = Scores.of(array(2), array(1))
        assert one.mape == 1 and math.isnan(one.spearman) and math.isnan(one.pairwise)
        assert math.isnan(Scores.of(array(5, 5), array(1, 2)).spearman)
        assert math.isnan(Scores.of(array(math.nan, math.nan), array(1, 2)).mape)


def site(times: dict[tuple[str, int], float], density: float = 0.1) -> list[TuningRecord]:
    """The records of a layer, by kernel and tile."""
    return [
        TuningRecord(make_what(kernel, cols=cols, density=density), (float(us) * 1e-6,))
        for (kernel, cols), us in times.items()
    ]


DENSE, ZEROS = "direct_dense", "direct_sparse"


def test_decisions_between_dense_and_sparse() -> None:
    """Right where sparse wins; wrong at the second site, where 100 of 80 us are taken."""
    data = Dataset.of(
        [
            *site({(DENSE, 1): 100, (DENSE, 2): 90, (ZEROS, 1): 50}, density=0.1),
            *site({(DENSE, 1): 80, (ZEROS, 1): 100, (ZEROS, 2): 110}, density=0.4),
            *site({(ZEROS, 1): 10, (ZEROS, 2): 20}, density=0.05),
        ]
    )
    found = decisions(data, array(100, 95, 40, 90, 70, 95, 1, 2), SPARSE)
    assert (found.sites, found.right) == (2, 0.5)
    assert found.regret == pytest.approx((0 + 0.25) / 2)
    assert found.top_8_sites == 0 and math.isnan(found.top_8)


def test_candidates_between_other_layouts_are_another_site() -> None:
    dense, sparse = (r.input for r in site({(DENSE, 1): 100, (ZEROS, 1): 50}))
    moved = replace(sparse, input_layout="plain")
    data = Dataset.of([TuningRecord(dense, (1e-4,)), TuningRecord(moved, (5e-5,))])
    assert decisions(data, array(100, 50), SPARSE).sites == 0


def test_the_best_of_the_eight_predicted_fastest() -> None:
    times = array(*range(200, 220))
    data = Dataset.of(site({(ZEROS, i): us for i, us in enumerate(times, 1)}))
    assert decisions(data, times, SPARSE).top_8 == 1.0
    backwards = decisions(data, -times, SPARSE)
    assert (backwards.top_8_sites, backwards.top_8) == (1, 0.0)
    assert backwards.top_8_regret == pytest.approx(0.06)
    nearly = times.copy()
    nearly[[0, 12]] = 300, 1  # the best is missed, the second is among the eight
    assert decisions(data, nearly, SPARSE).top_8 == 1.0
    few = data.where(np.arange(len(data)) < 15)
    assert decisions(few, times[:15], SPARSE).top_8_sites == 0


def test_the_flop_baseline_is_a_constant_rate_on_nonzeros() -> None:
    data = Dataset.of(
        [
            TuningRecord(make_what(inputs=inputs, density=density), (inputs * density * 1e-6,))
            for inputs in (32, 64, 128)
            for density in (0.1, 0.2, 0.5)
        ]
    )
    other = Dataset.of([TuningRecord(make_what(inputs=96, density=0.3), (1.0,))])
    assert flop_baseline(data)(other) == pytest.approx([96 * 0.3])
    dense = Dataset.of([TuningRecord(make_what(DENSE, inputs=96, density=0.3), (1.0,))])
    assert flop_baseline(data)(dense) == pytest.approx([96 * 0.3])
    pool = make_record(workload={"kind": "pool", "read_bytes": 9, "written_bytes": 1})
    assert np.isfinite(flop_baseline(data)(Dataset.of([pool]))).all()


def test_the_nearest_record() -> None:
    data = Dataset.of([TuningRecord(make_what(inputs=i), (i * 1e-6,)) for i in (16, 64, 256)])
    others = Dataset.of([TuningRecord(make_what(inputs=i), (1.0,)) for i in (60, 250)])
    assert nearest_baseline(data)(others) == pytest.approx([64, 256])


def test_baselines_without_records_know_nothing() -> None:
    nothing, one = Dataset.of([]), Dataset.of([make_record()])
    for baseline in (flop_baseline, nearest_baseline):
        assert np.isnan(baseline(nothing)(one)).all()


@pytest.mark.usefixtures("quick")
def test_an_evaluation_in_both_places_is_plain_json() -> None:
    data = Dataset.of([*records(250), *records(60, seed=1, measured="in network")])
    found = cross_validated(data, np.full(len(data), "a"), SPARSE)
    assert {*found} == {"alone", "in network"}
    assert sum(e.model.records for e in found.values()) == len(data) // 5
    again = cross_validated(data, np.full(len(data), "a"), SPARSE)
    assert {m: e.to_json() for m, e in again.items()} == {m: e.to_json() for m, e in found.items()}
    text = json.dumps(found["alone"].to_json(), allow_nan=False)
    assert json.loads(text)["decisions"]["top_8"] is None
    assert 0 <= found["alone"].covered <= 1


@pytest.mark.usefixtures("quick")
def test_without_records_of_a_place_its_baselines_are_missing() -> None:
    train = Dataset.of(records(150))
    test = Dataset.of(records(20, seed=1, measured="in network"))
    (found,) = evaluate_model(LatencyModel.train(train), train, test, SPARSE).values()
    assert math.isnan(found.flops.mape) and found.to_json()["flops"]["mape"] is None  # type: ignore[index]
    assert found.model.mape > 0


def test_a_network_is_left_out_with_all_layers_like_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = []

    def remember(train: Dataset, test: Dataset, *_: Any) -> dict[str, Any]:
        splits.append((train, test))
        return {}

    monkeypatch.setattr(evaluate, "evaluate", remember)
    data = Dataset.of(_two_networks())
    groups = np.array(["a" if i % 3 else "b" for i in range(len(data))])
    assert [name for name, _ in leave_one_out(data, groups, SPARSE)] == ["a", "b"]
    for (train, test), name in zip(splits, "ab", strict=True):
        assert len(test) == (groups == name).sum()
        layers = [{layer_of(what) for what in part.inputs} for part in (train, test)]
        assert layers[0] and not layers[0] & layers[1]
        ours = {what.key for part in (train, test) for what in part.inputs}
        left = [what for what in data.inputs if what.key not in ours]
        assert {layer_of(what) for what in left} <= layers[1]


def _two_networks() -> Iterator[TuningRecord]:
    """Layers of 3 * n channels occur in one network or the other, the first six in both."""
    for n in range(300):
        inputs = 8 * (n % 6 + 1) if n % 50 < 6 else 8 * (n + 10)
        kernel = DENSE if n % 2 else ZEROS
        yield TuningRecord(make_what(kernel, inputs, density=0.1 + n / 1000), (1e-4,))


def test_a_network_is_skipped_if_too_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "evaluate", lambda train, test, sparse: {})
    data = Dataset.of(records(LEAST + 20))
    groups = np.array(["large"] * LEAST + ["small"] * (len(data) - LEAST))
    assert [name for name, _ in leave_one_out(data, groups, SPARSE)] == []
