"""Levels and the names of patterns."""

import numpy as np
import pytest

from topiarist.pruning.level import DENSE, Level, kernel_taps, levels_of, n_m


def test_levels_are_geometric_from_90_to_1_percent():
    densities = [level.density for level in levels_of("block4x1")]
    assert len(densities) == 30
    assert densities[0] == 0.9
    assert densities[-1] == 0.01
    ratios = np.divide(densities[1:], densities[:-1])
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)


def test_patterns_with_numbers_have_one_level():
    assert levels_of("2:4") == (Level("2:4", 0.5),)
    assert levels_of("kernel3") == (Level("kernel3", 1 / 3),)
    assert (n_m("1:8"), kernel_taps("kernel4")) == ((1, 8), 4)


@pytest.mark.parametrize("pattern", ["dense", "4:2", "4:4", "0:4", "kernel9", "kernel0", "block2"])
def test_other_names_are_refused(pattern):
    with pytest.raises(ValueError, match="expected unstructured"):
        levels_of(pattern)


def test_levels_read_well():
    assert str(Level("unstructured", 0.125)) == "unstructured 12.5 %"
    assert str(DENSE) == "dense"
