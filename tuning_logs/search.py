"""Which candidates of a layer to measure next: model-guided, evolutionary, random.

Nothing here measures or looks at a clock. A strategy proposes candidates by number and is told
what they took; the same seed and the same answers give the same proposals.
"""

from __future__ import annotations

import bisect
import itertools
import math
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from topiarist.tuning_logs.features import Features, table

StrategyName = Literal["model", "random", "evolution"]
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)
T = TypeVar("T")
FLOOR_US = 1e-3  # below it nothing was measured

RANDOM_SHARE = 0.125  # of a model's proposals, against its blind spots
LEAST_TO_FIT = 6  # measurements before a model says anything
REMEMBERED = 2000  # measurements that a model is trained on: the last ones
TREES = {
    "objective": "reg:squarederror",
    "tree_method": "hist",
    "max_depth": 5,
    "eta": 0.15,
    "nthread": 1,
    "seed": 0,
}
ROUNDS = 80

NEWCOMERS = 0.25  # of an evolution's proposals
CHANGED_KERNEL, MUTATION = 0.15, 0.6  # of its children; the others mix two parents
PARENTS = 4
TRIES = 20  # for one child that is new


@dataclass(frozen=True)
class Option:
    """One candidate: its kernel, knobs and features, and what it would take by estimate."""

    kernel: str
    config: Mapping[str, Any]
    features: Features
    estimate_us: float


class Strategy(ABC):
    """A search in the candidates of one layer."""

    def __init__(self, options: Sequence[Option], seed: int) -> None:
        self.options = options
        self.random = np.random.default_rng(seed)
        self.taken: dict[int, float] = {}  # candidate -> microseconds, infinity where it failed
        self._left = dict.fromkeys(range(len(options)))

    def propose(self, count: int) -> list[int]:
        """Up to `count` candidates that were not proposed before."""
        found = self._propose(min(count, len(self._left)))
        for index in found:
            del self._left[index]
        return found

    def observe(self, index: int, run_us: float) -> None:
        """What a candidate took; infinity if it failed. Also for one that was not proposed."""
        self._left.pop(index, None)
        self.taken[index] = run_us

    @property
    def left(self) -> list[int]:
        """The candidates that were neither proposed nor observed, in their order."""
        return list(self._left)

    @abstractmethod
    def _propose(self, count: int) -> list[int]:
        """`count` of those that are left."""

    def _some(self, count: int, without: Sequence[int] = ()) -> list[int]:
        """Candidates that are left, at random."""
        left = [index for index in self._left if index not in set(without)]
        picked = self.random.permutation(len(left))[:count]
        return [left[i] for i in picked]


class RandomSearch(Strategy):
    """Every candidate is as likely as another."""

    def _propose(self, count: int) -> list[int]:
        return self._some(count)


class Evolution(Strategy):
    """Changes one knob of a good candidate, or mixes two; no model, no estimate.

    Some newcomers are drawn at random, and a candidate may change its kernel too.
    """

    def __init__(self, options: Sequence[Option], seed: int) -> None:
        super().__init__(options, seed)
        self._at = {_gene(option.kernel, option.config): i for i, option in enumerate(options)}
        self._of_kernel: dict[str, list[int]] = defaultdict(list)
        self._values: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for index, option in enumerate(options):
            self._of_kernel[option.kernel].append(index)
            for name, value in option.config.items():
                known = self._values[option.kernel, name]
                if value not in known:
                    bisect.insort(known, value, key=lambda v: (isinstance(v, str), v))

    def _propose(self, count: int) -> list[int]:
        alive = [index for index, us in self.taken.items() if math.isfinite(us)]
        parents = sorted(alive, key=lambda index: (self.taken[index], index))[:PARENTS]
        newcomers = int(self.random.binomial(count, NEWCOMERS)) if parents else count
        found: list[int] = []
        for _ in range(TRIES * count):
            if len(found) >= count - newcomers:
                break
            child = self._child(parents)
            if child in self._left and child not in found:
                found.append(child)
        return found + self._some(count - len(found), found)

    def _child(self, parents: list[int]) -> int | None:
        one = self.options[self._any(parents)]
        kind = self.random.random()
        if kind < CHANGED_KERNEL:
            return self._any(self._of_kernel[self._any(list(self._of_kernel))])
        knobs = dict(one.config)
        if kind < CHANGED_KERNEL + MUTATION:
            name = self._any(sorted(knobs))
            knobs[name] = self._near(knobs[name], self._values[one.kernel, name])
        else:
            other = self.options[self._any(parents)]
            for name in sorted(knobs) if other.kernel == one.kernel else ():
                knobs[name] = self._any([knobs[name], other.config[name]])
        return self._at.get(_gene(one.kernel, knobs))

    def _near(self, value: Any, values: list[Any]) -> Any:
        """Another value, one or a few steps away in the order of the values."""
        step = int(self.random.geometric(0.5)) * self._any((-1, 1))
        return values[min(max(values.index(value) + step, 0), len(values) - 1)]

    def _any(self, values: Sequence[T]) -> T:
        return values[int(self.random.integers(len(values)))]


class History:
    """What layers have taught: features and the logarithm of time over estimate of each record.

    A model learns how wrong the estimate is, so what it has learned of one layer helps with the
    next, and where it knows nothing the estimate decides. `columns` are the features it looks at.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self._rows: deque[NDArray[np.float32]] = deque(maxlen=REMEMBERED)
        self._errors: deque[float] = deque(maxlen=REMEMBERED)
        self._model: Any = None

    def add(self, row: NDArray[np.float32], estimate_us: float, run_us: float) -> None:
        """A measurement; what failed teaches nothing."""
        if math.isfinite(run_us):
            self._rows.append(row)
            self._errors.append(math.log(max(run_us, FLOOR_US) / max(estimate_us, FLOOR_US)))
            self._model = None

    def learn(self, option: Option, run_us: float) -> None:
        """A measurement of a candidate that no search of this history has."""
        self.add(table([option.features], self.columns)[0], option.estimate_us, run_us)

    def errors(self, rows: NDArray[np.float32]) -> NDArray[np.float64] | None:
        """The logarithms of time over estimate; None before there is enough to learn from."""
        if len(self._rows) < LEAST_TO_FIT or not len(rows):
            return None
        import xgboost

        if self._model is None:
            labels = np.array(self._errors)
            data = xgboost.DMatrix(np.stack(self._rows), label=labels)
            settings = TREES | {"base_score": float(labels.mean())}
            self._model = xgboost.train(settings, data, num_boost_round=ROUNDS)
        return np.asarray(self._model.predict(xgboost.DMatrix(rows)), np.float64)


class ModelGuided(Strategy):
    """Measures what an XGBoost model, trained as records come in, says is fastest.

    Before there is a model the best by estimate of each kernel come first, in turns.
    """

    def __init__(self, options: Sequence[Option], seed: int, history: History) -> None:
        super().__init__(options, seed)
        self.history = history
        self._table = table([option.features for option in options], history.columns)
        self._estimates = np.array([max(option.estimate_us, FLOOR_US) for option in options])

    def observe(self, index: int, run_us: float) -> None:
        """Also teaches the model."""
        super().observe(index, run_us)
        self.history.add(self._table[index], self.options[index].estimate_us, run_us)

    def expected_us(self) -> NDArray[np.float64] | None:
        """What each candidate of `left` would take; None while there is no model."""
        left = self.left
        errors = self.history.errors(self._table[left])
        return None if errors is None else self._estimates[left] * np.exp(errors)

    def _propose(self, count: int) -> list[int]:
        left, times = self.left, self.expected_us()
        if times is None:
            return self._by_estimate(count)
        blind = int(self.random.binomial(count, RANDOM_SHARE))
        order = np.argsort(times, kind="stable")[: count - blind]
        found = [left[i] for i in order]
        return found + self._some(blind, found)

    def _by_estimate(self, count: int) -> list[int]:
        queues: dict[str, list[int]] = defaultdict(list)
        for index in sorted(self.left, key=lambda i: (self.options[i].estimate_us, i)):
            queues[self.options[index].kernel].append(index)
        in_turns = itertools.chain.from_iterable(itertools.zip_longest(*queues.values()))
        return [index for index in in_turns if index is not None][:count]


def make_strategy(
    name: StrategyName, options: Sequence[Option], seed: int, history: History
) -> Strategy:
    """The strategy of that name; `history` is what the model learns from, over all layers."""
    if name == "random":
        return RandomSearch(options, seed)
    if name == "evolution":
        return Evolution(options, seed)
    return ModelGuided(options, seed, history)


def search(
    strategy: Strategy, measure: Callable[[list[int]], Sequence[float]], trials: int, batch: int
) -> list[float]:
    """The microseconds of each trial in order, `batch` at a time: for one layer alone."""
    found: list[float] = []
    while len(found) < trials:
        proposed = strategy.propose(min(batch, trials - len(found)))
        if not proposed:
            break
        for index, us in zip(proposed, measure(proposed), strict=True):
            strategy.observe(index, us)
            found.append(us)
    return found


def _gene(kernel: str, config: Mapping[str, Any]) -> tuple[str, str]:
    return kernel, repr(sorted(config.items()))
