"""The latency model: XGBoost regression of a kernel's time, learned from tuning records.

It predicts microseconds, not ranks, so that layers, patterns and targets can be compared and added
up. The time of a kernel alone is learned first, as a correction of a count of cycles; what a
network adds to it (inputs that the layer before left in another cache) is learned on top, with few
and small trees, since times in a network scatter. A third regression learns how far times exceed
the prediction, for those who have to keep a promise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.errors import CostModelError
from topiarist.tuning_logs import boosters
from topiarist.tuning_logs import features as feature_set
from topiarist.tuning_logs.boosters import Booster, Floats, Rows
from topiarist.tuning_logs.features import Features, columns_of, features, table
from topiarist.tuning_logs.record import Measured, MeasureInput, TargetKey, TuningRecord

FORMAT = "topiarist latency model"
_AGAIN = "train it again (`topiarist model train`)"
_TO_JSON = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False)
SCHEMA = 1
UPPER = 0.9  # the quantile of the third regression
LEAST = 100  # records to train from
FOLDS = 3
ID_DIGITS = 10  # of a key: two of a million records share them once in a while
_CYCLES = "log_cycles"
_NO_KERNELS = ("network", "metaschedule")  # records of whole networks, and TVM's own schedules
_COMMON = {"tree_method": "hist", "seed": 0, "subsample": 0.8}
_ALONE = _COMMON | {
    "objective": "reg:squarederror",
    "max_depth": 7,
    "eta": 0.08,
    "colsample_bytree": 0.4,
    "min_child_weight": 2,
}
_IN_NETWORK = _COMMON | {
    "objective": "reg:squarederror",
    "max_depth": 4,
    "eta": 0.05,
    "colsample_bytree": 0.4,
    "min_child_weight": 20,
}
_UPPER = _COMMON | {
    "objective": "reg:quantileerror",
    "quantile_alpha": UPPER,
    "max_depth": 3,
    "eta": 0.1,
    "min_child_weight": 20,
}
_GEOMETRY = ("in_channels", "height", "width", "out_channels", "kernel", "strides", "groups")
ROUNDS = {"alone": 400, "in network": 80, "upper": 40}


@dataclass(frozen=True)
class Dataset:
    """Candidates as rows of features, whether they ran in a network, and their microseconds."""

    inputs: tuple[MeasureInput, ...]
    rows: tuple[Features, ...]
    in_network: NDArray[np.bool_]
    run_us: Floats

    @staticmethod
    def of(records: Iterable[TuningRecord]) -> Dataset:
        """The records of our kernels that have a valid time and were not disturbed.

        Of repeated measurements the median counts.
        """
        found: dict[tuple[str, Measured], tuple[MeasureInput, list[float]]] = {}
        for record in records:
            if is_usable(record):
                key = record.input.key, record.measured
                found.setdefault(key, (record.input, []))[1].append(record.run_us)
        return Dataset(
            tuple(what for what, _ in found.values()),
            tuple(features(what) for what, _ in found.values()),
            np.array([measured == "in network" for _, measured in found], np.bool_),
            np.array([np.median(times) for _, times in found.values()], np.float64),
        )

    @staticmethod
    def joined(parts: Sequence[Dataset]) -> Dataset:
        """One after the other."""
        return Dataset(
            tuple(what for part in parts for what in part.inputs),
            tuple(row for part in parts for row in part.rows),
            np.concatenate([np.zeros(0, np.bool_), *(part.in_network for part in parts)]),
            np.concatenate([np.zeros(0), *(part.run_us for part in parts)]),
        )

    @property
    def ids(self) -> list[str]:
        """A short text per candidate that tells it from others, also alone from in a network."""
        return [
            what.key[:ID_DIGITS] + ("n" if in_network else "")
            for what, in_network in zip(self.inputs, self.in_network, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.inputs)

    def where(self, chosen: NDArray[np.bool_]) -> Dataset:
        """A part of it."""
        at = np.flatnonzero(chosen)
        return Dataset(
            tuple(self.inputs[i] for i in at),
            tuple(self.rows[i] for i in at),
            self.in_network[at],
            self.run_us[at],
        )


def is_usable(record: TuningRecord) -> bool:
    """Whether a record is of one of our kernels and has a time that can be believed."""
    ours = record.input.kernel not in _NO_KERNELS
    return ours and record.status == "ok" and not record.disturbed


def layer_of(what: MeasureInput) -> str:
    """A layer's geometry as text: what candidates share that differ in zeros, kernel and layout."""
    w = what.workload
    names = _GEOMETRY if "in_channels" in w else sorted(w.keys() - {"sparsity", "activation"})
    return json.dumps([(name, w.get(name)) for name in names])


class LatencyModel:
    """Predicts microseconds of candidates on the target that it was trained for."""

    def __init__(
        self,
        columns: Sequence[str],
        trained: Mapping[str, Booster],
        covers: Covers,
        card: Mapping[str, Any],
        seen: Iterable[str] = (),
    ) -> None:
        self.columns = list(columns)
        self.covers = covers
        self.card = dict(card)
        self.seen = frozenset(seen)
        self._boosters = dict(trained)

    @staticmethod
    def train(data: Dataset, card: Mapping[str, Any] | None = None) -> LatencyModel:
        """Learn from records. Raises CostModelError if they are too few or of several targets."""
        if len(data) < LEAST:
            raise CostModelError(
                f"{len(data)} usable records are too few to learn from, {LEAST} are the least and "
                "thousands are needed for a good model: `topiarist model collect` measures them"
            )
        covers = Covers.of(data.inputs)
        columns = columns_of(data.rows)
        matrix = table(data.rows, columns)
        trained = _fit(matrix, columns, data)
        trained["upper"] = _fit_upper(matrix, columns, data)
        return LatencyModel(columns, trained, covers, card or {}, data.ids)

    def has_seen(self, data: Dataset) -> NDArray[np.bool_]:
        """Which of the candidates the model was trained on."""
        return np.array([name in self.seen for name in data.ids], np.bool_)

    def predict_us(self, inputs: Sequence[MeasureInput], measured: Measured) -> Floats:
        """The expected microseconds of each candidate, alone or in a network.

        Raises CostModelError, naming it, for a candidate that the model does not cover.
        """
        return self.predict_rows_us(self._rows(inputs), measured)

    def expected_and_upper_us(
        self, inputs: Sequence[MeasureInput], measured: Measured
    ) -> tuple[Floats, Floats]:
        """As `predict_us`, and what each takes at most in nine of ten cases, in microseconds."""
        rows = self._rows(inputs)
        expected = self.predict_rows_us(rows, measured)
        places = _with_place(rows, np.full(len(rows), measured == "in network"))
        return expected, expected * np.exp(self._predict("upper", places))

    def predict_rows_us(self, rows: Rows, measured: Measured) -> Floats:
        """As `predict_us`, of rows of `columns`."""
        found = rows[:, self.columns.index(_CYCLES)].astype(np.float64)
        found += self._predict("alone", rows)
        if measured == "in network":
            found += self._predict("in network", rows)
        return np.exp(found)

    def contributions(self, what: MeasureInput, count: int) -> list[tuple[str, float]]:
        """The features that move the prediction most, with the factor of each."""
        shares = boosters.contributions(self._boosters["alone"], self._rows([what]))
        order = np.argsort(-np.abs(shares), kind="stable")[:count]
        return [(self.columns[i], float(np.exp(shares[i]))) for i in order]

    def _rows(self, inputs: Sequence[MeasureInput]) -> Rows:
        for what in inputs:
            self.covers.check(what)
        return table([features(what) for what in inputs], self.columns)

    def _predict(self, name: str, rows: Rows) -> Floats:
        booster = self._boosters.get(name)
        return np.zeros(len(rows)) if booster is None else boosters.predict(booster, rows)

    def save(self, path: Path) -> None:
        """Write one JSON file. Raises OSError."""
        document = {
            "format": FORMAT,
            "schema": SCHEMA,
            "features": feature_set.VERSION,
            "columns": self.columns,
            "covers": self.covers.to_json(),
            "card": self.card,
            "boosters": {name: boosters.to_json(one) for name, one in self._boosters.items()},
            "seen": sorted(self.seen),
        }
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_text(_TO_JSON.encode(document) + "\n")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> LatencyModel:
        """Read what `save` wrote. Raises CostModelError saying what is wrong with it."""
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise CostModelError(
                f"there is no latency model {path}; `topiarist model train` makes one"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise CostModelError(f"{path} is no latency model, or a torn one: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CostModelError(f"{path} is no latency model")
        if (document.get("schema"), document.get("features")) != (SCHEMA, feature_set.VERSION):
            raise CostModelError(
                f"{path} was made by another version of topiarist, for other features; {_AGAIN}"
            )
        try:
            return _from_json(document)
        except KeyError as error:
            raise CostModelError(f"{path} is broken, it lacks {error}; {_AGAIN}") from error
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CostModelError(f"{path} is broken, {error}; {_AGAIN}") from error


def _from_json(document: dict[str, Any]) -> LatencyModel:
    """The inverse of `LatencyModel.save`. Raises KeyError, TypeError, ValueError and others."""
    columns = [str(name) for name in document["columns"]]
    if _CYCLES not in columns or len({*columns}) < len(columns):
        raise ValueError("its features make no sense")
    places = len(columns) + 1
    features_of = {"alone": len(columns), "in network": len(columns), "upper": places}
    trained = {
        name: boosters.from_json(value, features_of[name])
        for name, value in document["boosters"].items()
    }
    if not {"alone", "upper"} <= trained.keys():
        raise ValueError("it lacks a regression")
    covers, card = Covers.from_json(document["covers"]), document["card"]
    return LatencyModel(columns, trained, covers, dict(card), map(str, document["seen"]))


@dataclass(frozen=True)
class Covers:
    """What a model was trained for: one target, one TVM, kernels of these versions."""

    target: TargetKey
    tvm: str
    kernels: Mapping[str, int]

    @staticmethod
    def of(inputs: Sequence[MeasureInput]) -> Covers:
        """What records, at least one, have in common. Raises CostModelError if that isn't all."""
        targets = {what.target_key for what in inputs}
        tvms = {what.versions["apache-tvm"] for what in inputs}
        kernels = {(what.kernel, what.kernel_version) for what in inputs}
        names = [name for name, _ in kernels]
        several = {f"{name} {number}" for name, number in kernels if names.count(name) > 1}
        mixed = [
            f"{what} {', '.join(sorted(found))}"
            for what, found in (("targets", targets), ("TVM", tvms), ("kernels", several))
            if len(found) > 1
        ]
        if mixed:
            raise CostModelError(
                "a model learns from one target, one TVM and one version of each kernel; these "
                f"records are of the {'; '.join(mixed)}. Give logs of one, or choose "
                "(`topiarist model train --target T --threads N`)"
            )
        return Covers(inputs[0].target, inputs[0].versions["apache-tvm"], dict(kernels))

    def check(self, what: MeasureInput) -> None:
        """Raises CostModelError if a candidate is for something else."""
        self.check_target(what.target)
        tvm = what.versions["apache-tvm"]
        if tvm != self.tvm:
            raise CostModelError(
                f"the latency model is for TVM {self.tvm}, not for {tvm}: {_AGAIN}"
            )
        known = self.kernels.get(what.kernel)
        if known is not None and known != what.kernel_version:
            raise CostModelError(
                f"the latency model knows version {known} of {what.kernel}, not version "
                f"{what.kernel_version}: {_AGAIN}"
            )

    def check_target(self, target: TargetKey) -> None:
        """Raises CostModelError for another target."""
        if target != self.target:
            raise CostModelError(
                f"the latency model is for {self.target}, not for {target}: train one from "
                "records of that target (`topiarist model collect`, `topiarist model train`)"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"target": self.target.to_json(), "tvm": self.tvm, "kernels": dict(self.kernels)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Covers:
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError."""
        kernels = {str(name): int(version) for name, version in values["kernels"].items()}
        return Covers(TargetKey(**values["target"]), str(values["tvm"]), kernels)


def _fit(matrix: Rows, columns: Sequence[str], data: Dataset) -> dict[str, Booster]:
    """The regressions of the time alone and of what a network adds.

    Where nothing was timed alone, the first learns from times in networks.
    """
    scale = matrix[:, columns.index(_CYCLES)].astype(np.float64)
    labels = np.log(data.run_us) - scale
    alone = ~data.in_network if not data.in_network.all() else data.in_network
    alone_booster = boosters.fit(_ALONE, matrix[alone], labels[alone], ROUNDS["alone"])
    if alone.all():
        return {"alone": alone_booster}
    rest = matrix[~alone]
    added = labels[~alone] - boosters.predict(alone_booster, rest)
    in_network = boosters.fit(_IN_NETWORK, rest, added, ROUNDS["in network"])
    return {"alone": alone_booster, "in network": in_network}


def _fit_upper(matrix: Rows, columns: Sequence[str], data: Dataset) -> Booster:
    """How far times exceed predictions by models that have not seen the layer."""
    fold = _folds(data)
    errors = np.full(len(data), np.nan)
    for k in range(FOLDS):
        test = fold == k
        if not test.any() or len(data) - test.sum() < LEAST // 2:
            continue
        seen = data.where(~test)
        part = LatencyModel(columns, _fit(matrix[~test], columns, seen), Covers.of(seen.inputs), {})
        for in_network in (False, True):
            at = test & (data.in_network == in_network)
            measured: Measured = "in network" if in_network else "alone"
            errors[at] = np.log(data.run_us[at] / part.predict_rows_us(matrix[at], measured))
    known = ~np.isnan(errors)
    rows = _with_place(matrix, data.in_network)[known]
    return boosters.fit(_UPPER, rows, errors[known], ROUNDS["upper"])


def _folds(data: Dataset) -> NDArray[np.int_]:
    """Parts that share no layer; where there are too few layers, any parts."""
    _, layers = np.unique([layer_of(what) for what in data.inputs], return_inverse=True)
    return (layers if layers.max() >= FOLDS - 1 else np.arange(len(data))) % FOLDS


def _with_place(rows: Rows, in_network: NDArray[np.bool_]) -> Rows:
    """With a column more: how far times scatter depends on where they were taken."""
    return np.column_stack([rows, in_network.astype(np.float32)])
