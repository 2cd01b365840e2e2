"""The allocation against all choices there are, the baseline, and what can't be met."""

import itertools

import numpy as np
import pytest

from topiarist.errors import BudgetError
from topiarist.pruning.allocation import (
    Allocation,
    LayerOptions,
    Option,
    allocate,
    reachable_us,
    uniform,
)
from topiarist.pruning.level import DENSE, Level

HALF = Level("unstructured", 0.5)
TENTH = Level("unstructured", 0.1)


def _layer(name, *options, dense_us=10.0):
    """Options are (level, us, error)."""
    return LayerOptions(name, (Option(DENSE, dense_us, 0.0), *(Option(*o) for o in options)))


def _random_layers(rng, layers=4, levels=5, whole=False):
    """Times that are not monotone in density, some above the dense one."""
    shape = (layers, levels + 1)
    times = rng.integers(1, 30, shape) if whole else rng.random(shape)
    errors = rng.random(shape)
    errors[:, 0] = 0
    names = [DENSE, *(Level("unstructured", 0.9 - i / 200) for i in range(levels))]
    return [
        LayerOptions(f"layer{i}", tuple(map(Option, names, times[i].tolist(), errors[i].tolist())))
        for i in range(layers)
    ]


def _least_error(layers, budget_us):
    """By trying everything."""
    choices = itertools.product(*(layer.options for layer in layers))
    return min(
        sum(o.error for o in choice)
        for choice in choices
        if sum(o.run_us for o in choice) <= budget_us
    )


@pytest.mark.parametrize("seed", range(20))
def test_whole_times_in_whole_steps_give_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    layers = _random_layers(rng, whole=True)
    least = reachable_us(layers)
    for budget in least + np.arange(0, 60, 7):
        found = allocate(layers, budget, buckets=max(1, int(budget - least)))
        assert found.run_us <= budget
        assert found.error == pytest.approx(_least_error(layers, budget))


@pytest.mark.parametrize("seed", range(20))
def test_any_times_cost_at_most_the_rounding(seed):
    rng = np.random.default_rng(seed)
    layers = _random_layers(rng)
    least = reachable_us(layers)
    for share in (0.0, 0.1, 0.5, 0.9, 1.5):
        budget = least * (1 + share)
        found = allocate(layers, budget, buckets=1000)
        assert found.run_us <= budget * (1 + 1e-12)
        smaller = budget - len(layers) * (budget - least) / 1000
        assert _least_error(layers, budget) - 1e-12 <= found.error
        assert found.error <= _least_error(layers, max(smaller, least * (1 + 1e-15))) + 1e-12


def test_a_wide_budget_leaves_all_dense():
    layers = [_layer("a", (HALF, 5.1, 0.1)), _layer("b", (HALF, 5.3, 0.1), dense_us=9.9)]
    assert allocate(layers, 19.9).levels == {"a": DENSE, "b": DENSE}


def test_what_is_not_faster_than_dense_is_never_taken():
    layers = [_layer("a", (HALF, 12.0, 0.0), (TENTH, 10.0, 0.0)), _layer("b", (HALF, 4.0, 0.2))]
    assert allocate(layers, 14.0).levels == {"a": DENSE, "b": HALF}


def test_the_least_time_is_met_exactly_and_no_less():
    layers = [_layer("a", (HALF, 0.1, 1.0)), _layer("b", (HALF, 0.2, 1.0)), _layer("c")]
    assert allocate(layers, reachable_us(layers)).levels == {"a": HALF, "b": HALF, "c": DENSE}
    with pytest.raises(BudgetError, match=r"10\.2 us together: the least .* is 10\.3 us"):
        allocate(layers, 10.2)
    with pytest.raises(BudgetError):
        allocate(layers, float("nan"))


def test_many_layers_with_many_levels():
    rng = np.random.default_rng(0)
    layers = _random_layers(rng, layers=60, levels=119)
    budget = 0.5 * sum(layer.options[0].run_us for layer in layers)
    found = allocate(layers, budget)
    assert 0.99 * budget < found.run_us <= budget
    assert list(found.levels) == [layer.layer for layer in layers]


def test_no_layers():
    assert allocate([], 1.0) == uniform([], 1.0) == Allocation({})


def test_uniform_takes_one_level():
    layers = [
        _layer("a", (HALF, 6.0, 0.1), (TENTH, 2.0, 0.9)),
        _layer("b", (HALF, 11.0, 0.1), (TENTH, 2.0, 0.9)),
        _layer("c", (TENTH, 2.0, 0.9)),
    ]
    assert uniform(layers, 26.0).levels == {"a": HALF, "b": DENSE, "c": DENSE}
    assert uniform(layers, 25.9).levels == dict.fromkeys("abc", TENTH)
    assert uniform(layers, 30.0).levels == dict.fromkeys("abc", DENSE)
    with pytest.raises(BudgetError, match=r"least that can be reached is 6\.0 us"):
        uniform(layers, 5.0)


@pytest.mark.parametrize("seed", range(5))
def test_uniform_is_never_better(seed):
    layers = _random_layers(np.random.default_rng(seed), layers=6)
    baseline = uniform(layers, 0.9 * sum(layer.options[0].run_us for layer in layers))
    assert allocate(layers, baseline.run_us * 1.001).error <= baseline.error


@pytest.mark.parametrize(
    "options",
    [
        (),
        (Option(HALF, 1.0, 0.0),),
        (Option(DENSE, 1.0, 0.0), Option(HALF, 1.0, -1.0)),
        (Option(DENSE, 1.0, 0.0), Option(HALF, float("nan"), 1.0)),
        (Option(DENSE, float("inf"), 0.0),),
    ],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match="layer1"):
        LayerOptions("layer1", options)
