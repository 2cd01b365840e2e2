"""Train a network that loses weights where that makes it faster, resumable after each round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from topiarist.errors import TrainingError
from topiarist.pruning.gsl.methods import Method
from topiarist.pruning.gsl.pruner import Pruner
from topiarist.pruning.guidance import Bounds, LayerPath, Paths, Prices, Rules, learn
from topiarist.pruning.training.batches import Batches
from topiarist.pruning.training.checkpoint import fitting, read_state, write_state
from topiarist.pruning.training.losses import Loss, cross_entropy

Stage = Literal["prune", "fine-tune"]


@dataclass(frozen=True)
class GslSettings:
    """Everything that decides what training gives, but the network, the images and the prices.

    Pruning trains at `learning_rate`, fine-tuning from there down to 0 along a cosine.
    """

    method: Method
    rules: Rules = field(default_factory=Rules)
    rounds: int = 10
    tune_rounds: int = 5
    steps: int = 100  # of a round
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.steps) < 1 or self.tune_rounds < 0 or self.learning_rate <= 0:
            raise ValueError(f"needs a round, a step and a positive learning rate, got {self}")

    def rate(self, stage: Stage, number: int) -> float:
        """The learning rate of a round, counted from 0 in its stage."""
        if stage == "prune":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * number / self.tune_rounds)) / 2

    def as_plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {**asdict(self), "method_name": type(self.method).__name__}


@dataclass(frozen=True)
class RoundReport:
    """A round that is done; `loss` is its mean."""

    stage: Stage
    number: int  # from 0, within the stage
    rounds: int
    loss: float
    paths: Paths


def train_guided(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    prices: Prices,
    settings: GslSettings,
    *,
    loss: Loss = cross_entropy,
    checkpoint: Path | None = None,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[RoundReport], None] = lambda report: None,
) -> dict[str, LayerPath]:
    """Prune and fine-tune in place; `layers` are those that may be pruned, as prices name them.

    Each round goes through `batches` anew, which should be shuffled. `checkpoint` is written after
    each, and training goes on from it if it is there; `origin` is what else it has to be of, plain
    values such as a hash of the images. Torch's random numbers are seeded for each
    round, so that a training that was interrupted ends like one that was not. Afterwards the
    network is in training mode no more. Raises TrainingError for a network that has nothing to
    prune, a checkpoint of another training, or a loss that is not finite.
    """
    trainer = _Trainer(model, layers, batches, settings, loss, origin or {})
    begun = trainer.load(checkpoint) if checkpoint else _Begun()

    def report(stage: Stage, number: int, rounds: int, paths: Paths) -> None:
        if checkpoint:
            trainer.save(checkpoint, _Begun(stage, number, paths))
        progress(RoundReport(stage, number - 1, rounds, trainer.loss, paths))

    paths = begun.paths
    if begun.stage == "prune":
        paths = learn(
            trainer,
            prices,
            settings.rules,
            settings.rounds,
            paths=paths,
            begin=begun.rounds,
            after=lambda done, found: report("prune", done, settings.rounds, found),
        )
    assert paths is not None
    for number in range(begun.rounds if begun.stage == "fine-tune" else 0, settings.tune_rounds):
        trainer.steps("fine-tune", number)
        report("fine-tune", number + 1, settings.tune_rounds, paths)
    model.eval()
    return dict(paths)


@dataclass(frozen=True)
class _Begun:
    """How far a training has come: the rounds that are done of a stage."""

    stage: Stage = "prune"
    rounds: int = 0
    paths: Paths | None = None


class _Trainer(Pruner):
    """The pruner with a network around it, as `guidance.Trainer` has it."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        batches: Batches,
        settings: GslSettings,
        loss: Loss,
        origin: Mapping[str, Any],
    ) -> None:
        super().__init__(layers, settings.method)
        self._of = {**settings.as_plain(), "origin": dict(origin)}
        self.model, self.batches, self.settings = model, batches, settings
        self.loss, self._loss = math.nan, loss
        self.optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.attach(self.optimizer)

    def train_round(self, number: int) -> None:
        """A round of pruning."""
        self.steps("prune", number)

    def steps(self, stage: Stage, number: int) -> None:
        """The steps of a round."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.rate(stage, number)
        self.model.train()
        total = 0.0
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed + 100_000 * (stage == "fine-tune") + number)
            for images, classes in itertools.islice(_endless(self.batches), settings.steps):
                total += self._step(images, classes)
        self.loss = total / settings.steps

    def _step(self, images: Tensor, classes: Tensor) -> float:
        device = next(self.model.parameters()).device
        images, classes = images.to(device), classes.to(device)
        loss = self._loss(self.model(images), images, classes)
        value = float(loss.item())
        if not math.isfinite(value):
            rate = self.optimizer.param_groups[0]["lr"]
            raise TrainingError(
                f"The loss is {value}. Lower the learning rate, {rate:g}, or the strength of "
                "pruning; the checkpoint is of the round before."
            )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return value

    def save(self, path: Path, begun: _Begun) -> None:
        """Everything that the next round depends on."""
        assert begun.paths is not None
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.state_dict(),
            "stage": begun.stage,
            "rounds": begun.rounds,
            "paths": {name: asdict(path) for name, path in begun.paths.items()},
        }
        write_state(path, self._of, state)

    def load(self, path: Path) -> _Begun:
        """The state in the file; without a file, the start of training."""
        state = read_state(path, self._of)
        if state is None:
            return _Begun()
        with fitting(path):
            self.load_state_dict(state["pruner"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            paths = {
                name: LayerPath(**{**saved, "bounds": Bounds(**saved["bounds"])})
                for name, saved in state["paths"].items()
            }
            return _Begun(state["stage"], state["rounds"], paths)


def _endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise TrainingError("There are no batches: an iterator can be gone through only once.")
