"""A training on disk: a dictionary of tensors and plain values, with the settings it is of.

The file is torch's, read with `weights_only`: nothing in it is executed.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from topiarist.errors import TrainingError

_REMEDY = "Go on with the network and settings that it is of, or name another file."


def write_state(path: Path, settings: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a state; an older file stays until the new one is whole."""
    unfinished = path.with_name(f"{path.name}.part")
    torch.save({"settings": dict(settings), **state}, unfinished)
    unfinished.replace(path)


def read_state(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in a file, None without a file. Raises TrainingError for other settings."""
    if not path.parent.is_dir():
        raise TrainingError(f"There is no folder {path.parent} for the checkpoint: make it first.")
    if not path.exists():
        return None
    with fitting(path):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        same = state["settings"] == settings
    if not same:
        raise TrainingError(f"Checkpoint {path} has other settings. {_REMEDY}")
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Where a state is used: what goes wrong then is that the checkpoint is of something else."""
    try:
        yield
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise TrainingError(f"Checkpoint {path} doesn't fit: {error}. {_REMEDY}") from None
