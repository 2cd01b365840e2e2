"""What zeros are worth while training makes them: the prices of guided sparsity learning."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.compiler.prices import Pricer, open_prices
from topiarist.compiler.read_graph import read_graph
from topiarist.pruning.guidance import Bounds, Weights
from topiarist.pruning.layers import WeightedLayer, weighted_layers
from topiarist.pruning.masks import mask_at
from topiarist.pruning.patterns import find_pattern
from topiarist.pruning.saliency import magnitude
from topiarist.schedules.workload import SparsitySignature, signature
from topiarist.targets.spec import TargetSpec

DENSITIES = (0.3, 0.2, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)  # where a layer may be at its fastest


class ZeroPrices:
    """The prices of an ONNX model's layers in its cheapest layouts, by a latency model.

    `layers` are those that could be pruned; one that the compiler doesn't know has no sparse
    kernel. `pattern` is of the zeros that training makes.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Collection[str],
        pattern: str,
        pricer: Pricer,
        target: TargetSpec,
        *,
        threads: int = 1,
        batch: int | None = None,
    ) -> None:
        graph = read_graph(model, target, batch=batch)
        self._prices = open_prices(graph, target, threads, pricer)[0]
        self._pattern = pattern
        self._layers = {v.name: v for v in weighted_layers(model) if v.name in layers}

    def bounds(self) -> dict[str, Bounds]:
        """Of each layer dense, and at the density that is fastest."""
        found = dict.fromkeys(self._layers, Bounds(1.0, None))
        asked = [(n, zeros) for n in self._known() for zeros in self._zeros(self._layers[n])]
        for (name, _), price in zip(asked, self._prices.prices(asked), strict=True):
            least = [us for us in (found[name].least_us, price.sparse_us) if us is not None]
            found[name] = Bounds(price.dense_us, min(least, default=None))
        return found

    def sparse_us(self, weights: Weights) -> dict[str, float | None]:
        """The best sparse kernel's."""
        found: dict[str, float | None] = dict.fromkeys(weights)
        known = [name for name in self._known() if name in weights]
        asked = [(n, _signature(weights[n] != 0, self._layers[n].groups)) for n in known]
        for name, price in zip(known, self._prices.prices(asked), strict=True):
            found[name] = price.sparse_us
        return found

    def _known(self) -> list[str]:
        return [name for name in self._layers if name in self._prices.layers]

    def _zeros(self, layer: WeightedLayer) -> list[SparsitySignature]:
        scores = magnitude(layer.weight)
        masks = (mask_at(scores, self._pattern, density, layer.groups) for density in DENSITIES)
        return [_signature(mask, layer.groups) for mask in masks]


def _signature(mask: NDArray[Any], groups: int) -> SparsitySignature:
    """As the compiler has it of a weight with these zeros."""
    return signature(mask.astype(np.int8), str(find_pattern(mask, groups)))
