"""How training makes zeros: lasso with a threshold, group lasso, dynamic network surgery."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from topiarist.pruning.level import BLOCK_ROWS
from topiarist.pruning.patterns import block_starts

Structure = Literal["block4x1", "block8x1", "block16x1", "filter", "position"]


@dataclass(frozen=True)
class Update:
    """A weight [O, C / groups, kh, kw] around the optimizer's step, counted from 0.

    `dense` is the weight before training, `mask` what was kept after the step before.
    """

    layer: str
    groups: int
    step: int
    dense: Tensor
    mask: Tensor
    before: Tensor
    after: Tensor


class Method(Protocol):
    """A regulariser. With `splices` the zeros keep a hidden value, which training goes on with."""

    @property
    def splices(self) -> bool:
        """Whether weights that are masked now have a value to come back with."""
        ...

    @property
    def pattern(self) -> str:
        """Of the zeros that it makes."""
        ...

    def pull(self, weight: Tensor, groups: int) -> Tensor | None:
        """What is added to the weight's gradient."""
        ...

    def keep(self, update: Update) -> Tensor:
        """The mask after a step."""
        ...


@dataclass(frozen=True)
class Threshold:
    """Below which a weight becomes zero: smaller, the more the weight was just moved.

    1 / (|u| / level + 1 / (factor * level)) for an update u, as in SkimCaffe: `factor * level` for
    a weight that rests. A zero comes back when one update takes it over the threshold.
    """

    level: float = 1e-4
    factor: float = 10.0

    def of(self, update: Tensor) -> Tensor:
        """The threshold of each weight, or group of them, that moved by so much."""
        return 1 / (update.abs() / self.level + 1 / (self.factor * self.level))


@dataclass(frozen=True)
class Lasso:
    """Adds `strength` times the L1 norm to the loss: guided element-wise sparsity learning."""

    strength: float = 5e-5
    threshold: Threshold = Threshold()
    splices = False
    pattern = "unstructured"

    def pull(self, weight: Tensor, groups: int) -> Tensor:
        """The sub-gradient."""
        return self.strength * weight.sign()

    def keep(self, update: Update) -> Tensor:
        """What is over its threshold."""
        return update.after.abs() > self.threshold.of(update.after - update.before)


@dataclass(frozen=True)
class GroupLasso:
    """Adds `strength` times each group's L2 norm, times the root of its size (Wen et al., 2016).

    A group is a block of 4, 8 or 16 output channels at one tap of one input channel, a filter, or a
    position of the kernel in all channels.
    """

    structure: Structure = "block4x1"
    strength: float = 5e-5
    threshold: Threshold = Threshold()
    splices = False

    @property
    def pattern(self) -> str:
        """The structure."""
        return self.structure

    def pull(self, weight: Tensor, groups: int) -> Tensor:
        """The gradient of the norms; 0 for a group of zeros."""
        norms, sizes = group_norms(weight, self.structure, groups)
        return self.strength * sizes.sqrt() * weight / norms.clamp_min(1e-12)

    def keep(self, update: Update) -> Tensor:
        """Groups whose root mean square is over the threshold of their updates'."""
        norms, sizes = group_norms(update.after, self.structure, update.groups)
        moved, _ = group_norms(update.after - update.before, self.structure, update.groups)
        root = sizes.sqrt()
        kept: Tensor = norms / root > self.threshold.of(moved / root)
        return kept.expand_as(update.after)


@dataclass(frozen=True)
class Surgery:
    """Dynamic network surgery (Guo, Yao and Chen, 2016): masks, and splicing back what grows.

    With t = mean + `rate` times the standard deviation of a layer's magnitudes before training,
    weights below 0.9 t go and those above 1.1 t come back; between, they stay as they are. A
    layer's mask changes at a step with the probability (1 + gamma * step) ** -power. t grows to
    this value over the first `ramp` steps; 0, as with the authors, has it there at once.
    """

    rate: float = 1.0
    ramp: int = 0
    gamma: float = 1e-3
    power: float = 1.0
    seed: int = 0
    splices = True
    pattern = "unstructured"

    def pull(self, weight: Tensor, groups: int) -> None:
        """Nothing: the threshold alone prunes."""

    def keep(self, update: Update) -> Tensor:
        """The mask before, with what goes and what comes back."""
        chance = (1 + self.gamma * update.step) ** -self.power
        if random.Random(f"{self.seed} {update.layer} {update.step}").random() >= chance:
            return update.mask
        sizes = update.dense.abs()
        grown = min(1.0, (update.step + 1) / self.ramp) if self.ramp else 1.0
        limit = grown * max(0.0, float(sizes.mean() + self.rate * sizes.std(correction=0)))
        now = update.after.abs()
        kept: Tensor = (update.mask & (now >= 0.9 * limit)) | (now > 1.1 * limit)
        return kept


def group_norms(weight: Tensor, structure: Structure, groups: int) -> tuple[Tensor, Tensor]:
    """The L2 norm of the group of each weight, and its size; both broadcast to the weight.

    Blocks don't cross the groups of a grouped convolution; the last one may be smaller.
    """
    squares = weight.square()
    if structure == "filter":
        sums = squares.sum(dim=(1, 2, 3), keepdim=True)
        return sums.sqrt(), torch.tensor(float(weight[0].numel()))
    if structure == "position":
        sums = squares.sum(dim=(0, 1), keepdim=True)
        return sums.sqrt(), torch.tensor(float(weight[:, :, 0, 0].numel()))
    starts = torch.tensor(block_starts(len(weight), groups, BLOCK_ROWS[structure]))
    block = torch.bucketize(torch.arange(len(weight)), starts, right=True) - 1
    sums = squares.new_zeros(len(starts), *weight.shape[1:]).index_add(0, block, squares)
    sizes = torch.bincount(block).to(weight.dtype)
    return sums[block].sqrt(), sizes[block, None, None, None]
