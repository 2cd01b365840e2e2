"""Pruning to a latency: the levels of all layers are chosen by price, then the clock decides.

Prices come from a latency model, errors from what each level alone does to the network's outputs,
and the choice from dynamic programming (SPDY, ICML 2022). Networks with some channels cut out
before may take part, and so does one level for all layers: what is nearest to the dense network's
outputs is taken. It is then compiled and timed against the dense build; what prices got wrong
corrects them, and the levels are chosen again, until the measured latency is the one that was
asked for. Time depends on where the zeros are, so only the last choice is reconstructed. A layer
that zeros would not make faster stays dense (Park et al., ICLR 2017, section 2.3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from topiarist.compiler.choose import Advice
from topiarist.compiler.contest import TOLERANCE, Attempt, Contest, Round
from topiarist.compiler.frontend import load_onnx
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.model_files import Source
from topiarist.compiler.output_file import write_file
from topiarist.compiler.prunable import Proposal, Prunable
from topiarist.compiler.timed_builds import TimedBuilds
from topiarist.errors import BudgetError, TrainingError
from topiarist.pruning.calibration import MOST, Images
from topiarist.pruning.channel_cuts import ChannelCuts
from topiarist.pruning.database import Database, build_database, make_folder
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.level import DENSE, Level
from topiarist.pruning.level_errors import level_errors
from topiarist.pruning.matching.match import Recipe, match_outputs
from topiarist.pruning.output_error import OutputError
from topiarist.pruning.stitch import stitch
from topiarist.targets.spec import TargetSpec

BUILDS = 3  # of reconstructed networks, at most: their times may differ from those of a round
CONTEST_IMAGES = 256  # to reconstruct what is compared, and others to compare it on
MATCHING_S = 75.0
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
class Guided:
    """A pruned network, and how it was arrived at.

    `speedup` is the median of ratios to the dense build, timed in turns, with its 95 % interval.
    `way` says what was done, `cut` the share of time that was cut out with channels, `density` the
    share of nonzeros that is left in all layers that could be pruned. `unmatched` is why outputs
    were not matched, if they were to be.
    """

    goal: Goal
    model: onnx.ModelProto = field(repr=False)
    dense_us: float
    run_us: float
    speedup: tuple[float, float, float]
    way: str
    cut: float
    density: float
    layers: tuple[GuidedLayer, ...]
    rounds: tuple[Round, ...]
    unmatched: str = ""

    @property
    def distance(self) -> float:
        """Of the measured latency from what was asked for, as a share of it."""
        return abs(self.run_us / self.goal.us(self.dense_us) - 1)

    @property
    def reached(self) -> bool:
        """Whether the measured latency is within the tolerance of what was asked for."""
        return self.distance <= TOLERANCE

    @property
    def levels(self) -> dict[str, Level]:
        """The level of each layer that could be pruned."""
        return {layer.layer: layer.level for layer in self.layers}


class GuidedPruner:
    """Prunes one network to any latency, from one calibration.

    `folder` keeps the dense bundle, networks with channels cut out (only with `channels`), the
    timings, and the pruned bundle `pruned.topi`. With `even` every layer of the whole network
    gets the same level: the baseline. What is pruned is matched to the dense network for at most
    `matching_s` seconds, by all `images`; layers are reconstructed from the first of them.
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
        matching_s: float = MATCHING_S,
        progress: Progress = lambda stage, done, total: None,
    ) -> None:
        self.onnx = load_onnx(model)
        self.images = images.first(MOST)
        self.all_images = images
        self.target = target
        self.pricer = source.pricer
        self.folder = folder
        self.threads = threads
        self.batch = batch
        self.matching_s = matching_s
        self.progress = progress
        self.outputs = OutputError(self.onnx, images, CONTEST_IMAGES)
        whole = self._prunable(model, self.onnx, database, 0.0)
        networks = [whole, *self._cut_networks(whole)] if channels and not even else [whole]
        self.builds = TimedBuilds(
            *(model, folder, target), threads=threads, batch=batch, progress=progress
        )
        rest_us = self.dense_us * self.builds.dense_share_of_others
        for network in networks:
            network.rest_us = rest_us
            network.scale = (self.dense_us - rest_us) / whole.dense_us
        whole.correct_dense(self.builds.dense_manifest, self.dense_us)
        self.networks = [whole.evenly()] if even else [*networks, whole.evenly()]

    @property
    def dense_us(self) -> float:
        """What the dense build takes."""
        return self.builds.dense_us

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
        reaching = [n for n in self.networks if n.least_us * (1 - TOLERANCE) <= wanted_us]
        error_of = self._error if len(reaching) > 1 else (lambda network, proposal: 0.0)
        contest = Contest(reaching, wanted_us, self.builds, error_of)
        found: list[tuple[Guided, Attempt]] = []
        while True:
            attempt = contest.winner()
            pruned, manifest = self._finish(goal, attempt, contest.rounds)
            found.append((pruned, attempt))
            if pruned.reached or len(found) == BUILDS:
                break
            contest.correct(attempt, manifest, pruned.run_us)
        pruned, attempt = min(found, key=lambda one: one[0].distance)
        return self._matched(pruned, attempt.advice) if self.matching_s else pruned

    def _error(self, network: Prunable, proposal: Proposal) -> float:
        """Of the outputs for other images with these levels, reconstructed from a few."""
        self.progress("try on images", 0, 1)
        few, levels = self.images.first(CONTEST_IMAGES), proposal.allocation.levels
        return self.outputs.of(stitch(network.model, network.database, levels, few))

    def _finish(
        self, goal: Goal, attempt: Attempt, rounds: Sequence[Round]
    ) -> tuple[Guided, Manifest]:
        """Reconstruct the choice, compile it with the kernels that won, time it once more."""
        network, levels = attempt.network, attempt.proposal.allocation.levels
        self.progress("reconstruct", 0, 100)
        pruned = stitch(
            network.model,
            network.database,
            levels,
            self.images,
            progress=lambda share: self.progress("reconstruct", round(100 * share), 100),
        )
        manifest, ratio = self.builds.timed(pruned, "pruned", attempt.advice)
        found = Guided(
            goal=goal,
            model=pruned,
            dense_us=self.dense_us,
            run_us=self.dense_us / ratio.median,
            speedup=(ratio.median, ratio.low, ratio.high),
            way=network.way,
            cut=network.cut,
            density=_nonzeros(pruned, levels) / _size(self.onnx, levels),
            layers=tuple(_layers(network, attempt.proposal)),
            rounds=tuple(rounds),
        )
        return found, manifest

    def _matched(self, found: Guided, advice: Advice) -> Guided:
        """With outputs nearer to the dense network's; zeros stay, and so does the time."""
        try:
            model = match_outputs(
                self.onnx,
                found.model,
                self.all_images,
                Recipe(seconds=self.matching_s),
                progress=lambda share: self.progress("match outputs", round(100 * share), 100),
            )
        except TrainingError as error:
            return replace(found, unmatched=str(error))
        self.builds.build(model, "pruned", advice)
        return replace(found, model=model)

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
