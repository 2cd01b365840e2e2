"""The three stages of training and their learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from topiarist.pruning.dppnet.layer import MaskMode

Schedule = Literal["cosine", "steps"]


@dataclass(frozen=True)
class Stage:
    """Some epochs with one kind of masks. "steps" divides the rate by 10 at 1/2 and at 3/4."""

    name: str
    masks: MaskMode
    epochs: int
    learning_rate: float
    last_rate: float = 0.0  # of "cosine"
    schedule: Schedule = "cosine"
    threshold_penalty: float = 0.0
    until_kept: float | None = None  # the stage ends early, at this share of positions in unions

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.learning_rate <= 0:
            raise ValueError(f"needs an epoch and a positive learning rate, got {self}")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        done = epoch / self.epochs
        if self.schedule == "steps":
            return self.learning_rate * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
        span = self.learning_rate - self.last_rate
        return self.last_rate + span * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what training gives, but the network and the images."""

    stages: tuple[Stage, ...]
    momentum: float = 0.9
    weight_decay: float = 1e-4  # of thresholds, too
    seed: int = 42


def three_stages(
    epochs: tuple[int, int, int],
    *,
    learning_rate: float = 0.1,
    threshold_penalty: float = 1e-4,
    schedule: Schedule = "cosine",
) -> tuple[Stage, ...]:
    """Experts without masks; masks learned along; masks frozen, at a tenth of the rate."""
    rate = learning_rate
    return (
        Stage("experts", "none", epochs[0], rate, 1e-6, schedule),
        Stage("prune", "learned", epochs[1], rate, 1e-6, schedule, threshold_penalty),
        Stage("fine-tune", "frozen", epochs[2], rate / 10, 1e-4, schedule),
    )
