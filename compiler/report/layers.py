"""Each layer of a bundle as a row: what the manifest says, and what follows from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topiarist.compiler.compiled import LayerChoice
from topiarist.compiler.explain import skips_zeros

REST = "rest"  # the family of what isn't a layer with weights
FAMILIES = {
    "sparse": "skips zeros",
    "blocks": "skips zeros, in blocks",
    "direct": "dense, direct",
    "winograd": "dense, Winograd",
    "depthwise": "depthwise",
    "linear": "dense, fully connected",
    "other": "other kernel",
    REST: "rest: no weights",
}
_FAMILY = {
    "direct_sparse": "sparse",
    "sparse_linear": "sparse",
    "block_sparse": "blocks",
    "block8_sparse": "blocks",
    "direct_dense": "direct",
    "winograd_dense": "winograd",
    "depthwise": "depthwise",
    "dense_linear": "linear",
}
FULLY_CONNECTED = "fully connected"
LONGEST = 20  # characters of a short name
COMPARABLE = 0.9  # of the time


@dataclass(frozen=True)
class Row:
    """A layer. Times are in microseconds, None where nobody knows them.

    `us` is its time in the network, or an estimate where `estimated`. `own_us` and `dense_us` are
    the times of its kernel and of the best dense one, taken alike, and `gain` is their ratio.
    `roofline` is the share of what the machine allows, `weights` their number.
    """

    index: int
    layer: str
    short: str
    shape: str
    stage: str
    density: float | None
    pattern: str
    kernel: str
    family: str
    sparse: bool
    knobs: str
    us: float | None
    estimated: bool
    own_us: float | None
    dense_us: float | None
    gain: float | None
    roofline: float | None
    bound: str
    explanation: tuple[str, ...]
    predicted_us: float | None
    weights: int | None

    @property
    def error(self) -> float | None:
        """Of the prediction, as a share of the time; None without one or the other."""
        if self.predicted_us is None or not self.us or self.estimated:
            return None
        return self.predicted_us / self.us - 1


def rows_of(
    layers: Sequence[LayerChoice],
    dense: Sequence[LayerChoice] = (),
    predicted_us: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row per layer, in the network's order; `dense` are the same layers of a dense build."""
    shorts = short_names([layer.layer for layer in layers])
    own = [_own_us(layer) for layer in layers]
    others = [choice.run_us for choice in dense] or [_best_dense_us(layer) for layer in layers]
    rows = []
    for i, layer in enumerate(layers):
        us = own[i] if layer.run_us is None else layer.run_us
        compared = us if dense else own[i]
        limits = layer.limits
        rows.append(
            Row(
                index=i,
                layer=layer.layer,
                short=shorts[i],
                shape=_shape(layer),
                stage=_stage(layer),
                density=layer.density,
                pattern=layer.pattern,
                kernel=layer.kernel,
                family=_FAMILY.get(layer.kernel, "other"),
                sparse=skips_zeros(layer.kernel),
                knobs=knobs_text(layer.config),
                us=us,
                estimated=layer.run_us is None,
                own_us=compared,
                dense_us=others[i],
                gain=_ratio(others[i], compared),
                roofline=None if limits is None else limits.share,
                bound="" if limits is None else limits.bound,
                explanation=layer.explanation,
                predicted_us=(predicted_us or {}).get(layer.layer),
                weights=math.prod(layer.weight_shape) if layer.weight_shape else None,
            )
        )
    return rows


def comparable(rows: Sequence[Row]) -> bool:
    """Whether most of the time is of layers with a dense time beside their own.

    A bundle from a log has finalists only, and of most pruned layers no dense one is among them.
    """
    both = sum(row.us or 0.0 for row in rows if row.own_us and row.dense_us)
    return both >= COMPARABLE * sum(row.us or 0.0 for row in rows) > 0


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _own_us(layer: LayerChoice) -> float | None:
    """The best time of the layer's kernel in its contest."""
    return _best_us(us for kernel, us in _contest(layer) if kernel == layer.kernel)


def _best_dense_us(layer: LayerChoice) -> float | None:
    """The best time in the layer's contest of a kernel that skips no zeros."""
    return _best_us(us for kernel, us in _contest(layer) if not skips_zeros(kernel))


def _contest(layer: LayerChoice) -> list[tuple[str, float]]:
    return [(name.split(" ")[0], us) for name, us in layer.candidates]


def _best_us(times: Any) -> float | None:
    return min((us for us in times if us > 0 and math.isfinite(us)), default=None)


def _shape(layer: LayerChoice) -> str:
    """`256 → 64, 3×3 /2, 56×56`; empty where the bundle doesn't say."""
    weight, output = layer.weight_shape, layer.output_shape
    if len(weight) == 2:
        return f"{weight[1]} → {weight[0]}"
    if len(weight) != 4 or len(output) != 4:
        return ""
    window = "×".join(map(str, weight[2:]))
    stride = "×".join(map(str, dict.fromkeys(layer.strides)))
    parts = [
        f"{weight[1] * layer.groups} → {weight[0]}",
        window if stride in ("", "1") else f"{window} /{stride}",
        "×".join(map(str, output[2:])),
    ]
    if layer.groups > 1:
        parts.insert(2, f"{layer.groups} groups")
    return ", ".join(parts)


def _stage(layer: LayerChoice) -> str:
    """Layers whose outputs have the same pixels are a stage."""
    if layer.kind == "linear":
        return FULLY_CONNECTED
    pixels = layer.output_shape[2:]
    return f"{'×'.join(map(str, pixels))} pixels" if pixels else "convolutions"


def knobs_text(config: Mapping[str, Any]) -> str:
    """`rows 2, in_block 64, weights_outside`: switches that are off are left out."""
    parts = []
    for knob, value in config.items():
        if value is True:
            parts.append(knob)
        elif value is not False and value is not None:
            parts.append(f"{knob}\N{NO-BREAK SPACE}{_knob(value)}")
    return ", ".join(parts)


def _knob(value: Any) -> str:
    return "×".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def short_names(names: Sequence[str]) -> list[str]:
    """The names without the folders that all begin with, or their end (`/Conv`), and not too long.

    What is cut off is in front: `…e1/block0/conv2`, for the end is what tells layers apart.
    """
    cut = max(_common(names).rfind("/"), _common(names).rfind(".")) + 1
    inner = [name[cut:] for name in names]
    end = _common([name[::-1] for name in inner])[::-1]
    drop = len(end) - end.find("/") if "/" in end else 0
    shorts = [name[: len(name) - drop] for name in inner]
    return [_tail(short or name) for short, name in zip(shorts, names, strict=True)]


def _common(names: Sequence[str]) -> str:
    """What all of several names begin with."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)  # these have the least in common
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(character for character, _ in pairs)


def _tail(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
