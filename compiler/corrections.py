"""What layers took over what they were priced at, to price them better at other levels.

A latency model is off by other factors for each layer, and by others at few nonzeros than at many.
What was measured counts for its own layer and pattern, the more the nearer the density is. Beside
it stands what all layers of that pattern took, as far as much of the network ran with it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from topiarist.pruning.level import Level

NEAR = 0.5  # in the logarithm of density: what is so far away counts 1 / e
DOUBT = 0.5  # measurements of a layer that the typical factor counts for
COMMON_DOUBT = 0.25  # of the network's dense time, that no factor for all counts for
LIKELY = 3.0  # what the logarithm of one layer's time over its price may be off


@dataclass(frozen=True)
class Measured:
    """A layer's level, what it took, and its price without any correction."""

    level: Level
    run_us: float
    price_us: float


class Corrections:
    """Of the prices of one network's layers; `dense_us` is the price of all of them, dense."""

    def __init__(self, dense_us: float) -> None:
        self._dense_us = dense_us
        self._seen: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def learn(self, layers: Mapping[str, Measured]) -> None:
        """What the layers of a network took."""
        for name, one in layers.items():
            if not (one.run_us > 0 and one.price_us > 0):
                continue
            off = math.log(one.run_us / one.price_us)
            near = math.log(one.level.density), min(max(off, -LIKELY), LIKELY)
            self._seen[name, one.level.pattern].append(near)
            sums = self._sums[one.level.pattern]
            sums[0] += one.run_us
            sums[1] += one.price_us

    def factor(self, layer: str, level: Level) -> float:
        """By what a price is to be multiplied."""
        place = math.log(level.density)
        weights, total = DOUBT, DOUBT * self._common(level.pattern)
        for density, off in self._seen.get((layer, level.pattern), ()):
            weight = math.exp(-abs(density - place) / NEAR)
            weights += weight
            total += weight * off
        return math.exp(total / weights)

    def _common(self, pattern: str) -> float:
        """The logarithm of what all layers took over their prices."""
        if pattern not in self._sums:
            return 0.0
        taken_us, price_us = self._sums[pattern]
        share = price_us / (price_us + COMMON_DOUBT * self._dense_us)
        return share * math.log(taken_us / price_us)
