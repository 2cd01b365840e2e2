"""Train a converted network through its stages, epoch by epoch, resumable after each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.nn import functional

from topiarist.errors import TrainingError
from topiarist.pruning.dppnet.checkpoint import Position, load_checkpoint, save_checkpoint
from topiarist.pruning.dppnet.layer import dpp_layers, threshold_loss
from topiarist.pruning.dppnet.stages import Stage, TrainSettings

# Images [N, C, H, W], and classes [N] or, to learn from another network, their shares [N, classes].
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class EpochReport:
    """An epoch that is done. `kept` is the mean share of positions in the unions of masks."""

    stage: str
    epoch: int  # from 0, within the stage
    epochs: int
    learning_rate: float
    loss: float  # mean cross-entropy of an image
    accuracy: float  # on the training images, as they went by
    kept: float
    score: float | None  # what `evaluate` said


def train(
    model: nn.Module,
    batches: Batches,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Callable[[EpochReport], None] | None = None,
) -> None:
    """Train a network of `convert` in place, where it lies, on batches such as a DataLoader's.

    `checkpoint` is written after each epoch, and training goes on from it if it is there. Torch's
    random numbers are seeded for each epoch, so a training that was interrupted ends like one that
    was not, unless the loader draws from a generator of its own. Raises TrainingError when the
    network has no DPP layers, the checkpoint is of another training, or the loss is not finite.
    """
    if not dpp_layers(model):
        raise TrainingError("The network has no DPP layers: convert it first.")
    start = load_checkpoint(checkpoint, model, settings) if checkpoint else Position()
    for index, stage in enumerate(settings.stages[start.stage :], start.stage):
        begin = start if index == start.stage else Position(index)
        for epoch, optimizer, loss, accuracy in _epochs(model, batches, settings, begin):
            if checkpoint:
                save_checkpoint(checkpoint, model, settings, optimizer, index, epoch + 1)
            score = evaluate(model) if evaluate else None
            if progress:
                rate, kept = stage.rate(epoch), kept_positions(model)
                progress(
                    EpochReport(stage.name, epoch, stage.epochs, rate, loss, accuracy, kept, score)
                )


def _epochs(
    model: nn.Module, batches: Batches, settings: TrainSettings, begin: Position
) -> Iterator[tuple[int, torch.optim.SGD, float, float]]:
    """The rest of a stage: each epoch, the optimizer after it, mean cross-entropy, accuracy."""
    stage = settings.stages[begin.stage]
    if begin.epoch == 0:
        for layer in dpp_layers(model).values():
            layer.use_masks(stage.masks)
    optimizer = _optimizer(model, settings, stage)
    if begin.optimizer is not None:
        optimizer.load_state_dict(begin.optimizer)
    for epoch in range(begin.epoch, stage.epochs):
        if stage.until_kept is not None and kept_positions(model) <= stage.until_kept:
            return
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(epoch)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed + 100_000 * begin.stage + epoch)
            loss, accuracy = _epoch(model, batches, optimizer, stage)
        yield epoch, optimizer, loss, accuracy


def kept_positions(model: nn.Module) -> float:
    """The share of kernel positions in the unions of masks, mean over the layers."""
    return float(mean(m.union().double().mean().item() for m in dpp_layers(model).values()))


def _optimizer(model: nn.Module, settings: TrainSettings, stage: Stage) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(
        trained,
        lr=stage.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _epoch(
    model: nn.Module, batches: Batches, optimizer: torch.optim.SGD, stage: Stage
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    device = next(model.parameters()).device
    model.train()
    total = right = count = 0.0
    for images, classes in batches:
        images, classes = images.to(device), classes.to(device)
        scores = model(images)
        cross_entropy = functional.cross_entropy(scores, classes)
        loss = cross_entropy
        if stage.threshold_penalty:
            loss = loss + stage.threshold_penalty * threshold_loss(model)
        if not math.isfinite(value := loss.item()):
            raise TrainingError(
                f"Stage {stage.name!r}: the loss is {value}. Lower the learning rate, "
                f"{optimizer.param_groups[0]['lr']:g}; the checkpoint is of the epoch before."
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += cross_entropy.item() * len(images)
        labels = classes if classes.ndim == 1 else classes.argmax(dim=1)
        right += int((scores.argmax(dim=1) == labels).sum())
        count += len(images)
    if not count:
        raise TrainingError("There are no batches: an iterator can be gone through only once.")
    return total / count, right / count
