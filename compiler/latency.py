"""The latency model in use: trained from which logs, how good, and a network's prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.graph import Conv, Linear
from topiarist.compiler.model_files import open_model, open_source, serving
from topiarist.compiler.prices import SPARSE_KERNELS, Learned, Price, open_prices
from topiarist.compiler.read_graph import read_graph
from topiarist.compiler.recorded import Device, is_current
from topiarist.compiler.runtime import versions
from topiarist.errors import CostModelError, MissingRecordsError, ModelError
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.cost_model import Dataset, LatencyModel, is_usable, least
from topiarist.tuning_logs.evaluate import (
    FOLDS,
    Evaluation,
    cross_validated,
    evaluate_model,
    leave_one_out,
)
from topiarist.tuning_logs.record import Measured, TargetKey, TuningRecord, now
from topiarist.tuning_logs.roofline import Roofline
from topiarist.tuning_logs.sources import is_folder, logs_in
from topiarist.tuning_logs.store import TuningLog

Evaluations = dict[str, dict[Measured, Evaluation]]


@dataclass(frozen=True)
class Logs:
    """The usable records of logs, the name of each one's log, and what was left out."""

    data: Dataset
    groups: NDArray[np.str_]
    notes: tuple[str, ...]


def read_logs(
    paths: Iterable[Path], target: TargetSpec | None = None, threads: int | None = None
) -> Logs:
    """What logs have to learn from: of all targets, or of one's instructions and threads only.

    Folders stand for the logs in them. What several logs have belongs to the first. Raises
    TuningLogError, MissingRecordsError for a path that is not there or logs without a usable
    record.
    """
    files = list(_files(paths))
    records: list[TuningRecord] = []
    names: dict[tuple[str, Measured], str] = {}
    notes: list[str] = []
    old = 0
    for file, name in zip(files, _names(files), strict=True):
        log = TuningLog(file)
        for record in log.read():
            if is_usable(record) and _is_of(record.input.target, target, threads):
                if is_current(record.input):
                    records.append(record)
                    names.setdefault((record.input.key, record.measured), name)
                else:
                    old += 1
        notes += [f"skipped {defect}" for defect in log.defects]
    if old:
        notes.append(f"left out {old} records of other versions of TVM or of kernels")
    data = Dataset.of(records)
    if not len(data):
        raise MissingRecordsError(
            "; ".join(["the logs have no usable record", *notes])
            + ". `topiarist model collect` measures them"
        )
    places: dict[bool, Measured] = {False: "alone", True: "in network"}
    groups = [
        names[what.key, places[bool(in_network)]]
        for what, in_network in zip(data.inputs, data.in_network, strict=True)
    ]
    return Logs(data, np.array(groups, np.str_), tuple(notes))


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            raise MissingRecordsError(f"there is no tuning log {path}")
        yield from logs_in(path) if is_folder(path) else [path]


def _names(files: Sequence[Path]) -> list[str]:
    """The logs' names, with their folders where two have one name."""
    stems = [file.stem for file in files]
    return [
        str(file) if stems.count(stem) > 1 else stem
        for file, stem in zip(files, stems, strict=True)
    ]


def _is_of(key: TargetKey, target: TargetSpec | None, threads: int | None) -> bool:
    wanted = None if target is None else (target.family, target.isa, target.lanes)
    same = wanted in (None, (key.family, key.isa, key.lanes))
    return same and threads in (None, key.threads)


def evaluations(
    data: Dataset, groups: NDArray[np.str_], base: LatencyModel | None = None
) -> Evaluations:
    """The errors on records held out: a random part, then each log, if there are several.

    Nothing is held out where too little would be left to learn from; `base` is the model of another
    target to start from.
    """
    found: Evaluations = {}
    if len(data) - len(data) // FOLDS >= least(base):
        found["a fifth"] = cross_validated(data, groups, SPARSE_KERNELS, base)
    if len({*groups.tolist()}) > 1:
        found |= dict(leave_one_out(data, groups, SPARSE_KERNELS, base))
    return found


def evaluate_unseen(model: LatencyModel, data: Dataset) -> dict[Measured, Evaluation]:
    """The errors on the records that the model was not trained on; the others give baselines.

    Records of other targets are left out. Raises CostModelError if none is left.
    """
    ours = np.array([what.target == model.covers.target for what in data.inputs], np.bool_)
    if not ours.any():
        model.covers.check_target(data.inputs[0].target)
    data = data.where(ours)
    seen = model.has_seen(data)
    if seen.all():
        raise CostModelError(
            "the model was trained on all of these records; give it others "
            "(`topiarist model collect` measures new ones)"
        )
    return evaluate_model(model, data.where(seen), data.where(~seen), SPARSE_KERNELS)


def card_of(
    data: Dataset,
    groups: NDArray[np.str_],
    errors: Evaluations,
    base: LatencyModel | None = None,
) -> dict[str, Any]:
    """What a model's user should know: its data, versions, errors beside baselines, and alpha."""
    logs, counts = np.unique(groups, return_counts=True)
    roofline = Roofline.fit(data, SPARSE_KERNELS)
    return {
        "created": now(),
        "target": str(data.inputs[0].target),
        "versions": versions(),
        "records": len(data),
        "base": None if base is None else str(base.covers.target),
        "in network": int(data.in_network.sum()),
        "logs": {str(name): int(count) for name, count in zip(logs, counts, strict=True)},
        "roofline": None if roofline is None else roofline.to_json(),
        "errors": {
            name: {measured: e.to_json() for measured, e in found.items()}
            for name, found in errors.items()
        },
    }


@dataclass(frozen=True)
class PredictedLayer:
    """A layer with the zeros it has, and its price."""

    layer: str
    density: float
    pattern: str
    price: Price


@dataclass(frozen=True)
class Prediction:
    """The layers with weights in the best layouts; other work is not in the sums."""

    layers: tuple[PredictedLayer, ...]
    source: str

    @property
    def total_us(self) -> float:
        """The sum of the layers."""
        return sum(layer.price.run_us for layer in self.layers)

    @property
    def dense_us(self) -> float:
        """The sum with the best dense kernels."""
        return sum(layer.price.dense_us for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        sums = {"total_us": self.total_us, "dense_us": self.dense_us}
        layers = [
            {"layer": p.layer, "density": p.density, "pattern": p.pattern, **p.price.to_json()}
            for p in self.layers
        ]
        return {"source": self.source, **sums, "layers": layers}


def predict_network(
    model: Path, target: TargetSpec, threads: int = 1, latency_model: Path | None = None
) -> Prediction:
    """What each layer of an ONNX file takes, predicted. Raises ModelError, CostModelError."""
    source = open_source(target, threads, latency_model, Device.of(target, threads))
    graph = read_graph(model, target)
    prices = open_prices(graph, target, threads, source.pricer)[0]
    layers = []
    for name, node in prices.layers.items():
        pattern = prices.workloads[name].sparsity.pattern if isinstance(node, Conv) else "-"
        density = float(np.count_nonzero(node.weight)) / node.weight.size
        layers.append(PredictedLayer(name, density, pattern, prices.price(name)))
    return Prediction(tuple(layers), source.name)


def explain_network(
    model: Path,
    target: TargetSpec,
    threads: int,
    latency_model: Path | None,
    layer: str | None,
    count: int,
) -> dict[str, list[tuple[str, float]]]:
    """For each layer the features that move its prediction most, with their factors.

    Raises ModelError for an unknown layer, CostModelError.
    """
    key = Device.of(target, threads).key
    found, graph = serving(open_model(latency_model, key), key, target), read_graph(model, target)
    known = [node.name for node in graph.nodes if isinstance(node, Conv | Linear)]
    if layer is not None and layer not in known:
        raise ModelError(f"no layer is called {layer}; `topiarist inspect` lists them")
    prices = open_prices(graph, target, threads, Learned(found))[0]
    names = [layer] if layer is not None else list(prices.layers)
    return {name: found.contributions(prices.price(name).what, count) for name in names}
