"""One-shot magnitude pruning of an ONNX file: no data, no fine-tuning, one density per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.errors import ModelError
from topiarist.pruning.filters import cut_filters
from topiarist.pruning.layers import WeightedLayer, replace_weights, weighted_layers
from topiarist.pruning.masks import block_mask, n_m_mask, unstructured_mask
from topiarist.pruning.patterns import Mask
from topiarist.pruning.saliency import magnitude
from topiarist.schedules.workload import BLOCKS

PATTERNS = ("unstructured", *BLOCKS, "filter", "N:M")
FEW_CHANNELS = 4


@dataclass(frozen=True)
class PrunedLayer:
    """What happened to one weight; `layer` is the first layer that uses it.

    `weights` counts all its values, before filters were cut out. `reason_kept` says why it was
    left as it was, or why its filters were, None if pruned.
    """

    layer: str
    pattern: str
    density_before: float
    density_after: float
    weights: int
    reason_kept: str | None


@dataclass(frozen=True)
class _Method:
    """A pattern and, for N:M, its numbers."""

    pattern: str
    n: int = 0
    m: int = 0

    def mask(self, layer: WeightedLayer, density: float) -> Mask:
        """The weights to keep, by magnitude."""
        scores = magnitude(layer.weight)
        if self.pattern in BLOCKS:
            return block_mask(scores, density, layer.groups, BLOCKS[self.pattern])
        if self.m:
            return n_m_mask(scores, self.n, self.m)
        return unstructured_mask(scores, density)


def prune_model(
    model: onnx.ModelProto,
    *,
    density: float | None = None,
    pattern: str = "unstructured",
    layer_density: Mapping[str, float] | None = None,
) -> tuple[onnx.ModelProto, list[PrunedLayer]]:
    """A copy of the model with its smallest weights set to zero, and what was done per weight.

    `pattern` is "unstructured", "block4x1", "block8x1" or "block16x1" (so many consecutive output
    channels share their zeros), "filter" or "N:M", for example "2:4": N of every M consecutive
    input channels stay. `density` (0..1] is the share of weights that stay, N / M for "N:M".

    Left dense, unless `layer_density` names them: fully connected layers, the convolution that
    reads the network's input, depthwise convolutions. All else in the file stays the same.

    "filter" cuts filters out: shapes become smaller, and so do the layers that read the channels.
    `density` is the share of filters that stay in each group of layers that only go together, for
    all of which that is possible.

    Raises ValueError for a wrong density, pattern or layer name, ModelError for weights that are
    not finite or not loaded.
    """
    method, density = _parse_method(pattern, density)
    layers = weighted_layers(model)
    overrides = _overrides(layers, dict(layer_density or {}), method)
    if method.pattern == "filter":
        return _cut(model, layers, density, overrides)
    kept = reasons_to_keep(model, layers)
    report = []
    arrays: dict[str, Any] = {}
    for layer in _first_users(layers):
        wanted = overrides.get(layer.weight_name, density)
        reason = None if layer.weight_name in overrides else kept.get(layer.weight_name)
        reason = reason or _reason_without_effect(layer, method, wanted)
        entry, weight = _prune(layer, method, wanted, reason)
        report.append(entry)
        if weight is not None:
            arrays[layer.weight_name] = weight
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    replace_weights(pruned, arrays)
    return pruned, report


def _first_users(layers: list[WeightedLayer]) -> list[WeightedLayer]:
    """One layer per distinct weight, in file order."""
    first: dict[str, WeightedLayer] = {}
    for layer in layers:
        first.setdefault(layer.weight_name, layer)
    return list(first.values())


def _parse_method(pattern: str, density: float | None) -> tuple[_Method, float]:
    """Check pattern and density, and fill in the density of N:M."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        if pattern not in PATTERNS or pattern == "N:M":
            raise ValueError(f"pattern {pattern!r}: expected {', '.join(PATTERNS)} (as in 2:4)")
        if density is None:
            raise ValueError(f"pattern {pattern!r} needs a density in (0, 1]")
        return _Method(pattern), _check_density(density, "density")
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise ValueError(f"pattern {pattern!r}: N:M needs 0 < N < M")
    if density is not None and abs(_check_density(density, "density") - n / m) > 0.005:
        raise ValueError(f"pattern {pattern} has density {n / m:g}, got {density:g}: leave it out")
    return _Method(pattern, n, m), n / m


def _check_density(density: float, what: str) -> float:
    """The density, if it is in (0, 1]."""
    if not 0 < density <= 1:
        raise ValueError(f"{what} is the share of weights that stay, in (0, 1], got {density}")
    return density


def _overrides(
    layers: list[WeightedLayer], asked: dict[str, float], method: _Method
) -> dict[str, float]:
    """Layer densities by weight name, checked."""
    by_layer = {layer.name: layer.weight_name for layer in layers}
    found: dict[str, float] = {}
    for name, density in asked.items():
        if name not in by_layer:
            close = get_close_matches(name, by_layer, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"layers: {_some(by_layer)}"
            raise ValueError(f"no layer {name!r} with constant weights; {hint}")
        _check_density(density, f"density of {name}")
        if method.m and density != 1 and abs(density - method.n / method.m) > 0.005:
            raise ValueError(
                f"density of {name}: {method.pattern} allows {method.n / method.m:g} or 1, "
                f"got {density:g}"
            )
        weight = by_layer[name]
        if found.setdefault(weight, density) != density:
            raise ValueError(f"{name} shares its weight {weight!r} with a layer of another density")
    return found


def _some(names: Mapping[str, str]) -> str:
    """The first few names."""
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")


def _cut(
    model: onnx.ModelProto, layers: list[WeightedLayer], density: float, overrides: dict[str, float]
) -> tuple[onnx.ModelProto, list[PrunedLayer]]:
    """Filters cut out; a layer that only lost input channels has the pattern "channel"."""
    for layer in layers:
        _check_finite(layer)
    named = {v.name: overrides[v.weight_name] for v in layers if v.weight_name in overrides}
    pruned, reasons = cut_filters(model, density, named)
    after = {layer.node.output[0]: layer.weight for layer in weighted_layers(pruned)}
    report = []
    for layer in _first_users(layers):
        weight, reason = after[layer.node.output[0]], reasons.get(layer.name)
        pattern = "filter" if reason is None else "dense"
        entry = PrunedLayer(
            layer=layer.name,
            pattern="channel" if reason and weight.size < layer.weight.size else pattern,
            density_before=_density(layer.weight),
            density_after=float(np.count_nonzero(weight) / layer.weight.size),
            weights=layer.weight.size,
            reason_kept=reason,
        )
        report.append(entry)
    return pruned, report


def _check_finite(layer: WeightedLayer) -> None:
    """Raise ModelError for weights that nothing can be decided by."""
    if not np.isfinite(layer.weight).all():
        raise ModelError(f"{layer.name}: weight {layer.weight_name!r} has NaN or infinite values")


def _prune(
    layer: WeightedLayer, method: _Method, density: float, reason: str | None
) -> tuple[PrunedLayer, Any]:
    """The report entry, and the weight in its stored shape if it is to change."""
    _check_finite(layer)
    before = _density(layer.weight)
    if reason is not None:
        return PrunedLayer(layer.name, "dense", before, before, layer.weight.size, reason), None
    weight = np.where(method.mask(layer, density), layer.weight, layer.weight.dtype.type(0))
    entry = PrunedLayer(
        layer.name, method.pattern, before, _density(weight), weight.size, reason_kept=None
    )
    return entry, layer.as_stored(weight)


def _density(weight: NDArray[Any]) -> float:
    """Share of nonzeros."""
    return float(np.count_nonzero(weight) / weight.size)


def reasons_to_keep(model: onnx.ModelProto, layers: list[WeightedLayer]) -> dict[str, str]:
    """Weight name -> why it stays dense unless it is named."""
    from_input = _values_before_any_layer(model, layers)
    users = _other_users(model, layers)
    reasons: dict[str, str] = {}
    for layer in layers:
        channels = layer.weight.shape[1]
        if layer.kind != "Conv":
            reason = "fully connected layers are kept dense unless named"
        elif layer.groups > 1 and channels < FEW_CHANNELS:
            reason = f"depthwise: each filter reads {channels} of the input channels"
        elif layer.node.input[0] in from_input and channels <= FEW_CHANNELS:
            reason = f"first convolution: reads the {channels} channels of the network input"
        elif layer.weight_name in users:
            reason = f"its weight is also read by {users[layer.weight_name]}"
        else:
            continue
        reasons.setdefault(layer.weight_name, reason)
    return reasons


def _reason_without_effect(layer: WeightedLayer, method: _Method, density: float) -> str | None:
    """Why pruning as asked would change nothing."""
    if density == 1:
        return "density 1 was asked for"
    if method.m and layer.weight.shape[1] < method.m:
        return f"{layer.weight.shape[1]} input channels, {method.pattern} needs {method.m}"
    return None


def _values_before_any_layer(model: onnx.ModelProto, layers: list[WeightedLayer]) -> set[str]:
    """Values computed from the network's input by operators without weights."""
    stored = {t.name for t in model.graph.initializer}
    values = {i.name for i in model.graph.input} - stored
    outputs_of_layers = {layer.node.output[0] for layer in layers}
    for node in model.graph.node:
        if values.intersection(node.input) and node.output[0] not in outputs_of_layers:
            values.update(node.output)
    return values


def _other_users(model: onnx.ModelProto, layers: list[WeightedLayer]) -> dict[str, str]:
    """Weight name -> an operator that reads it and is no layer of ours."""
    weights = {layer.weight_name for layer in layers}
    ours = {layer.node.output[0] for layer in layers}
    return {
        name: f"{node.op_type} {node.name}".rstrip()
        for node in model.graph.node
        if node.output[0] not in ours and node.op_type != "Identity"
        for name in node.input
        if name in weights
    }
