"""The reconstructions of a network's layers, in a folder that grows and survives being killed.

A file per layer with the moments of its inputs, and one per layer and pattern with the order in
which weights go. The order gives every density; weights are solved for when they are asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.errors import ModelError, OutputError
from topiarist.pruning.batch_scale import output_scale
from topiarist.pruning.calibration import Images
from topiarist.pruning.cores import one_blas_thread
from topiarist.pruning.layers import WeightedLayer, weighted_layers
from topiarist.pruning.level import DENSE, Level, levels_of
from topiarist.pruning.moments import PASS_BYTES, Moments, gather_moments, moments_bytes
from topiarist.pruning.obs import Array, Removals
from topiarist.pruning.obs_rounds import EXACT_COLUMNS
from topiarist.pruning.one_shot import reasons_to_keep
from topiarist.pruning.patterns import Mask
from topiarist.pruning.removal import (
    WIDE,
    Criterion,
    kept,
    losses,
    order_removals,
    output_energy,
    refuses,
    solve,
)

FORMAT = 1
MANIFEST = "reconstruction.json"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class BuildStep:
    """What is being made, for a progress display; `share` 0..1 of the whole work."""

    layer: str
    what: str
    share: float


ProgressCall = Callable[[BuildStep], None]


@dataclass(frozen=True)
class Database:
    """What every layer can be pruned to, and what that costs; see `build_database`."""

    criterion: Criterion
    entries: dict[str, _Entry]

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that can be pruned, in file order."""
        return tuple(self.entries)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns that any layer can be pruned to."""
        levels = (level for entry in self.entries.values() for level in entry.errors)
        return tuple(dict.fromkeys(level.pattern for level in levels))

    def levels(self, layer: str) -> tuple[Level, ...]:
        """What a layer can be pruned to beyond the zeros that it has; without dense."""
        return tuple(self.entries[layer].errors)

    def error(self, layer: str, level: Level) -> float:
        """||W^ X - W X||^2 / ||W X||^2 of the layer's output, as a batch norm after it scales it.

        0 for dense.
        """
        return 0.0 if level == DENSE else self._entry(layer, level).errors[level]

    def masks(self, layer: str, levels: Sequence[Level]) -> Iterator[Mask]:
        """Which weights [O, C / groups, kh, kw] stay at each of the levels, without dense."""
        removals: dict[str, Removals] = {}
        for level in levels:
            entry = self._entry(layer, level)
            if level.pattern not in removals:
                path = entry.removals_file(level.pattern)
                removals[level.pattern], _ = _read_removals(path, entry.key)
            yield kept(entry.layer, removals[level.pattern], level)

    def weight(self, layer: str, level: Level) -> NDArray[np.float32]:
        """The weights [O, C / groups, kh, kw] at a level."""
        if level == DENSE:
            return self.entries[layer].layer.weight.astype(np.float32)
        entry = self._entry(layer, level)
        (mask,) = self.masks(layer, [level])
        if self.criterion == "magnitude":
            return np.where(mask, entry.layer.weight, 0).astype(np.float32)
        with one_blas_thread():
            return solve(entry.layer, mask, _read_moments(entry.moments_file, entry.key))

    def _entry(self, layer: str, level: Level) -> _Entry:
        entry = self.entries[layer]
        if level not in entry.errors:
            raise ValueError(f"{layer} has no level {level}; see Database.levels")
        return entry


@dataclass(frozen=True)
class _Entry:
    """A layer, its files, and its errors by level."""

    layer: WeightedLayer
    stem: Path
    criterion: Criterion
    key: str
    errors: dict[Level, float]

    @property
    def moments_file(self) -> Path:
        """Where the moments of its inputs are."""
        return self.stem.with_name(f"{self.stem.name}.moments.npz")

    def removals_file(self, pattern: str) -> Path:
        """Where the order for a pattern is."""
        kind = pattern.replace(":", "of")
        return self.stem.with_name(f"{self.stem.name}.{self.criterion}.{kind}.npz")


def build_database(
    model: onnx.ModelProto,
    images: Images,
    folder: Path,
    *,
    patterns: Sequence[str] = ("unstructured",),
    layers: Sequence[str] | None = None,
    criterion: Criterion = "obs",
    progress: ProgressCall = lambda step: None,
) -> Database:
    """Calibrate the model's layers for these patterns; what the folder already has is used.

    `layers` are names; without them all convolutions that one-shot pruning would prune. Raises
    ValueError for wrong names or patterns, CalibrationError for images that say nothing about a
    layer, OutputError where the folder is of another model or images or can't be written; what
    was done by then stays.
    """
    for pattern in patterns:
        levels_of(pattern)
    key = _prepare(folder, model, images)
    entries = _entries(model, folder, _chosen(model, layers), criterion, key)
    with one_blas_thread():
        _Builder(model, images, entries, tuple(dict.fromkeys(patterns)), progress).run()
    return Database(criterion, {entry.layer.name: entry for entry in entries})


def prunable_layers(model: onnx.ModelProto) -> list[WeightedLayer]:
    """The layers that are pruned unless others are named."""
    reasons = reasons_to_keep(model, weighted_layers(model))
    return [
        layer
        for layer in weighted_layers(model)
        if layer.weight_name not in reasons and refuses_any(model, layer) is None
    ]


def refuses_any(model: onnx.ModelProto, layer: WeightedLayer) -> str | None:
    """Why a layer can't be reconstructed in any pattern, or None."""
    users = [lyr.name for lyr in weighted_layers(model) if lyr.weight_name == layer.weight_name]
    if len(users) > 1:
        return f"its weight is shared by {', '.join(users)}"
    if layer.kind == "Conv" and len(layer.stored_shape) == 5:
        return "3-D convolutions can't be reconstructed"
    if any(a.name == "transA" and a.i for a in layer.node.attribute):
        return "its input is transposed"
    return None


class _Builder:
    """Makes what the folder does not have yet."""

    def __init__(
        self,
        model: onnx.ModelProto,
        images: Images,
        entries: Sequence[_Entry],
        patterns: tuple[str, ...],
        progress: ProgressCall,
    ) -> None:
        self.model, self.images, self.entries = model, images, entries
        self.tasks = [(e, p) for e in entries for p in patterns if refuses(e.layer, p) is None]
        self.total = sum(_work(entry.layer) for entry, _ in self.tasks) or 1.0
        self.done = 0.0
        self.progress = progress

    def run(self) -> None:
        """Moments first, then one order after the other."""
        self._moments([e for e in self.entries if not _has_moments(e)])
        for entry, pattern in self.tasks:
            path = entry.removals_file(pattern)
            found = _try(partial(_read_removals, path, entry.key))
            errors = self._remove(entry, pattern) if found is None else found[1]
            entry.errors.update(_worthwhile(entry.layer, pattern, errors))
            self.done += _work(entry.layer)
            self._tell(entry.layer.name, pattern, 0.0)

    def _moments(self, missing: Sequence[_Entry]) -> None:
        """Gather moments in as few passes as memory allows."""
        portion: list[_Entry] = []
        for index, entry in enumerate(missing):
            portion.append(entry)
            rest = missing[index + 1 : index + 2]
            if rest and _bytes([*portion, *rest]) <= PASS_BYTES:
                continue
            tell = partial(self._tell, entry.layer.name, "calibration")
            found = gather_moments(self.model, [e.layer for e in portion], self.images, tell)
            for one, moments in zip(portion, found, strict=True):
                arrays = {"matrix": moments.matrix, "places": np.array(moments.places)}
                _write(one.moments_file, one.key, arrays)
            portion = []

    def _remove(self, entry: _Entry, pattern: str) -> Array:
        """Order the removals of one layer, and write them; returns the errors by level."""
        layer, work = entry.layer, _work(entry.layer)
        moments = _read_moments(entry.moments_file, entry.key)
        scale = output_scale(self.model, layer)
        removals = order_removals(
            layer,
            scale,
            moments,
            pattern,
            entry.criterion,
            lambda share: self._tell(layer.name, pattern, share * work),
        )
        removals = Removals(removals.order, removals.cost.astype(np.float32).astype(np.float64))
        lost = losses(layer, removals, pattern)
        if entry.criterion == "magnitude":
            lost = _losses_of_zeros(layer, removals, pattern, scale, moments)
        errors = lost / output_energy(layer.weight, scale, moments)
        arrays = {
            "order": removals.order.astype(np.uint16 if layer.weight[0].size < 65536 else np.int64),
            "cost": removals.cost.astype(np.float32),
            "errors": errors,
        }
        _write(entry.removals_file(pattern), entry.key, arrays)
        return errors

    def _tell(self, layer: str, what: str, extra: float) -> None:
        share = extra if what == "calibration" else min(1.0, (self.done + extra) / self.total)
        self.progress(BuildStep(layer, what, share))


def _losses_of_zeros(
    layer: WeightedLayer, removals: Removals, pattern: str, scale: Array, moments: Moments
) -> Array:
    """What each level loses where the weights that stay don't make up for it."""
    gone = [
        np.where(kept(layer, removals, v), 0, layer.weight).astype(np.float64)
        for v in levels_of(pattern)
    ]
    return np.array([output_energy(weight, scale, moments) for weight in gone])


def _work(layer: WeightedLayer) -> float:
    """How long a layer takes, in some unit."""
    columns = layer.weight[0].size
    exact = min(columns, EXACT_COLUMNS) if columns > WIDE else columns
    rounds = 500 * columns**2 if columns > WIDE else 0
    return float(len(layer.weight) * (exact**3 + rounds + 5e5 * exact))


def _bytes(entries: Sequence[_Entry]) -> int:
    return sum(moments_bytes(entry.layer) for entry in entries)


def _worthwhile(layer: WeightedLayer, pattern: str, errors: Array) -> dict[Level, float]:
    """Errors by level, without levels that keep more weights than the layer has."""
    nonzero = np.count_nonzero(layer.weight) / layer.weight.size
    found = zip(levels_of(pattern), errors.tolist(), strict=True)
    return {level: error for level, error in found if level.density < nonzero}


def _chosen(model: onnx.ModelProto, names: Sequence[str] | None) -> list[WeightedLayer]:
    """The layers by these names, in file order; ValueError for a name that can't be pruned."""
    if names is None:
        return prunable_layers(model)
    layers = {layer.name: layer for layer in weighted_layers(model)}
    for name in names:
        if name not in layers:
            close = get_close_matches(name, layers, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"no layer {name!r} with constant weights{hint}")
        reason = refuses_any(model, layers[name])
        if reason is not None:
            raise ValueError(f"{name} can't be pruned: {reason}")
    return [layer for name, layer in layers.items() if name in names]


def _entries(
    model: onnx.ModelProto,
    folder: Path,
    layers: Sequence[WeightedLayer],
    criterion: Criterion,
    key: str,
) -> list[_Entry]:
    """Entries whose errors are not known yet."""
    position = {layer.name: i for i, layer in enumerate(weighted_layers(model))}
    entries = []
    for layer in layers:
        if not np.isfinite(layer.weight).all():
            raise ModelError(f"{layer.name}: weight {layer.weight_name!r} has NaN or infinities")
        readable = re.sub(r"[^\w.-]+", "_", layer.name)[:80]
        stem = folder / f"{position[layer.name]:03d}-{readable}"
        entries.append(_Entry(layer, stem, criterion, key, {}))
    return entries


def _prepare(folder: Path, model: onnx.ModelProto, images: Images) -> str:
    """Make the folder for this model and these images; returns what its files are known by."""
    parts = {
        "format": FORMAT,
        "model": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        "images": images.digest(),
    }
    path = folder / MANIFEST
    found = _try(lambda: json.loads(path.read_text(encoding="utf-8")))
    if isinstance(found, dict) and found != parts:
        other = next((k for k in parts if found.get(k) != parts[k]), "format")
        raise OutputError(
            f"{folder} has the reconstruction of other {other if other != 'model' else 'weights'}; "
            "name another folder or delete this one"
        )
    if found is None:
        make_folder(folder)
        _write_text(path, json.dumps(parts, indent=1) + "\n")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't make the folder {folder}: {error.strerror}") from error


def _try(read: Callable[[], Any]) -> Any:
    """What a file says, None if it is missing, torn, or of something else."""
    try:
        return read()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _has_moments(entry: _Entry) -> bool:
    return _try(partial(_read_moments, entry.moments_file, entry.key)) is not None


def _read_moments(path: Path, key: str) -> Moments:
    arrays = _read(path, key)
    return Moments(arrays["matrix"], int(arrays["places"]))


def _read_removals(path: Path, key: str) -> tuple[Removals, Array]:
    """The removals, and the errors of the pattern's levels."""
    arrays = _read(path, key)
    removals = Removals(arrays["order"].astype(np.int64), arrays["cost"].astype(np.float64))
    return removals, arrays["errors"]


def _read(path: Path, key: str) -> Arrays:
    """The arrays of a file; ValueError if it has another key."""
    with np.load(path, allow_pickle=False) as file:
        arrays: Arrays = {name: file[name] for name in file.files}
    if str(arrays.pop("key", "")) != key:
        raise ValueError(f"{path} is of another model or calibration")
    return arrays


def _write(path: Path, key: str, arrays: Arrays) -> None:
    """Write a file whole or not at all."""
    aside = path.with_name(f"{path.name}.part")
    try:
        with aside.open("wb") as file:
            np.savez(file, **{**arrays, "key": np.array(key)})  # type: ignore[arg-type]
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OutputError(
            f"can't write {path}: {error.strerror or error}; what is finished stays, run it again "
            "when there is room"
        ) from error


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror or error}") from error
