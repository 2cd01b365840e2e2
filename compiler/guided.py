"""Pruning to a latency: the levels of all layers are chosen by price, then the clock decides.

Prices come from a latency model, errors from what each level alone does to the network's outputs,
and the choice from dynamic programming (SPDY, ICML 2022). Networks with some channels cut out
before take part, and so does one level for all layers: what is nearest to the dense network's
outputs is taken. It is then compiled and timed against the dense build; what prices got wrong
corrects them, and the levels are chosen again, until the measured latency is the one that was
asked for. Time depends on where the zeros are, so only the last choice is reconstructed. A layer
that zeros would not make faster stays dense (Park et al., ICLR 2017, section 2.3).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from topiarist.compiler import engines
from topiarist.compiler.bench import ratio_interval, time_in_turns
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.choose import Advice
from topiarist.compiler.frontend import load_onnx
from topiarist.compiler.input_data import random_inputs
from topiarist.compiler.model_files import Source
from topiarist.compiler.output_file import write_file
from topiarist.compiler.parts import Parts
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.prunable import Proposal, Prunable, narrowed
from topiarist.errors import BudgetError
from topiarist.pruning.calibration import Images
from topiarist.pruning.channel_cuts import ChannelCuts
from topiarist.pruning.database import Database, build_database, make_folder
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.level import DENSE, Level
from topiarist.pruning.level_errors import level_errors
from topiarist.pruning.output_error import OutputError
from topiarist.pruning.stitch import stitch
from topiarist.targets.spec import TargetSpec

TOLERANCE = 0.03  # of the latency asked for
ROUNDS = 6  # of compiling and timing, at most
BENCH_S = 4.0
CONTEST_IMAGES = 256
CUTS = (0.2, 0.35, 0.5)  # shares of the time that channels are cut out for, before zeros

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
    """A layer's level, what it was expected to take, and why it is dense.

    `error` is that of the network's outputs if only this layer is pruned.
    """

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
    """A pruned network, and how it was arrived at.

    `speedup` is the median of ratios to the dense build, timed in turns, with its 95 % interval.
    `cut` is the share of time that was cut out with channels, `density` the share of nonzeros
    that is left in all layers that could be pruned.
    """

    goal: Goal
    model: onnx.ModelProto = field(repr=False)
    dense_us: float
    run_us: float
    speedup: tuple[float, float, float]
    cut: float
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

    `folder` keeps the dense bundle, networks with channels cut out (only with `channels`), the
    timings, and the pruned bundle `pruned.topi`. With `even` every layer of the whole network
    gets the same level: the baseline.
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
        channels: bool = False,
        even: bool = False,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        self.onnx = load_onnx(model)
        self.images = images
        self.target = target
        self.pricer = source.pricer
        self.folder = folder
        self.threads = threads
        self.batch = batch
        self.even = even
        self.progress = progress
        self._parts = Parts(target, threads)
        self.outputs = OutputError(self.onnx, images, CONTEST_IMAGES)
        whole = self._prunable(model, self.onnx, database, 0.0)
        self.networks = [whole]
        if channels and not even:
            self.networks += self._cut_networks(whole)
        self.dense_bundle = self._compile(model, "dense.topi", dense=True)
        self.dense_us = self._time_alone(self.dense_bundle)
        manifest = read_manifest(self.dense_bundle)
        layers_us = sum(layer.run_us or 0.0 for layer in manifest.layers)
        others_us = sum(other.run_us for other in manifest.others)
        rest_us = self.dense_us * others_us / (layers_us + others_us)
        for network in self.networks:
            network.rest_us = rest_us
            network.scale = (self.dense_us - rest_us) / whole.dense_us

    @property
    def reach(self) -> Reach:
        """How fast the network can get, as far as prices can tell."""
        return Reach(self.dense_us, min(network.least_us for network in self.networks))

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
        network, even = self._contest(max(wanted_us, reach.least_us))
        rounds: list[Round] = []
        nearest = np.inf
        while True:
            proposal = network.propose(max(wanted_us, network.least_us), even=even)
            advice = network.advice(proposal)
            model = network.with_zeros(proposal.allocation.levels)
            bundle = self._compile_candidate(model, "candidate", advice)
            run_us = self.dense_us / self._ratio(bundle)[0]
            rounds.append(Round(proposal.expected_us, run_us))
            distance = abs(run_us / wanted_us - 1)
            if distance <= max(nearest, TOLERANCE):
                nearest = distance
                chosen = proposal, narrowed(advice, read_manifest(bundle))
            if distance <= TOLERANCE or len(rounds) == ROUNDS:
                found = self._finish(goal, network, *chosen, rounds)
                if found.reached or len(rounds) == ROUNDS:
                    return found
                bundle, run_us = self.folder / "pruned.topi", found.run_us
            network.correct(proposal, read_manifest(bundle), run_us)

    def _contest(self, wanted_us: float) -> tuple[Prunable, bool]:
        """The network, and whether with even levels, whose outputs are nearest to the dense ones.

        All are expected to take as long; they are stitched from a few images, without a refit.
        """
        ways = [(self.networks[0], True)]
        if not self.even:
            ways = [*((network, False) for network in self.networks), *ways]
        entrants = []
        for network, even in ways:
            try:
                entrants.append((network, even, network.propose(wanted_us, even=even)))
            except BudgetError:
                continue
        if len(entrants) == 1:
            return entrants[0][:2]
        few = self.images.first(CONTEST_IMAGES)
        errors = []
        for done, (network, _, proposal) in enumerate(entrants):
            self.progress("try on images", done, len(entrants))
            levels = proposal.allocation.levels
            stitched = stitch(network.model, network.database, levels, few, refit=False)
            errors.append(self.outputs.of(stitched))
        self.progress("try on images", len(entrants), len(entrants))
        return entrants[int(np.argmin(errors))][:2]

    def _finish(
        self,
        goal: Goal,
        network: Prunable,
        proposal: Proposal,
        advice: Advice,
        rounds: Sequence[Round],
    ) -> Guided:
        """Reconstruct the last choice, compile it with the kernels that won, time it once more."""
        levels = proposal.allocation.levels
        self.progress("reconstruct", 0, 100)
        pruned = stitch(
            network.model,
            network.database,
            levels,
            self.images,
            progress=lambda share: self.progress("reconstruct", round(100 * share), 100),
        )
        bundle = self._compile_candidate(pruned, "pruned", advice)
        ratio = self._ratio(bundle)
        return Guided(
            goal=goal,
            model=pruned,
            dense_us=self.dense_us,
            run_us=self.dense_us / ratio[0],
            speedup=ratio,
            cut=network.cut,
            density=_nonzeros(pruned, levels) / _size(self.onnx, levels),
            layers=tuple(_layers(network, proposal)),
            rounds=tuple(rounds),
        )

    def _cut_networks(self, whole: Prunable) -> Iterator[Prunable]:
        """Copies without some channels, calibrated as the whole network is."""
        cuts: ChannelCuts | None = None
        for share in CUTS:
            folder = self.folder / f"channels-{share:.2f}-{self._digest()}"
            path = folder / "model.onnx"
            if not path.exists():
                if cuts is None:
                    cuts = ChannelCuts(
                        self.onnx,
                        self.images,
                        whole.layer_us,
                        lambda done: self.progress("channels", round(100 * done), 100),
                    )
                smaller = cuts.without(share)
                if smaller is None:
                    return
                make_folder(folder)
                write_file(path, smaller.SerializeToString())
            model = load_onnx(path)
            database = build_database(
                model,
                self.images,
                folder / "calibration",
                patterns=whole.database.patterns,
                criterion=whole.database.criterion,
                progress=lambda step: self.progress(
                    f"{step.what} {step.layer}", round(1000 * step.share), 1000
                ),
            )
            yield self._prunable(path, model, database, share)

    def _digest(self) -> str:
        """Of what cut networks depend on: the folder may have served others."""
        made_of = self.onnx.SerializeToString(deterministic=True), self.images.digest().encode()
        return hashlib.sha256(b"".join(made_of)).hexdigest()[:12]

    def _prunable(
        self, path: Path, model: onnx.ModelProto, database: Database, cut: float
    ) -> Prunable:
        errors = level_errors(
            model,
            database,
            self.images,
            lambda share: self.progress("errors of levels", round(100 * share), 100),
        )
        return Prunable(
            *(path, model, database, errors, self.pricer, self.target),
            threads=self.threads,
            batch=self.batch,
            cut=cut,
        )

    def _compile_candidate(self, model: onnx.ModelProto, name: str, advice: Advice) -> Path:
        path = self.folder / f"{name}.onnx"
        write_file(path, model.SerializeToString())
        return self._compile(path, f"{name}.topi", advice=advice)

    def _compile(
        self, model: Path, name: str, *, dense: bool = False, advice: Advice | None = None
    ) -> Path:
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
            advice=advice,
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


def _layers(network: Prunable, proposal: Proposal) -> Iterator[GuidedLayer]:
    for layer in network.options(proposal.plan):
        option, dense = proposal.allocation.options[layer.layer], layer.options[0]
        reason = ""
        if option.level == DENSE and len(layer.options) == 1:
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


def _nonzeros(model: onnx.ModelProto, layers: Collection[str]) -> int:
    weights = [layer.weight for layer in weighted_layers(model) if layer.name in layers]
    return sum(int(np.count_nonzero(weight)) for weight in weights)


def _size(model: onnx.ModelProto, layers: Collection[str]) -> int:
    return sum(v.weight.size for v in weighted_layers(model) if v.name in layers) or 1


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
