"""A training on disk: weights, masks, the optimizer's state, and how far it has come.

The file is torch's, read with `weights_only`: tensors and plain values, nothing that is executed.
"""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from topiarist.errors import TrainingError
from topiarist.pruning.dppnet.stages import TrainSettings


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
    unfinished = path.with_name(f"{path.name}.part")
    state = {
        "settings": asdict(settings),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "stage": stage,
        "epochs": epochs,
    }
    torch.save(state, unfinished)
    unfinished.replace(path)


def load_checkpoint(path: Path, model: nn.Module, settings: TrainSettings) -> Position:
    """Bring the network to the state in the file; without a file, the start of training."""
    if not path.parent.is_dir():
        raise TrainingError(f"There is no folder {path.parent} for the checkpoint: make it first.")
    if not path.exists():
        return Position()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, stage, epochs = state["settings"], state["stage"], state["epochs"]
        if saved != asdict(settings):
            raise TrainingError(f"Checkpoint {path} has other settings. {_REMEDY}")
        model.load_state_dict(state["model"])
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise TrainingError(f"Checkpoint {path} doesn't fit: {error}. {_REMEDY}") from None
    if epochs == settings.stages[stage].epochs:
        return Position(stage + 1)
    return Position(stage, epochs, state["optimizer"])


_REMEDY = "Go on with the network and settings that it is of, or name another file."
