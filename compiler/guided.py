"""Pruning to a latency: the levels of all layers are chosen by price, then the clock decides.

Prices come from a latency model, errors from the reconstruction of each layer, and the choice
from dynamic programming (SPDY, ICML 2022). The network is then compiled and timed against its
dense build; what prices got wrong corrects them, and the choice is made again, until the measured
latency is the one that was asked for. Time depends on where the zeros are, so only the last
choice is reconstructed. A layer that zeros would not make faster stays dense (Park et al., ICLR
2017, section 2.3).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from topiarist.compiler import engines
from topiarist.compiler.bench import ratio_interval, time_in_turns
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model, load_onnx
from topiarist.compiler.input_data import random_inputs
from topiarist.compiler.model_files import Source
from topiarist.compiler.output_file import write_file
from topiarist.compiler.parts import Parts
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.prices import Prices, open_prices
from topiarist.compiler.simplify import simplify
from topiarist.compiler.tune import HOPELESS_LAYOUTS
from topiarist.errors import BudgetError
from topiarist.pruning.allocation import (
    Allocation,
    LayerOptions,
    Option,
    allocate,
    reachable_us,
    uniform,
)
from topiarist.pruning.calibration import Images
from topiarist.pruning.database import Database
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.level import DENSE, Level
from topiarist.pruning.signatures import signature_of
from topiarist.pruning.stitch import stitch
from topiarist.schedules.workload import SparsitySignature
from topiarist.targets.spec import TargetSpec

TOLERANCE = 0.03  # of the latency asked for
ROUNDS = 5  # of compiling and timing, at most
BENCH_S = 4.0
ROUNDING = 1e-9
LIKELY = (0.1, 20.0)  # what one layer's correction may be

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Goal:
    """A speedup over the dense build, or a latency in milliseconds; exactly one of them."""

    speedup: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for none, both, or no positive number."""
        given = [value for value in (self.speedup, self.latency_ms) if value is not None]
        if len(given) != 1 or not 0 < given[0] < 1e9:
            raise ValueError("ask for one of speedup and latency_ms, a positive number")

    def us(self, dense_us: float) -> float:
        """The latency that is asked for."""
        if self.speedup is not None:
            return dense_us / self.speedup
        assert self.latency_ms is not None
        return self.latency_ms * 1e3

    def __str__(self) -> str:
        return f"{self.speedup:g}x" if self.speedup is not None else f"{self.latency_ms:g} ms"


@dataclass(frozen=True)
class Reach:
    """The measured dense latency, and the least that pruning is expected to reach."""

    dense_us: float
    least_us: float

    @property
    def speedup(self) -> float:
        """The largest speedup to ask for."""
        return self.dense_us / self.least_us


@dataclass(frozen=True)
class GuidedLayer:
    """A layer's level, its error there, what it was expected to take, and why it is dense."""

    layer: str
    level: Level
    error: float
    dense_us: float
    expected_us: float
    reason: str


@dataclass(frozen=True)
class Round:
    """A choice that was compiled and timed."""

    expected_us: float
    measured_us: float


@dataclass(frozen=True)
class Guided:
    """A pruned network: its file, its bundle, and how it was arrived at.

    `speedup` is the median of ratios to the dense build, timed in turns, with its 95 % interval.
    """

    goal: Goal
    model: onnx.ModelProto = field(repr=False)
    dense_us: float
    run_us: float
    speedup: tuple[float, float, float]
    density: float
    layers: tuple[GuidedLayer, ...]
    rounds: tuple[Round, ...]

    @property
    def reached(self) -> bool:
        """Whether the measured latency is within the tolerance of what was asked for."""
        return abs(self.run_us / self.goal.us(self.dense_us) - 1) <= TOLERANCE

    @property
    def levels(self) -> dict[str, Level]:
        """The level of each layer that could be pruned."""
        return {layer.layer: layer.level for layer in self.layers}


class GuidedPruner:
    """Prunes one network to any latency, from one calibration.

    `folder` keeps the dense bundle, the timings and the pruned bundle `pruned.topi`; timings that
    are there are used again. With `even` every layer gets the same level: the baseline.
    """

    def __init__(
        self,
        model: Path,
        database: Database,
        images: Images,
        target: TargetSpec,
        source: Source,
        folder: Path,
        *,
        threads: int = 1,
        batch: int | None = None,
        even: bool = False,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        self.onnx = load_onnx(model)
        self.database = database
        self.images = images
        self.target = target
        self.folder = folder
        self.threads = threads
        self.batch = batch
        self.even = even
        self.progress = progress
        self._parts = Parts(target, threads)
        graph = simplify(extract_layers(import_model(model, batch=batch)))
        prices = open_prices(graph, target, threads, source.pricer)
        signatures = _signatures(database, prices[0])
        limit_us = prices[0].total_us * HOPELESS_LAYOUTS
        hopeful = [one for one in prices if one.total_us <= limit_us]
        self.plans = [_Plan.of(one, database, signatures) for one in hopeful]
        self.dense_bundle = self._compile(model, "dense.topi", dense=True)
        self.dense_us = self._time_alone(self.dense_bundle)
        manifest = read_manifest(self.dense_bundle)
        layers_us = sum(layer.run_us or 0.0 for layer in manifest.layers)
        others_us = sum(other.run_us for other in manifest.others)
        self.rest_us = self.dense_us * others_us / (layers_us + others_us)
        expected_us = min(plan.dense_us for plan in self.plans)
        self.scale = (self.dense_us - self.rest_us) / expected_us
        self._corrections: dict[tuple[str, bool], float] = {}

    @property
    def reach(self) -> Reach:
        """How fast the network can get, as far as prices can tell."""
        least = min(self._fixed_us(p) + reachable_us(self._options(p)) for p in self.plans)
        return Reach(self.dense_us, least)

    def prune(self, goal: Goal) -> Guided:
        """The network at this latency, with as little error as possible.

        Raises BudgetError, naming the reachable minimum, for a goal out of reach.
        """
        wanted_us = goal.us(self.dense_us)
        reach = self.reach
        if wanted_us < reach.least_us * (1 - TOLERANCE):
            raise BudgetError(
                f"{goal} is out of reach: {reach.least_us / 1e3:.3f} ms, "
                f"{reach.speedup:.2f}x, is the least that pruning is expected to reach"
            )
        rounds: list[Round] = []
        while True:
            plan, allocation = self._allocate(max(wanted_us, reach.least_us))
            expected_us = self._fixed_us(plan) + allocation.run_us
            bundle = self._compile(self._with_zeros(allocation), "candidate.topi")
            run_us = self.dense_us / self._ratio(bundle)[0]
            rounds.append(Round(expected_us, run_us))
            if abs(run_us / wanted_us - 1) <= TOLERANCE or len(rounds) == ROUNDS:
                break
            self._correct(plan, allocation, bundle, run_us)
            reach = self.reach
        return self._finish(goal, plan, allocation, rounds)

    def _finish(
        self, goal: Goal, plan: _Plan, allocation: Allocation, rounds: Sequence[Round]
    ) -> Guided:
        """Reconstruct the last choice, compile it from the timings, and time it once more."""
        levels = allocation.levels
        self.progress("reconstruct", 0, 100)
        pruned = stitch(
            self.onnx,
            self.database,
            levels,
            self.images,
            progress=lambda share: self.progress("reconstruct", round(100 * share), 100),
        )
        path = self.folder / "pruned.onnx"
        write_file(path, pruned.SerializeToString())
        ratio = self._ratio(self._compile(path, "pruned.topi"))
        return Guided(
            goal=goal,
            model=pruned,
            dense_us=self.dense_us,
            run_us=self.dense_us / ratio[0],
            speedup=ratio,
            density=_density(pruned, levels),
            layers=tuple(self._layers(plan, allocation)),
            rounds=tuple(rounds),
        )

    def _allocate(self, wanted_us: float) -> tuple[_Plan, Allocation]:
        """The layouts and levels with the least error within the latency."""
        found: list[tuple[float, int, Allocation]] = []
        for i, plan in enumerate(self.plans):
            options = self._options(plan)
            budget_us = wanted_us - self._fixed_us(plan)
            least_us = reachable_us(options)
            if abs(budget_us - least_us) <= ROUNDING * wanted_us:
                budget_us = least_us
            try:
                allocation = (uniform if self.even else allocate)(options, budget_us)
            except BudgetError:
                continue
            found.append((allocation.error, i, allocation))
        if not found:
            raise BudgetError(
                f"{wanted_us / 1e3:.3f} ms is out of reach: the least that pruning is expected to "
                f"reach is {self.reach.least_us / 1e3:.3f} ms"
            )
        _, i, allocation = min(found, key=lambda one: one[:2])
        return self.plans[i], allocation

    def _options(self, plan: _Plan) -> list[LayerOptions]:
        """The layers that can be pruned, at corrected prices."""
        return [
            replace(
                layer,
                options=tuple(
                    replace(o, run_us=o.run_us * self._factor(layer.layer, o.level))
                    for o in layer.options
                ),
            )
            for layer in plan.layers
        ]

    def _fixed_us(self, plan: _Plan) -> float:
        """All that no level changes: other layers, and work without weights."""
        fixed = (us * self._factor(name, DENSE) for name, us in plan.fixed_us.items())
        return self.rest_us + sum(fixed)

    def _factor(self, layer: str, level: Level) -> float:
        return self.scale * self._corrections.get((layer, level == DENSE), 1.0)

    def _correct(self, plan: _Plan, allocation: Allocation, bundle: Path, run_us: float) -> None:
        """Make the prices of what was chosen those that were measured."""
        manifest = read_manifest(bundle)
        measured = {layer.layer: layer.run_us or 0.0 for layer in manifest.layers}
        others_us = sum(other.run_us for other in manifest.others)
        whole = run_us / (sum(measured.values()) + others_us)
        self.rest_us = others_us * whole
        chosen = {name: (o.level, o.run_us) for name, o in allocation.options.items()}
        for name, us in plan.fixed_us.items():
            chosen[name] = DENSE, us * self._factor(name, DENSE)
        for name, (level, expected_us) in chosen.items():
            taken_us = measured.get(name, 0.0) * whole
            if taken_us > 0 and expected_us > 0:
                key = name, level == DENSE
                factor = self._corrections.get(key, 1.0) * taken_us / expected_us
                self._corrections[key] = min(max(factor, LIKELY[0]), LIKELY[1])

    def _layers(self, plan: _Plan, allocation: Allocation) -> Iterator[GuidedLayer]:
        for layer in self._options(plan):
            option = allocation.options[layer.layer]
            dense, fastest = layer.options[0], min(o.run_us for o in layer.options)
            reason = ""
            if option.level == DENSE and fastest >= dense.run_us:
                reason = "no level would make it faster"
            elif option.level == DENSE:
                reason = "what it would gain costs more error than elsewhere"
            yield GuidedLayer(
                layer=layer.layer,
                level=option.level,
                error=option.error,
                dense_us=dense.run_us,
                expected_us=option.run_us,
                reason=reason,
            )

    def _with_zeros(self, allocation: Allocation) -> Path:
        """The model with the zeros of a choice, in weights that nothing makes up for yet."""
        candidate = onnx.ModelProto()
        candidate.CopyFrom(self.onnx)
        weights = {}
        for layer in weighted_layers(self.onnx):
            level = allocation.levels.get(layer.name, DENSE)
            if level != DENSE:
                (mask,) = self.database.masks(layer.name, [level])
                kept = np.where(mask, layer.weight, 0).astype(layer.weight.dtype)
                weights[layer.weight_name] = layer.as_stored(kept)
        replace_weights(candidate, weights)
        path = self.folder / "candidate.onnx"
        write_file(path, candidate.SerializeToString())
        return path

    def _compile(self, model: Path, name: str, *, dense: bool = False) -> Path:
        output = self.folder / name
        compile_model(
            model,
            target=self.target,
            output=output,
            threads=self.threads,
            batch=self.batch,
            dense=dense,
            log=self.folder / "timings.jsonl",
            parts=self._parts,
            progress=self.progress,
        )
        return output

    def _time_alone(self, bundle: Path) -> float:
        self.progress("time", 0, 1)
        (samples,) = _in_turns([bundle], self.threads)
        return float(np.median(samples)) * 1e6

    def _ratio(self, bundle: Path) -> tuple[float, float, float]:
        """The dense build's time over the bundle's, timed in turns: median and 95 % interval."""
        self.progress("time", 0, 1)
        dense, ours = _in_turns([self.dense_bundle, bundle], self.threads)
        ratio = ratio_interval(dense, ours)
        return ratio.median, ratio.low, ratio.high


@dataclass(frozen=True)
class _Plan:
    """Predicted prices in one of the network's layouts, before any correction."""

    layers: tuple[LayerOptions, ...]
    fixed_us: Mapping[str, float]

    @property
    def dense_us(self) -> float:
        """All layers with weights, none pruned."""
        return sum(self.fixed_us.values()) + sum(o.options[0].run_us for o in self.layers)

    @staticmethod
    def of(
        prices: Prices,
        database: Database,
        signatures: Mapping[str, Mapping[Level, SparsitySignature]],
    ) -> _Plan:
        asked: list[tuple[str, SparsitySignature | None]] = [(name, None) for name in prices.layers]
        for name, zeros in signatures.items():
            asked += [(name, sparsity) for sparsity in zeros.values()]
        found = iter([price.run_us for price in prices.prices(asked)])
        own = {name: next(found) for name in prices.layers}
        layers = []
        for name, zeros in signatures.items():
            options = [Option(DENSE, own[name], 0.0)]
            options += [Option(lv, next(found), database.error(name, lv)) for lv in zeros]
            layers.append(LayerOptions(name, tuple(options)))
        return _Plan(tuple(layers), {n: us for n, us in own.items() if n not in signatures})


def _signatures(database: Database, prices: Prices) -> dict[str, dict[Level, SparsitySignature]]:
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


def _density(model: onnx.ModelProto, layers: Collection[str]) -> float:
    """The share of nonzeros in these layers."""
    weights = [layer.weight for layer in weighted_layers(model) if layer.name in layers]
    nonzero = sum(int(np.count_nonzero(weight)) for weight in weights)
    return nonzero / max(1, sum(weight.size for weight in weights))


def _in_turns(bundles: Sequence[Path], threads: int) -> list[list[float]]:
    """Seconds of single runs of each bundle, in turns."""
    feeds = random_inputs(read_manifest(bundles[0]).inputs)
    contestants = [
        replace(engines.open_bundle(bundle, feeds, threads), name=str(i))
        for i, bundle in enumerate(bundles)
    ]
    samples = time_in_turns(
        contestants, seconds=BENCH_S, rounds=None, clock=time.perf_counter, sleep=time.sleep
    )
    return [samples[one.name] for one in contestants]
