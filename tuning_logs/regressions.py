"""What the latency model has learned: costs, trees that correct them, and an upper quantile.

The time of a kernel alone is a sum of counts at learned costs (`costs.py`) times the exponential of
a regression. What a network adds is a second regression, with few and small trees. A third one is
of how far times exceed predictions by models that have not seen the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.tuning_logs import boosters
from topiarist.tuning_logs.boosters import Booster, Floats, Rows
from topiarist.tuning_logs.costs import Costs

UPPER = 0.9  # the quantile of the third regression
HELD = 0.8  # share of networks in which at least so many times stay below it
FOLDS = 3
FEWEST = 40  # records to learn from in a fold
FEWEST_TO_ADAPT = 10  # from those of another target
GROUPS = 3  # networks from which on they are left out in turns, instead of layers
ROUNDS = {"alone": 220, "in network": 80, "upper": 40, "adapt": 40}
_COMMON = {"tree_method": "hist", "seed": 0, "subsample": 0.8}
_ALONE = _COMMON | {
    "objective": "reg:squarederror",
    "max_depth": 6,
    "eta": 0.1,
    "reg_lambda": 3,
    "colsample_bytree": 0.5,
    "min_child_weight": 2,
}
_IN_NETWORK = _COMMON | {
    "objective": "reg:squarederror",
    "max_depth": 4,
    "eta": 0.05,
    "colsample_bytree": 0.4,
    "min_child_weight": 20,
}
_ADAPT = _COMMON | {
    "objective": "reg:squarederror",
    "max_depth": 3,
    "eta": 0.05,
    "colsample_bytree": 0.4,
    "min_child_weight": 5,
}
_UPPER = _COMMON | {
    "objective": "reg:quantileerror",
    "quantile_alpha": UPPER,
    "max_depth": 3,
    "eta": 0.1,
    "min_child_weight": 20,
}


@dataclass(frozen=True)
class Times:
    """What to learn from: rows of columns, where each was timed, its microseconds and its layer.

    `groups` names the network of each, where that is known.
    """

    rows: Rows
    columns: Sequence[str]
    in_network: NDArray[np.bool_]
    run_us: Floats
    layers: NDArray[np.str_]
    groups: NDArray[np.str_] | None = None

    def where(self, chosen: NDArray[np.bool_]) -> Times:
        """A part of it."""
        groups = None if self.groups is None else self.groups[chosen]
        return Times(
            self.rows[chosen],
            self.columns,
            self.in_network[chosen],
            self.run_us[chosen],
            self.layers[chosen],
            groups,
        )

    @property
    def of_networks(self) -> bool:
        """Whether there are networks enough to leave them out in turns."""
        return self.groups is not None and len(np.unique(self.groups)) >= GROUPS

    def folds(self) -> Iterator[NDArray[np.bool_]]:
        """Parts to hold out: networks, or thirds of the layers, or of the records if need be."""
        if self.groups is not None and self.of_networks:
            yield from (self.groups == name for name in np.unique(self.groups))
            return
        _, layers = np.unique(self.layers, return_inverse=True)
        each = layers if layers.max() >= FOLDS - 1 else np.arange(len(self.run_us))
        yield from (each % FOLDS == fold for fold in range(FOLDS))


@dataclass(frozen=True)
class Regressions:
    """Predicts microseconds from rows of `columns`.

    `margins` is added to the upper quantile's logarithm, alone and in a network.
    """

    columns: Sequence[str]
    costs: Costs
    alone: Booster
    in_network: Booster | None = None
    upper: Booster | None = None
    margins: tuple[float, float] = (0.0, 0.0)

    @staticmethod
    def fit(data: Times, base: Regressions | None = None) -> Regressions:
        """All of it; from few records by changing what was learned of another target."""
        found = _fit(data, base)
        upper, margins = _fit_upper(data, base)
        return replace(found, upper=upper, margins=margins)

    def predict_us(self, rows: Rows, in_network: bool) -> Floats:
        """The expected microseconds of each row."""
        found = boosters.predict(self.alone, rows)
        if in_network and self.in_network is not None:
            found += boosters.predict(self.in_network, rows)
        return self.costs.predict_us(rows, self.columns) * np.exp(found)

    def upper_us(self, rows: Rows, in_network: bool) -> Floats:
        """What nine of ten times stay below, in most networks that were not seen."""
        places = _with_place(rows, np.full(len(rows), in_network))
        above = boosters.predict(self.upper, places) + self.margins[in_network]
        return self.predict_us(rows, in_network) * np.exp(np.maximum(above, 0.0))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        trees = {"alone": self.alone, "in network": self.in_network, "upper": self.upper}
        known = {name: boosters.to_json(one) for name, one in trees.items() if one is not None}
        return {"costs": self.costs.to_json(), "boosters": known, "margins": [*self.margins]}

    @staticmethod
    def from_json(columns: Sequence[str], document: Mapping[str, Any]) -> Regressions:
        """The inverse of `to_json`. Raises KeyError, TypeError, ValueError and others."""
        trees = document["boosters"]
        if not {"alone", "upper"} <= trees.keys() <= {"alone", "in network", "upper"}:
            raise ValueError("its regressions make no sense")
        count = len(columns)
        in_network = trees.get("in network")
        low, high = map(float, document["margins"])
        if not np.isfinite([low, high]).all():
            raise ValueError("a margin makes no sense")
        return Regressions(
            columns,
            Costs.from_json(document["costs"]),
            boosters.from_json(trees["alone"], count),
            None if in_network is None else boosters.from_json(in_network, count),
            boosters.from_json(trees["upper"], count + 1),
            (low, high),
        )


def _fit(data: Times, base: Regressions | None) -> Regressions:
    """Without the upper quantile. Where nothing was timed alone, times in networks stand in."""
    everywhere = data.in_network.all()
    alone = data if everywhere else data.where(~data.in_network)
    args = alone.rows, data.columns, alone.run_us, alone.layers
    costs = Costs.fit(*args) if base is None else base.costs.refit(*args)
    found = Regressions(data.columns, costs, _corrected(alone, costs, base))
    if everywhere or not data.in_network.any():
        return found if base is None else replace(found, in_network=base.in_network)
    rest = data.where(data.in_network)
    added = np.log(rest.run_us / found.predict_us(rest.rows, False))
    trees = boosters.fit(_IN_NETWORK, rest.rows, added, ROUNDS["in network"])
    return replace(found, in_network=trees)


def _corrected(data: Times, costs: Costs, base: Regressions | None) -> Booster:
    """What a sum of counts can't say; few and small trees more than another target's."""
    labels = np.log(data.run_us / costs.predict_us(data.rows, data.columns))
    if base is None:
        return boosters.fit(_ALONE, data.rows, labels, ROUNDS["alone"])
    return boosters.fit(_ADAPT, data.rows, labels, ROUNDS["adapt"], after=base.alone)


def _fit_upper(data: Times, base: Regressions | None) -> tuple[Booster, tuple[float, float]]:
    """How far times exceed predictions by models that have not seen the network, or the layer."""
    least = FEWEST if base is None else FEWEST_TO_ADAPT
    errors = np.full(len(data.run_us), np.nan)
    fold = np.zeros(len(errors), np.intp)
    for k, test in enumerate(data.folds()):
        seen = ~test & ~np.isin(data.layers, data.layers[test])
        seen = seen if seen.sum() >= least else ~test
        if not test.any() or seen.sum() < least:
            continue
        part = _fit(data.where(seen), base)
        fold[test] = k
        for place in (False, True):
            at = test & (data.in_network == place)
            errors[at] = np.log(data.run_us[at] / part.predict_us(data.rows[at], place))
    known = ~np.isnan(errors)
    rows = _with_place(data.rows, data.in_network)[known]
    errors, fold, in_network = errors[known], fold[known], data.in_network[known]
    above = np.empty(len(errors))
    for k in np.unique(fold):
        others = fold != k if (fold != k).any() else fold == k
        part = boosters.fit(_UPPER, rows[others], errors[others], ROUNDS["upper"])
        above[fold == k] = errors[fold == k] - boosters.predict(part, rows[fold == k])
    if not data.of_networks:  # thirds are no networks: they have no bias of their own
        fold = np.zeros_like(fold)
    alone, added = (_margin(above[at], fold[at]) for at in (~in_network, in_network))
    return boosters.fit(_UPPER, rows, errors, ROUNDS["upper"]), (alone, added)


def _margin(above: Floats, fold: NDArray[np.intp]) -> float:
    """What to add for the quantile to hold in `HELD` of the parts that were held out.

    Conformal prediction with networks, not times, as what is exchangeable.
    """
    needed = [float(np.quantile(above[fold == k], UPPER)) for k in np.unique(fold)]
    return float(np.quantile(needed, HELD, method="higher")) if needed else 0.0


def _with_place(rows: Rows, in_network: NDArray[np.bool_]) -> Rows:
    """With a column more: how far times scatter depends on where they were taken."""
    return np.column_stack([rows, in_network.astype(np.float32)])
