"""The strategies, on an invented kernel whose time is known everywhere."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from topiarist.tuning_logs.features import columns_of
from topiarist.tuning_logs.search import (
    STRATEGIES,
    History,
    Option,
    Strategy,
    StrategyName,
    make_strategy,
    search,
)

BATCH = 8


def invented(size: int = 14, shift: int = 0) -> tuple[list[Option], list[float]]:
    """Two kernels with two knobs each; by estimate the slow one is better, at other knobs."""
    options, times = [], []
    for kernel, a, b in product(("slow", "quick"), range(size), range(size)):
        us = 100.0 + 3 * ((a - 9 + shift) ** 2 + (b - 4) ** 2) + (80 if kernel == "slow" else 0)
        estimate = 100.0 + (a - 7) ** 2 + (b - 7) ** 2 + (0 if kernel == "slow" else 40)
        numbers = {f"kernel={kernel}": 1.0, "config.a": float(a), "config.b": float(b)}
        options.append(Option(kernel, {"a": a, "b": b}, numbers, estimate))
        times.append(us)
    return options, times


def strategy(name: StrategyName, options: list[Option], seed: int = 0) -> Strategy:
    return make_strategy(name, options, seed, History(columns_of([o.features for o in options])))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_candidate_comes_once(name: StrategyName) -> None:
    options, times = invented(4)
    searching = strategy(name, options)
    seen: list[int] = []

    def measure(indices: list[int]) -> list[float]:
        seen.extend(indices)
        return [times[i] for i in indices]

    found = search(searching, measure, 1000, BATCH)
    assert sorted(seen) == list(range(len(options)))
    assert sorted(found) == sorted(times)
    assert searching.propose(1) == [] and searching.left == []


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_seed_and_answers_give_the_same_order(name: StrategyName) -> None:
    options, times = invented()

    def order(seed: int) -> list[float]:
        searching = strategy(name, options, seed)
        return search(searching, lambda indices: [times[i] for i in indices], 40, BATCH)

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("name", STRATEGIES)
def test_failures_are_survived(name: StrategyName) -> None:
    options, _ = invented(4)
    searching = strategy(name, options)
    found = search(searching, lambda indices: [math.inf] * len(indices), 24, BATCH)
    assert found == [math.inf] * 24
    assert len(searching.propose(BATCH)) == len(options) - 24


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_known_is_not_proposed(name: StrategyName) -> None:
    options, times = invented(4)
    searching = strategy(name, options)
    for i in range(0, len(options), 2):
        searching.observe(i, times[i])
    assert set(searching.propose(len(options))) == set(range(1, len(options), 2))


def best_after(name: StrategyName, trials: int) -> float:
    """Mean share of the best speed over ten seeds."""
    options, times = invented()
    found = []
    for seed in range(10):
        searching = strategy(name, options, seed)
        found.append(min(search(searching, lambda at: [times[i] for i in at], trials, BATCH)))
    return float(np.mean(min(times) / np.array(found)))


def test_the_model_beats_the_others_and_evolution_beats_random_search() -> None:
    tenth, quarter = 40, 100
    model = best_after("model", tenth)
    assert model > 0.98
    assert model > best_after("evolution", tenth) and model > best_after("random", tenth)
    assert best_after("evolution", quarter) > best_after("random", quarter)


def test_the_best_by_estimate_of_each_kernel_come_first() -> None:
    options, _ = invented()
    first = strategy("model", options).propose(4)
    assert [options[i].kernel for i in first] == ["slow", "quick", "slow", "quick"]
    assert options[first[0]].config == {"a": 7, "b": 7}


def test_what_one_layer_taught_helps_with_the_next() -> None:
    """In a network all layers share one history."""
    options, times = invented(shift=1)
    history = History(columns_of([option.features for option in options]))
    other, other_times = invented()
    for i in range(0, len(other), 5):
        history.learn(other[i], other_times[i])
    first = make_strategy("model", options, 0, history).propose(BATCH)
    assert min(times) / min(times[i] for i in first) > 0.9


def test_an_empty_space_has_no_proposals() -> None:
    for name in STRATEGIES:
        assert strategy(name, []).propose(3) == []
