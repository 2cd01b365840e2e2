"""A training through stages on disk: weights, masks, the optimizer's state, how far it has come."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topiarist.pruning.dppnet.stages import TrainSettings
from topiarist.pruning.training.checkpoint import fitting, read_state, write_state


@dataclass(frozen=True)
class Position:
    """Where to begin: the stage, its epoch, and the optimizer's state if it has begun."""

    stage: int = 0
    epoch: int = 0
    optimizer: dict[str, Any] | None = None


def save_checkpoint(
    path: Path,
    model: nn.Module,
    settings: TrainSettings,
    optimizer: torch.optim.Optimizer,
    stage: int,
    epochs: int,
) -> None:
    """Write the state after `epochs` epochs of a stage; an older file stays until it is whole."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "stage": stage,
        "epochs": epochs,
    }
    write_state(path, asdict(settings), state)


def load_checkpoint(path: Path, model: nn.Module, settings: TrainSettings) -> Position:
    """Bring the network to the state in the file; without a file, the start of training."""
    state = read_state(path, asdict(settings))
    if state is None:
        return Position()
    with fitting(path):
        stage, epochs, optimizer = state["stage"], state["epochs"], state["optimizer"]
        model.load_state_dict(state["model"])
    if epochs == settings.stages[stage].epochs:
        return Position(stage + 1)
    return Position(stage, epochs, optimizer)
