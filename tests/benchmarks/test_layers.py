"""The benchmark of single layers runs the kernels that it names."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks import layers
from topiarist.targets import registry

SHAPE = layers.Shape(channels=8, size=8, filters=8, kernel=3, groups=2)


@pytest.fixture(scope="module")
def contest() -> layers.Contest:
    """A small layer with a fifth of its weights."""
    weight = layers.weights(SHAPE, "unstructured", 0.2)
    return layers.Contest(SHAPE, weight, registry.get("host"))


def test_weights_have_the_density() -> None:
    """Of all patterns."""
    assert layers.weights(SHAPE, "unstructured", 0.25).shape == (8, 4, 3, 3)
    for pattern, density in (("unstructured", 0.25), ("block4x1", 0.25), ("dense", 1.0)):
        weight = layers.weights(SHAPE, pattern, density)
        assert np.count_nonzero(weight) / weight.size == pytest.approx(density)


def test_any_kernel_of_the_contest_can_run(contest: layers.Contest) -> None:
    """A sparse and a dense one; none of a kind that doesn't exist."""
    for accepts in (layers.is_sparse, layers.is_direct_dense):
        candidate = contest.fastest(accepts)
        assert candidate is not None and accepts(candidate.kernel)
        contest.engine("it", candidate).run()
    assert contest.fastest(lambda kernel: kernel == "no such kernel") is None
