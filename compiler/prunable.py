"""A network to prune: what its layers can be pruned to, what that costs, and what it takes.

Prices come from a latency model. What the compiled network really took corrects them.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from topiarist.compiler.choose import Advice, Candidate
from topiarist.compiler.corrections import Corrections, Measured
from topiarist.compiler.graph import Conv
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.prices import Pricer, Prices, open_prices
from topiarist.compiler.read_graph import read_graph
from topiarist.compiler.tune import HOPELESS_LAYOUTS
from topiarist.errors import BudgetError
from topiarist.pruning.allocation import (
    Allocation,
    LayerOptions,
    Option,
    allocate,
    reachable_evenly_us,
    reachable_us,
    uniform,
)
from topiarist.pruning.database import Database
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.level import DENSE, Level
from topiarist.pruning.level_errors import LevelErrors
from topiarist.pruning.signatures import signature_of
from topiarist.schedules.workload import SparsitySignature
from topiarist.targets.spec import TargetSpec

ROUNDING = 1e-9
LEFT = 0.7  # power: of what no layer explains, the rest is taken for noise
LEAST_GAIN = 0.05  # of a layer's time; less could be noise and is not worth its error

Zeros = Mapping[str, Mapping[Level, SparsitySignature]]


@dataclass(frozen=True)
class Plan:
    """Predicted prices in one of the network's layouts, before any correction."""

    prices: Prices
    layers: tuple[LayerOptions, ...]
    fixed_us: Mapping[str, float]

    @property
    def dense_us(self) -> float:
        """All layers with weights, none pruned."""
        return sum(self.fixed_us.values()) + sum(o.options[0].run_us for o in self.layers)


@dataclass(frozen=True)
class Proposal:
    """Levels for a network in some layouts, and what it is expected to take."""

    plan: Plan
    allocation: Allocation
    expected_us: float


class Prunable:
    """One network; `cut` is the share of time that was cut out of it with channels before.

    `scale` is what times are to prices where nothing is known, `rest_us` all work without weights.
    With `even` all layers are to have the same level.
    """

    def __init__(
        self,
        path: Path,
        model: onnx.ModelProto,
        database: Database,
        errors: LevelErrors,
        pricer: Pricer,
        target: TargetSpec,
        *,
        threads: int,
        batch: int | None,
        cut: float = 0.0,
    ) -> None:
        self.path = path
        self.model = model
        self.database = database
        self.errors = errors
        self.cut = cut
        graph = read_graph(path, target, batch=batch)
        prices = open_prices(graph, target, threads, pricer)
        self.zeros = _zeros(database, prices[0])
        limit_us = prices[0].total_us * HOPELESS_LAYOUTS
        hopeful = [one for one in prices if one.total_us <= limit_us]
        self.plans = [self._plan(one) for one in hopeful]
        self.even = False
        self.scale, self.rest_us = 1.0, 0.0
        self.corrections = Corrections(self.dense_us)
        self._left = 1.0

    def evenly(self) -> Prunable:
        """The same network with one level for all layers; what is learned of one serves both."""
        other = copy.copy(self)
        other.even = True
        return other

    @property
    def way(self) -> str:
        """How it gets faster, in words."""
        if self.even:
            return "even levels"
        return f"channels cut for {self.cut:.0%} of the time" if self.cut else "zeros alone"

    @property
    def dense_us(self) -> float:
        """All layers, none pruned, in the cheapest layouts, by price alone."""
        return min(plan.dense_us for plan in self.plans)

    @property
    def layer_us(self) -> dict[str, float]:
        """What each layer takes dense, by price alone."""
        plan = min(self.plans, key=lambda plan: plan.dense_us)
        return {o.layer: o.options[0].run_us for o in plan.layers} | dict(plan.fixed_us)

    @property
    def least_us(self) -> float:
        """The least that it can be pruned to, as far as prices can tell."""
        return min(
            self._fixed_us(plan) + self._reachable_us(self.options(plan)) for plan in self.plans
        )

    def propose(self, wanted_us: float) -> Proposal:
        """The layouts and levels with the least sum of errors within the latency.

        Raises BudgetError if it is out of reach.
        """
        found: list[Proposal] = []
        for plan in self.plans:
            options, fixed_us = self.options(plan), self._fixed_us(plan)
            budget_us, least_us = wanted_us - fixed_us, self._reachable_us(options)
            if abs(budget_us - least_us) <= ROUNDING * wanted_us:
                budget_us = least_us
            try:
                allocation = (uniform if self.even else allocate)(options, budget_us)
            except BudgetError:
                continue
            found.append(Proposal(plan, allocation, fixed_us + allocation.run_us))
        if not found:
            raise BudgetError(
                f"{wanted_us / 1e3:.3f} ms is out of reach: the least that pruning is expected to "
                f"reach is {self.least_us / 1e3:.3f} ms"
            )
        return min(found, key=lambda one: one.allocation.error)

    def options(self, plan: Plan) -> list[LayerOptions]:
        """The layers that can be pruned, at corrected prices, without levels that gain nothing."""
        return [self._corrected(layer) for layer in plan.layers]

    def _corrected(self, layer: LayerOptions) -> LayerOptions:
        dense, *others = (
            replace(o, run_us=o.run_us * self._factor(layer.layer, o.level)) for o in layer.options
        )
        limit_us = (1 - LEAST_GAIN) * dense.run_us
        return replace(layer, options=(dense, *(o for o in others if o.run_us <= limit_us)))

    def _reachable_us(self, options: Sequence[LayerOptions]) -> float:
        return (reachable_evenly_us if self.even else reachable_us)(options)

    def _fixed_us(self, plan: Plan) -> float:
        """All that no level changes: other layers, and work without weights."""
        fixed = (us * self._factor(name, DENSE) for name, us in plan.fixed_us.items())
        return self.rest_us + sum(fixed)

    def _factor(self, layer: str, level: Level) -> float:
        return self.scale * self._left * self.corrections.factor(layer, level)

    def shares_prices(self, other: Prunable) -> bool:
        """Whether what is measured of one of them corrects the prices of the other."""
        return self.corrections is other.corrections

    def correct(self, proposal: Proposal, manifest: Manifest, run_us: float) -> None:
        """Bring the price of what was compiled near the measured one, and those of its layers."""
        levels = proposal.allocation.levels
        self._learn(proposal.plan, levels, manifest, run_us)
        self._left = 1.0
        expected_us = self._fixed_us(proposal.plan) + sum(
            option.run_us * self._factor(layer.layer, option.level)
            for layer in proposal.plan.layers
            for option in layer.options
            if option.level == levels[layer.layer]
        )
        self._left = ((run_us - self.rest_us) / (expected_us - self.rest_us)) ** LEFT

    def correct_dense(self, manifest: Manifest, run_us: float) -> None:
        """What its layers take in the dense build, in whatever layouts."""
        plan = min(self.plans, key=lambda plan: plan.dense_us)
        self._learn(plan, dict.fromkeys(self.zeros, DENSE), manifest, run_us)

    def _learn(
        self, plan: Plan, levels: Mapping[str, Level], manifest: Manifest, run_us: float
    ) -> None:
        taken = {layer.layer: layer.run_us or 0.0 for layer in manifest.layers}
        others_us = sum(other.run_us for other in manifest.others)
        whole = run_us / (sum(taken.values()) + others_us)
        self.rest_us = others_us * whole
        options = [
            (layer.layer, option)
            for layer in plan.layers
            for option in layer.options
            if option.level == levels[layer.layer]
        ]
        priced = [(name, o.level, o.run_us) for name, o in options]
        priced += [(name, DENSE, us) for name, us in plan.fixed_us.items()]
        self.corrections.learn(
            {
                name: Measured(level, taken.get(name, 0.0) * whole, us * self.scale)
                for name, level, us in priced
            }
        )

    def advice(self, proposal: Proposal) -> Advice:
        """The few candidates of each convolution that are worth compiling."""
        prices = proposal.plan.prices
        convs = [name for name, node in prices.layers.items() if isinstance(node, Conv)]
        levels = proposal.allocation.levels
        asked = [(name, self.zeros.get(name, {}).get(levels.get(name, DENSE))) for name in convs]
        found = {}
        for name, (dense, sparse) in zip(convs, prices.offers(asked), strict=True):
            offers = sorted((*dense, *sparse), key=lambda offer: offer.run_us)
            found[name] = tuple(
                Candidate(offer.what.kernel, offer.config, offer.run_us, measured=False)
                for offer in offers
            )
        return Advice(prices.layouts, found)

    def with_zeros(self, levels: Mapping[str, Level]) -> onnx.ModelProto:
        """A copy with the zeros of a choice, in weights that nothing makes up for yet."""
        pruned = onnx.ModelProto()
        pruned.CopyFrom(self.model)
        weights = {}
        for layer in weighted_layers(self.model):
            level = levels.get(layer.name, DENSE)
            if level != DENSE:
                (mask,) = self.database.masks(layer.name, [level])
                kept = np.where(mask, layer.weight, 0).astype(layer.weight.dtype)
                weights[layer.weight_name] = layer.as_stored(kept)
        replace_weights(pruned, weights)
        return pruned

    def _plan(self, prices: Prices) -> Plan:
        dense = prices.prices([(name, None) for name in prices.layers])
        own = {name: price.run_us for name, price in zip(prices.layers, dense, strict=True)}
        asked = [(name, zeros) for name, at in self.zeros.items() for zeros in at.values()]
        found = iter(prices.prices(asked))
        layers = []
        for name, levels in self.zeros.items():
            sparse = {level: next(found).sparse_us for level in levels}
            errors = self.errors[name]
            pruned = [Option(v, us, errors[v]) for v, us in sparse.items() if us is not None]
            layers.append(LayerOptions(name, (Option(DENSE, own[name], 0.0), *pruned)))
        fixed_us = {name: us for name, us in own.items() if name not in self.zeros}
        return Plan(prices, tuple(layers), fixed_us)


def narrowed(advice: Advice, manifest: Manifest) -> Advice:
    """The kernels that were chosen, where they were advised."""
    chosen = {layer.layer: (layer.kernel, dict(layer.config)) for layer in manifest.layers}
    candidates = {}
    for name, found in advice.candidates.items():
        won = [c for c in found if c.config and (c.kernel, asdict(c.config)) == chosen.get(name)]
        candidates[name] = tuple(won) or found
    return Advice(advice.layouts, candidates)


def _zeros(database: Database, prices: Prices) -> dict[str, dict[Level, SparsitySignature]]:
    """Where the zeros are at each level of the layers that the compiler knows by the same name.

    Of layers that are alike the first one speaks for all.
    """
    alike: dict[Hashable, dict[Level, SparsitySignature]] = defaultdict(dict)
    found = {}
    for name in database.layers:
        if name in prices.layers:
            levels, known = database.levels(name), alike[prices.place(name)]
            new = [level for level in levels if level not in known]
            masks = zip(new, database.masks(name, new), strict=True)
            known |= {level: signature_of(mask, level) for level, mask in masks}
            found[name] = {level: known[level] for level in levels}
    return found
