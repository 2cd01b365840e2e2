"""Patterns are found where they are, and nowhere else."""

import numpy as np
import pytest

from topiarist.pruning.masks import block_mask, n_m_mask, unstructured_mask
from topiarist.pruning.patterns import find_pattern

SHAPES = [(64, 64, 3, 3), (128, 64, 1, 1), (30, 20, 3, 3), (512, 512, 1, 1), (100, 7, 1, 1)]


def _weight(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_weight_is_dense(shape):
    found = find_pattern(_weight(shape))
    assert (found.kind, found.density, found.nnz) == ("dense", 1.0, np.prod(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.002])
@pytest.mark.parametrize("seed", range(3))
def test_random_zeros_are_unstructured(shape, density, seed):
    weight = _weight(shape, seed)
    weight[np.random.default_rng(seed + 1).random(shape) >= density] = 0
    if weight.any():
        assert find_pattern(weight).kind == "unstructured"


@pytest.mark.parametrize("seed", range(200))
def test_tiny_random_weights_are_not_taken_for_structured(seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((8, 8, 3, 3)) * (rng.random((8, 8, 3, 3)) < rng.uniform(0.02, 0.9))
    assert find_pattern(weight).kind == "unstructured"


@pytest.mark.parametrize("shape", SHAPES[:4])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.05])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_blocks(shape, density, block):
    weight = _weight(shape)
    found = find_pattern(weight * block_mask(np.abs(weight), density, block=block))
    assert (found.kind, found.block) == (f"block{block}x1", block)


def test_blocks_stay_inside_groups():
    weight = _weight((12, 16, 3, 3))
    pruned = weight * block_mask(np.abs(weight), 0.3, groups=2)
    assert find_pattern(pruned, groups=2).kind == "block4x1"
    assert find_pattern(pruned, groups=1).kind == "unstructured"


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 16)])
def test_n_m(shape, n, m):
    weight = _weight(shape)
    found = find_pattern(weight * n_m_mask(np.abs(weight), n, m))
    assert (found.kind, found.n, found.m, str(found)) == ("n:m", n, m, f"{n}:{m}")


def test_n_m_with_dead_filters_and_a_few_strays():
    weight = _weight((64, 64, 3, 3))
    weight *= n_m_mask(np.abs(weight), 2, 4)
    weight[5:9] = 0
    weight[np.unravel_index(np.arange(0, weight.size, 1000), weight.shape)] = 0
    found = find_pattern(weight)
    assert (found.kind, found.dead_filters) == ("n:m", 4)
    weight[0, :4, 0, 0] = 1  # more than two of four: hardware for 2:4 would drop one
    assert str(find_pattern(weight)) != "2:4"


@pytest.mark.parametrize("library", [1, 4, 8, 12])
@pytest.mark.parametrize("connected", [1.0, 0.3])
def test_kernel_patterns(library, connected):
    rng = np.random.default_rng(library)
    supports = np.zeros((library, 9), dtype=bool)
    for i in range(library):
        supports[i, [4, *rng.choice([0, 1, 2, 3, 5, 6, 7, 8], 3, replace=False)]] = True
    mask = supports[rng.integers(library, size=(64, 64))].reshape(64, 64, 3, 3)
    mask &= rng.random((64, 64, 1, 1)) < connected
    found = find_pattern(_weight((64, 64, 3, 3)) * mask)
    assert (found.kind, found.taps) == ("kernel", 4)
    assert found.supports == len(np.unique(supports, axis=0))


def test_dead_filters_and_channels():
    weight = _weight((32, 16, 3, 3))
    weight[3:7] = 0
    assert (find_pattern(weight).kind, find_pattern(weight).dead_filters) == ("filter", 4)
    weight[:, 2] = 0
    assert (find_pattern(weight).kind, find_pattern(weight).dead_channels) == ("filter", 1)
    weight = _weight((32, 16, 3, 3))
    weight[:, ::2] = 0
    assert (find_pattern(weight).kind, find_pattern(weight).dead_channels) == ("channel", 8)


def test_dead_channels_are_counted_per_group():
    weight = _weight((8, 2, 3, 3))
    weight[:4, 0] = 0  # input channel 0 of 4; the second group reads its own first channel
    found = find_pattern(weight, groups=2)
    assert (found.kind, found.dead_channels) == ("channel", 1)
    assert find_pattern(weight).dead_channels == 0


def test_dead_weight_and_zero_rounding():
    assert find_pattern(np.zeros((4, 4, 3, 3))).kind == "filter"
    weight = _weight((64, 64, 1, 1))
    weight.flat[::40] = 0
    assert find_pattern(weight).kind == "dense"


def test_depthwise():
    weight = _weight((32, 1, 3, 3))
    assert find_pattern(weight, groups=32).kind == "dense"
    weight[:8] = 0
    found = find_pattern(weight, groups=32)
    assert (found.kind, found.dead_filters, found.dead_channels) == ("filter", 8, 8)
    weight = _weight((32, 1, 3, 3))
    weight *= unstructured_mask(np.abs(weight), 0.4)
    assert find_pattern(weight, groups=32).kind == "unstructured"


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        find_pattern(np.ones((3, 3)))
    with pytest.raises(ValueError, match="2 groups"):
        find_pattern(np.ones((3, 3, 1, 1)), groups=2)
