"""What pruning a layer to a level does to the network's outputs.

The error of a layer's own output says how its levels compare. It says little about how much the
layer matters: what is lost in a residual sum reaches everything behind it, and early layers have
more behind them. So a few levels of each layer are tried, alone, on the whole network; those
between follow the layer's own errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import onnx

from topiarist.pruning.calibration import Images
from topiarist.pruning.database import Database
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.level import Level
from topiarist.pruning.output_error import OutputError

TRIED = (0.4, 0.15, 0.05, 0.02)  # densities
_LEAST = 1e-12

LevelErrors = dict[str, dict[Level, float]]


def level_errors(
    model: onnx.ModelProto,
    database: Database,
    images: Images,
    progress: Callable[[float], None] = lambda share: None,
) -> LevelErrors:
    """Layer -> level -> error of the network's outputs when only that layer is pruned."""
    outputs = OutputError(model, images)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    layers = {layer.name: layer for layer in weighted_layers(model)}
    found: LevelErrors = {}
    for done, name in enumerate(database.layers, 1):
        layer = layers[name]
        found[name] = {}
        for _, some in groupby(database.levels(name), key=lambda level: level.pattern):
            levels = list(some)
            own = np.array([database.error(name, level) for level in levels])
            tried = _tried(levels)
            errors = []
            for index in tried:
                weight = database.weight(name, levels[index]).astype(layer.weight.dtype)
                replace_weights(changed, {layer.weight_name: layer.as_stored(weight)})
                errors.append(outputs.of(changed))
            found[name] |= dict(zip(levels, _between(own, tried, errors), strict=True))
        replace_weights(changed, {layer.weight_name: layer.as_stored(layer.weight)})
        progress(done / len(database.layers))
    return found


def _tried(levels: Sequence[Level]) -> list[int]:
    """Which levels of one pattern are tried, in their order."""
    nearest = (
        min(range(len(levels)), key=lambda i: abs(np.log(levels[i].density / density)))
        for density in TRIED
    )
    return sorted(set(nearest))


def _between(own: np.ndarray, tried: Sequence[int], errors: Sequence[float]) -> list[float]:
    """Own errors times a factor, which lies between those of the levels that were tried."""
    own = np.maximum(own, _LEAST)
    factors = np.log(np.maximum(errors, _LEAST) / own[tried])
    order = np.argsort(own[tried])
    between = np.interp(np.log(own), np.log(own[tried])[order], factors[order])
    scaled: list[float] = (own * np.exp(between)).tolist()
    return scaled
