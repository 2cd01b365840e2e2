"""How good a latency model is, on records that it was not trained on, and beside two baselines.

Baselines: a constant time per multiply-add on nonzeros, and the time of the nearest record.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree
from scipy.stats import kendalltau, spearmanr

from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.cost_model import Dataset, LatencyModel, layer_of, least
from topiarist.tuning_logs.features import columns_of, table
from topiarist.tuning_logs.record import Measured
from topiarist.tuning_logs.roofline import LayerWork

WITHIN = 0.1
TOP = 8
LEAST_CANDIDATES = 16  # at a site, for the best of the top eight to say anything
NEAR = 0.01
FOLDS = 5

Predict = Callable[[Dataset], Floats]  # microseconds of each candidate


@dataclass(frozen=True)
class Scores:
    """Errors relative to the measured time; `pairwise`: share of pairs in the right order.

    Pairs of one prediction count half. `total` is the error of the sum of all times. NaN where
    there is nothing to compare.
    """

    records: int
    mape: float
    median: float
    within_10: float
    spearman: float
    pairwise: float
    total: float

    @staticmethod
    def of(predicted: Floats, measured: Floats) -> Scores:
        """Of two lists of times."""
        if not len(measured):
            return Scores(0, *[math.nan] * 6)
        errors = np.abs(predicted / measured - 1)
        ranks = len({*predicted.tolist()}) > 1 and len({*measured.tolist()}) > 1
        return Scores(
            records=len(measured),
            mape=float(errors.mean()),
            median=float(np.median(errors)),
            within_10=float((errors <= WITHIN).mean()),
            spearman=float(spearmanr(predicted, measured)[0]) if ranks else math.nan,
            pairwise=_in_order(predicted, measured) if ranks else math.nan,
            total=float(predicted.sum() / measured.sum() - 1),
        )


@dataclass(frozen=True)
class Decisions:
    """Choices made by predictions, where several candidates of a layer were measured.

    `right`: share of sites where the faster of the best dense and the best sparse kernel was
    predicted; `regret`: the time lost by all such choices, relative to the best. `top_8`: share
    of sites with many candidates where the best of the eight predicted fastest is within 1 % of
    the best of all; `top_8_regret` the mean loss there.
    """

    sites: int
    right: float
    regret: float
    top_8_sites: int
    top_8: float
    top_8_regret: float


@dataclass(frozen=True)
class Evaluation:
    """All of it for one set of records; `covered`: times at most the predicted upper quantile."""

    model: Scores
    flops: Scores
    nearest: Scores
    decisions: Decisions
    covered: float

    def to_json(self) -> dict[str, object]:
        """As plain JSON values, null for NaN."""
        return {
            name: {key: _or_none(number) for key, number in value.items()}
            if isinstance(value, dict)
            else _or_none(value)
            for name, value in asdict(self).items()
        }


def evaluate(
    train: Dataset,
    test: Dataset,
    sparse: frozenset[str],
    groups: NDArray[np.str_] | None = None,
    base: LatencyModel | None = None,
) -> dict[Measured, Evaluation]:
    """Train on one part, of these networks, and look at the other. Raises CostModelError."""
    model = LatencyModel.train(train, groups=groups, base=base)
    return evaluate_model(model, train, test, sparse)


def evaluate_model(
    model: LatencyModel, train: Dataset, test: Dataset, sparse: frozenset[str]
) -> dict[Measured, Evaluation]:
    """Look at a model's predictions of `test`; baselines are fitted to `train`.

    For times alone and in a network, as far as there are any; `sparse` are the kernels that skip
    zeros.
    """
    return dict(_evaluations(model, train, test, sparse))


def cross_validated(
    data: Dataset,
    groups: NDArray[np.str_],
    sparse: frozenset[str],
    base: LatencyModel | None = None,
) -> dict[Measured, Evaluation]:
    """In the distribution: a random fifth of the records is held out. Raises CostModelError."""
    order = np.random.default_rng(0).permutation(len(data))
    held_out = np.zeros(len(data), np.bool_)
    held_out[order[: len(data) // FOLDS]] = True
    seen = data.where(~held_out)
    return evaluate(seen, data.where(held_out), sparse, groups[~held_out], base)


def leave_one_out(
    data: Dataset,
    groups: NDArray[np.str_],
    sparse: frozenset[str],
    base: LatencyModel | None = None,
) -> Iterator[tuple[str, dict[Measured, Evaluation]]]:
    """For each group, a network's records, train on the others without any layer of that group.

    Layers are alike if they have the same geometry, whatever their zeros and wherever measured. A
    group is skipped where too few records are left to learn from.
    """
    layers = np.array([layer_of(what) for what in data.inputs])
    for name in sorted({*groups.tolist()}):
        test = groups == name
        others = ~test & ~np.isin(layers, np.unique(layers[test]))
        if others.sum() >= least(base):
            found = evaluate(data.where(others), data.where(test), sparse, groups[others], base)
            yield name, found


def _evaluations(
    model: LatencyModel, train: Dataset, test: Dataset, sparse: frozenset[str]
) -> Iterator[tuple[Measured, Evaluation]]:
    measures: tuple[Measured, ...] = ("alone", "in network")
    for measured in measures:
        part = test.where(test.in_network == (measured == "in network"))
        like = train.where(train.in_network == (measured == "in network"))
        if not len(part):
            continue
        predicted, upper = model.expected_and_upper_us(part.inputs, measured)
        yield (
            measured,
            Evaluation(
                model=Scores.of(predicted, part.run_us),
                flops=Scores.of(flop_baseline(like)(part), part.run_us),
                nearest=Scores.of(nearest_baseline(like)(part), part.run_us),
                decisions=decisions(part, predicted, sparse),
                covered=float((part.run_us <= upper).mean()),
            ),
        )


def flop_baseline(train: Dataset) -> Predict:
    """A constant time per multiply-add on nonzeros, the typical one, whatever the kernel."""

    def work(data: Dataset) -> Floats:
        layers = [LayerWork.of(what) for what in data.inputs]
        return np.array(
            [
                row.get("log_bytes_moved", 0.0)
                if layer is None
                else math.log(max(layer.nonzero_flops, 1.0))
                for row, layer in zip(data.rows, layers, strict=True)
            ]
        )

    if not len(train):
        return lambda data: np.full(len(data), math.nan)
    rate = float(np.median(np.log(train.run_us) - work(train)))
    return lambda data: np.exp(work(data) + rate)


def nearest_baseline(train: Dataset) -> Predict:
    """The time of the record whose features, each in its standard deviations, are nearest."""
    if not len(train):
        return lambda data: np.full(len(data), math.nan)
    columns = columns_of(train.rows)

    def points(data: Dataset) -> NDArray[np.float32]:
        return np.nan_to_num(table(data.rows, columns), nan=0.0)

    known = points(train)
    scale = known.std(axis=0)
    scale[scale == 0] = 1.0
    tree = KDTree(known / scale)
    return lambda data: train.run_us[tree.query(points(data) / scale)[1]]


def _in_order(predicted: Floats, measured: Floats) -> float:
    """The share of pairs of different times that are predicted in that order.

    From Kendall's tau-b, whose scale counts pairs that are tied on either side.
    """

    def pairs(counts: NDArray[np.int_]) -> float:
        return float((counts * (counts - 1.0)).sum() / 2)

    every = len(measured) * (len(measured) - 1) / 2
    untied = [every - pairs(np.unique(x, return_counts=True)[1]) for x in (predicted, measured)]
    surplus = kendalltau(predicted, measured)[0] * math.sqrt(untied[0] * untied[1])
    return float(surplus / untied[1] + 1) / 2


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def decisions(data: Dataset, predicted: Floats, sparse: frozenset[str]) -> Decisions:
    """What choosing by prediction would have cost, at the sites with several candidates."""
    sites: Mapping[tuple[str, ...], list[int]] = defaultdict(list)
    for i, what in enumerate(data.inputs):
        if "in_channels" in what.workload:
            sites[what.workload_key, *what.layouts].append(i)
    right: list[bool] = []
    losses: list[float] = []
    top: list[float] = []
    for at in (np.array(indices) for indices in sites.values()):
        kinds = np.array([data.inputs[i].kernel in sparse for i in at])
        times, guesses = data.run_us[at], predicted[at]
        if kinds.any() and not kinds.all():
            better = times[kinds].min() < times[~kinds].min()
            chosen = guesses[kinds].min() < guesses[~kinds].min()
            right.append(bool(better == chosen))
            losses.append(times[kinds == chosen].min() / times.min() - 1)
        if len(at) >= LEAST_CANDIDATES:
            top.append(times[np.argsort(guesses, kind="stable")[:TOP]].min() / times.min() - 1)
    return Decisions(
        sites=len(right),
        right=float(np.mean(right)) if right else math.nan,
        regret=float(np.mean(losses)) if losses else math.nan,
        top_8_sites=len(top),
        top_8=float((np.array(top) <= NEAR).mean()) if top else math.nan,
        top_8_regret=float(np.mean(top)) if top else math.nan,
    )
