"""Signatures of levels that a weight isn't pruned to."""

from __future__ import annotations

import numpy as np
import pytest

from topiarist.pruning.level import DENSE, Level
from topiarist.pruning.masks import unstructured_mask
from topiarist.pruning.saliency import magnitude
from topiarist.pruning.signatures import signature_at, signatures_at
from topiarist.schedules.workload import signature

WEIGHT = np.random.default_rng(3).normal(size=(32, 48, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("density", [0.7, 0.2, 0.01])
def test_as_if_it_had_been_pruned(density: float) -> None:
    pruned = np.where(unstructured_mask(magnitude(WEIGHT), density), WEIGHT, 0)
    expected = signature(pruned, "unstructured")
    assert signature_at(WEIGHT, Level("unstructured", density)) == expected


@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "block8x1", "block16x1"])
def test_the_pattern_is_kept(pattern: str) -> None:
    """But nearly dense is dense."""
    some, few = signatures_at(WEIGHT, [Level(pattern, 0.25), Level(pattern, 0.05)])
    assert (some.pattern, some.density) == (pattern, 0.25) and few.density == 0.05
    assert signature_at(WEIGHT, Level(pattern, 0.97)).pattern == "dense"
    assert signature_at(WEIGHT, Level("2:4", 0.5)).density == 0.5
    whole = signature_at(WEIGHT, DENSE)
    assert (whole.density, whole.pattern, whole.row_quantiles) == (1.0, "dense", (144, 288, 288))


def test_a_pruned_weight_with_fewer_zeros() -> None:
    """They go anywhere, not to the first filters; and it is the same each time."""
    pruned = np.where(unstructured_mask(magnitude(WEIGHT), 0.1), WEIGHT, 0)
    more = signature_at(pruned, Level("unstructured", 0.5))
    like = signature_at(WEIGHT, Level("unstructured", 0.5))
    assert more.density == 0.5 and more == signature_at(pruned, Level("unstructured", 0.5))
    assert more.row_quantiles == pytest.approx(like.row_quantiles, rel=0.1)
    less = Level("unstructured", 0.05)
    assert signature_at(pruned, less) == signature_at(WEIGHT, less)
    assert signature_at(np.zeros_like(WEIGHT), Level("unstructured", 0.5)).density == 0.5


def test_a_pattern_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel4"):
        signature_at(WEIGHT, Level("kernel4", 4 / 9))
