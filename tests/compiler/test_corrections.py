"""What was measured corrects prices: of the layer, of levels nearby, of layers like it."""

from __future__ import annotations

import math

import pytest

from topiarist.compiler.corrections import NEAR, Corrections, Measured
from topiarist.pruning.level import DENSE, Level

FEW, MANY = Level("unstructured", 0.05), Level("unstructured", 0.5)


def test_nothing_known_changes_nothing() -> None:
    corrections = Corrections(1000.0)
    assert corrections.factor("a", FEW) == 1


def test_a_measurement_counts_the_more_the_nearer_its_density_is() -> None:
    corrections = Corrections(1e9)  # of which one layer says nothing
    corrections.learn({"a": Measured(FEW, 200.0, 100.0)})
    same, near, far = (
        corrections.factor("a", Level("unstructured", FEW.density * math.exp(NEAR * steps)))
        for steps in (0, 1, 4)
    )
    assert same == pytest.approx(2 ** (1 / 1.5))
    assert 2 > same > near > far > 1
    assert corrections.factor("a", Level("block4x1", 0.05)) == pytest.approx(1)
    assert corrections.factor("a", DENSE) == 1


def test_other_levels_have_other_factors() -> None:
    corrections = Corrections(1000.0)
    for _ in range(3):
        corrections.learn({"a": Measured(FEW, 50.0, 100.0)})
        corrections.learn({"a": Measured(MANY, 150.0, 100.0)})
    assert corrections.factor("a", FEW) == pytest.approx(0.5, rel=0.15)
    assert corrections.factor("a", MANY) == pytest.approx(1.5, rel=0.15)


def test_what_most_layers_take_counts_for_the_others() -> None:
    corrections = Corrections(1000.0)
    corrections.learn({f"layer{i}": Measured(DENSE, 200.0, 100.0) for i in range(10)})
    assert corrections.factor("another", DENSE) == pytest.approx(2, rel=0.2)
    few = Corrections(1000.0)
    few.learn({"stem": Measured(DENSE, 20.0, 10.0)})
    assert few.factor("another", DENSE) == pytest.approx(1, rel=0.05)


def test_a_layer_that_took_no_time_teaches_nothing() -> None:
    corrections = Corrections(1000.0)
    corrections.learn({"a": Measured(FEW, 0.0, 100.0)})
    assert corrections.factor("a", FEW) == 1
