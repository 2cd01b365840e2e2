"""How far to prune each layer, so that the network meets a latency and loses as little as it can.

Exact dynamic programming over the layers (SPDY, ICML 2022, section 3), on what an option takes
beyond its layer's fastest one: a budget that can be met at all is always met.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topiarist.errors import BudgetError
from topiarist.pruning.level import DENSE, Level

BUCKETS = 10_000


@dataclass(frozen=True)
class Option:
    """A level that a layer could have, what the layer then takes, and the error that it brings."""

    level: Level
    run_us: float
    error: float


@dataclass(frozen=True)
class LayerOptions:
    """All that can be chosen for a layer; the first option is the dense one.

    Raises ValueError where that isn't so, or where a time or an error is negative or not finite.
    """

    layer: str
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        """Check what allocation relies on."""
        if not self.options or self.options[0].level != DENSE:
            raise ValueError(f"{self.layer}: the first option must be dense")
        for option in self.options:
            if not (_is_amount(option.run_us) and _is_amount(option.error)):
                raise ValueError(
                    f"{self.layer}, {option.level}: {option.run_us} us with error {option.error}; "
                    "both must be finite and not negative"
                )

    @property
    def fastest_us(self) -> float:
        """The time of the fastest option."""
        return min(option.run_us for option in self.options)

    def at(self, level: Level) -> Option | None:
        """The option with that level."""
        return next((option for option in self.options if option.level == level), None)


@dataclass(frozen=True)
class Allocation:
    """An option for each layer, in the order of the layers."""

    options: Mapping[str, Option]

    @property
    def run_us(self) -> float:
        """What the layers take together."""
        return math.fsum(option.run_us for option in self.options.values())

    @property
    def error(self) -> float:
        """The sum of the errors."""
        return math.fsum(option.error for option in self.options.values())

    @property
    def levels(self) -> dict[str, Level]:
        """The level of each layer."""
        return {layer: option.level for layer, option in self.options.items()}


def reachable_us(layers: Sequence[LayerOptions]) -> float:
    """The least that the layers can take together."""
    return math.fsum(layer.fastest_us for layer in layers)


def reachable_evenly_us(layers: Sequence[LayerOptions]) -> float:
    """The least that they can take with one level for all."""
    return min((one.run_us for one in _at_each_level(layers)), default=0.0)


def allocate(
    layers: Sequence[LayerOptions], budget_us: float, buckets: int = BUCKETS
) -> Allocation:
    """The choice with the least sum of errors among those that take at most `budget_us`.

    Times are rounded up to `buckets` steps between the least time and the budget, so at worst the
    choice is the best one for a budget that is len(layers) steps smaller. Raises BudgetError below
    `reachable_us`.
    """
    _check_reachable(budget_us, reachable_us(layers))
    useful = {layer.layer: _not_dominated(layer.options) for layer in layers}
    best = Allocation({layer: options[0] for layer, options in useful.items()})
    if best.run_us <= budget_us:  # rounded up, it might not fit
        return best
    step_us = (budget_us - reachable_us(layers)) / buckets
    costs = [_steps(options, step_us, buckets) for options in useful.values()]
    errors = [np.array([option.error for option in options]) for options in useful.values()]
    picks = zip(useful.items(), _least_error(costs, errors, buckets), strict=True)
    return Allocation({layer: options[index] for (layer, options), index in picks})


def uniform(layers: Sequence[LayerOptions], budget_us: float) -> Allocation:
    """One level for all layers, the one with the least error that meets the budget: the baseline.

    A layer without that level, or that it would not make faster, stays dense. Raises BudgetError if
    no level meets the budget.
    """
    _check_reachable(budget_us, reachable_evenly_us(layers))
    meeting = (one for one in _at_each_level(layers) if one.run_us <= budget_us)
    return min(meeting, key=lambda one: one.error, default=Allocation({}))


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _check_reachable(budget_us: float, least_us: float) -> None:
    if not budget_us >= least_us:
        raise BudgetError(
            f"The layers can't take {budget_us:.1f} us together: the least that can be reached is "
            f"{least_us:.1f} us. Ask for that or more, or allow more patterns or lower densities."
        )


def _not_dominated(options: Iterable[Option]) -> list[Option]:
    """The options that no other one equals or beats in time and error, the slowest first.

    Dense has no error, so what is not faster than dense goes (Park et al., ICLR 2017, 2.2).
    """
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.run_us, o.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept[::-1]


def _steps(options: list[Option], step_us: float, buckets: int) -> NDArray[np.int64]:
    """What each option takes beyond the fastest one, rounded up; at most buckets + 1."""
    extra_us = np.array([option.run_us for option in options]) - options[-1].run_us
    steps = np.full(len(options), buckets + 1, np.int64)
    fits = extra_us <= buckets * step_us
    if step_us > 0:
        steps[fits] = np.ceil(extra_us[fits] / step_us)
    else:
        steps[fits] = 0
    return steps


def _least_error(
    costs: list[NDArray[np.int64]], errors: list[NDArray[np.float64]], buckets: int
) -> list[int]:
    """The index for each layer with the least sum of errors whose costs sum to at most `buckets`.

    `least[b]` is the least error of the layers so far within b; each layer has an option of cost 0.
    """
    least = np.zeros(buckets + 1)
    picks = []
    for layer_costs, layer_errors in zip(costs, errors, strict=True):
        best = np.full(buckets + 1, np.inf)
        pick = np.zeros(buckets + 1, np.intp)
        for index, (cost, error) in enumerate(zip(layer_costs, layer_errors, strict=True)):
            if cost > buckets:
                continue
            total = least[: buckets + 1 - cost] + error
            better = total < best[cost:]
            np.copyto(best[cost:], total, where=better)
            np.copyto(pick[cost:], index, where=better)
        least = best
        picks.append(pick)
    left = buckets
    chosen = []
    for layer_costs, pick in zip(reversed(costs), reversed(picks), strict=True):
        chosen.append(int(pick[left]))
        left -= int(layer_costs[chosen[-1]])
    return chosen[::-1]


def _at_each_level(layers: Sequence[LayerOptions]) -> list[Allocation]:
    """One level for all layers, for every level that any of them has."""
    levels = dict.fromkeys(option.level for layer in layers for option in layer.options)
    return [_at_one_level(layers, level) for level in levels]


def _at_one_level(layers: Sequence[LayerOptions], level: Level) -> Allocation:
    """That level wherever there is one that is faster than dense."""
    options = {}
    for layer in layers:
        dense = layer.options[0]
        option = layer.at(level) or dense
        options[layer.layer] = option if option.run_us < dense.run_us else dense
    return Allocation(options)
