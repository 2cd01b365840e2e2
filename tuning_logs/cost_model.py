"""The latency model: XGBoost regression of a kernel's time, learned from tuning records.

It predicts microseconds, not ranks, so that layers, patterns and targets can be compared and added
up. The time of a kernel alone is a sum of what it does (`costs.py`), corrected by trees; what a
network adds to it (inputs that the layer before left in another cache) is learned on top, with few
and small trees, since times in a network scatter. A third regression learns how far times exceed
the prediction, for those who have to keep a promise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.errors import CostModelError
from topiarist.tuning_logs import boosters
from topiarist.tuning_logs import features as feature_set
from topiarist.tuning_logs.boosters import Floats, Rows
from topiarist.tuning_logs.features import Features, columns_of, features, table
from topiarist.tuning_logs.pace import Pace
from topiarist.tuning_logs.record import (
    DRIFT_LIMIT,
    Measured,
    MeasureInput,
    TargetKey,
    TuningRecord,
)
from topiarist.tuning_logs.regressions import Regressions, Times

FORMAT = "topiarist latency model"
_AGAIN = "train it again (`topiarist model train`)"
_TO_JSON = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False)
SCHEMA = 2  # 2: costs
LEAST = 100  # records to train from
LEAST_TO_ADAPT = 20  # a model of another target
CORRECTED = 1.5  # drift up to which a slow machine is taken out of times; more was no steady state
ID_DIGITS = 10  # of a key: two of a million records share them once in a while
_NO_KERNELS = ("network", "metaschedule")  # records of whole networks, and TVM's own schedules
_GEOMETRY = ("in_channels", "height", "width", "out_channels", "kernel", "strides", "groups")


@dataclass(frozen=True)
class Dataset:
    """Candidates as rows of features, whether they ran in a network, and their microseconds."""

    inputs: tuple[MeasureInput, ...]
    rows: tuple[Features, ...]
    in_network: NDArray[np.bool_]
    run_us: Floats

    @staticmethod
    def of(records: Iterable[TuningRecord]) -> Dataset:
        """The usable records, their times at the usual pace of the machine (`pace.py`).

        Of repeated measurements the median counts.
        """
        usable = [record for record in records if is_usable(record)]
        pace = Pace.of(usable)
        found: dict[tuple[str, Measured], tuple[MeasureInput, list[float]]] = {}
        for record in usable:
            key = record.input.key, record.measured
            found.setdefault(key, (record.input, []))[1].append(pace.run_us(record))
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
    """Whether a record is of one of our kernels and has a time that can be believed.

    That of a disturbed machine can, up to `CORRECTED`, if the record says how slow it was.
    """
    ours = record.input.kernel not in _NO_KERNELS
    limit = DRIFT_LIMIT if record.reference_us is None else CORRECTED
    return ours and record.status == "ok" and (record.drift is None or record.drift <= limit)


def layer_of(what: MeasureInput) -> str:
    """A layer's geometry as text: what candidates share that differ in zeros, kernel and layout."""
    w = what.workload
    names = _GEOMETRY if "in_channels" in w else sorted(w.keys() - {"sparsity", "activation"})
    return json.dumps([(name, w.get(name)) for name in names])


def least(base: LatencyModel | None) -> int:
    """The fewest records to learn from, with or without the model of another target."""
    return LEAST if base is None else LEAST_TO_ADAPT


class LatencyModel:
    """Predicts microseconds of candidates on the target that it was trained for."""

    def __init__(
        self,
        learned: Regressions,
        covers: Covers,
        card: Mapping[str, Any],
        seen: Iterable[str] = (),
    ) -> None:
        self.learned = learned
        self.columns = list(learned.columns)
        self.covers = covers
        self.card = dict(card)
        self.seen = frozenset(seen)

    @staticmethod
    def train(
        data: Dataset,
        card: Mapping[str, Any] | None = None,
        *,
        groups: NDArray[np.str_] | None = None,
        base: LatencyModel | None = None,
    ) -> LatencyModel:
        """Learn from records; `groups` are the names of their networks, where they are known.

        With `base`, the model of another target, few records change what that has learned.
        Raises CostModelError if they are too few or of several targets.
        """
        if len(data) < least(base):
            raise CostModelError(
                f"{len(data)} usable records are too few to learn from, {least(base)} are the "
                "least and "
                "thousands are needed for a good model: `topiarist model collect` measures them"
                + ("; a hundred do with the model of another target (`--base`)" if base is None
                   else "")
            )  # fmt: skip
        covers = Covers.of(data.inputs)
        if base is not None:
            covers = replace(covers, kernels={**base.covers.kernels, **covers.kernels})
        columns = columns_of(data.rows) if base is None else base.columns
        layers = np.array([layer_of(what) for what in data.inputs], np.str_)
        rows = table(data.rows, columns)
        times = Times(rows, columns, data.in_network, data.run_us, layers, groups)
        learned = Regressions.fit(times, None if base is None else base.learned)
        return LatencyModel(learned, covers, card or {}, data.ids)

    def standing_for(self, target: TargetKey) -> LatencyModel:
        """The same predictions for another device."""
        covers = replace(self.covers, target=target)
        return LatencyModel(self.learned, covers, self.card, self.seen)

    def has_seen(self, data: Dataset) -> NDArray[np.bool_]:
        """Which of the candidates the model was trained on."""
        return np.array([name in self.seen for name in data.ids], np.bool_)

    def predict_us(self, inputs: Sequence[MeasureInput], measured: Measured) -> Floats:
        """The expected microseconds of each candidate, alone or in a network.

        Raises CostModelError, naming it, for a candidate that the model does not cover.
        """
        return self.learned.predict_us(self._rows(inputs), measured == "in network")

    def expected_and_upper_us(
        self, inputs: Sequence[MeasureInput], measured: Measured
    ) -> tuple[Floats, Floats]:
        """As `predict_us`, and what each takes at most in nine of ten cases, in microseconds."""
        rows, in_network = self._rows(inputs), measured == "in network"
        return self.learned.predict_us(rows, in_network), self.learned.upper_us(rows, in_network)

    def contributions(self, what: MeasureInput, count: int) -> list[tuple[str, float]]:
        """The features that correct the sum of costs most, with the factor of each."""
        shares = boosters.contributions(self.learned.alone, self._rows([what]))
        order = np.argsort(-np.abs(shares), kind="stable")[:count]
        return [(self.columns[i], float(np.exp(shares[i]))) for i in order]

    def _rows(self, inputs: Sequence[MeasureInput]) -> Rows:
        for what in inputs:
            self.covers.check(what)
        return table([features(what) for what in inputs], self.columns)

    def save(self, path: Path) -> None:
        """Write one JSON file. Raises OSError."""
        document = {
            "format": FORMAT,
            "schema": SCHEMA,
            "features": feature_set.version(self.covers.target.family),
            "columns": self.columns,
            "covers": self.covers.to_json(),
            "card": self.card,
            "seen": sorted(self.seen),
            **self.learned.to_json(),
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
        if (document.get("schema"), document.get("features")) != (SCHEMA, _version(document)):
            raise CostModelError(
                f"{path} was made by another version of topiarist, for other features; {_AGAIN}"
            )
        try:
            return _from_json(document)
        except KeyError as error:
            raise CostModelError(f"{path} is broken, it lacks {error}; {_AGAIN}") from error
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CostModelError(f"{path} is broken, {error}; {_AGAIN}") from error


def _version(document: Mapping[str, Any]) -> int:
    """That of today's features for what the model is for."""
    try:
        return feature_set.version(str(document["covers"]["target"]["family"]))
    except (KeyError, TypeError):
        return feature_set.VERSION


def _from_json(document: dict[str, Any]) -> LatencyModel:
    """The inverse of `LatencyModel.save`. Raises KeyError, TypeError, ValueError and others."""
    columns = [str(name) for name in document["columns"]]
    if len({*columns}) < len(columns):
        raise ValueError("its features make no sense")
    learned = Regressions.from_json(columns, document)
    covers, card = Covers.from_json(document["covers"]), document["card"]
    return LatencyModel(learned, covers, dict(card), map(str, document["seen"]))


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
