"""Which kernel positions an expert keeps: a threshold on its mean magnitude at each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """1 where z > 0, else 0. Backward its slope is 2 - 4|z| to |z| = 0.4, 0.4 to 1, 0 beyond."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        size = z.abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, 0.4)
        return gradient * torch.where(size <= 1, slope, 0.0)


def position_scores(weight: Tensor, threshold: Tensor) -> Tensor:
    """How far each position is above its threshold, in (-0.5, 0.5): [P, kh, kw].

    `weight` is [P, O, I, kh, kw] and `threshold` [P, O]; the mean is over O and I.
    """
    margin = weight.abs().mean(dim=(1, 2)) - threshold.mean(dim=1)[:, None, None]
    return torch.sigmoid(margin) - 0.5


def learned_masks(weight: Tensor, threshold: Tensor) -> Tensor:
    """The masks of all experts, 0 or 1, with gradients to both arguments: [P, kh, kw].

    Where thresholds have outgrown all positions of all experts, the best one stays: a layer
    without any computes 0 for every image.
    """
    scores = position_scores(weight, threshold)
    masks: Tensor = StraightThrough.apply(scores)
    best = torch.zeros_like(masks).view(-1).scatter(0, scores.detach().argmax()[None], 1.0)
    dead = (masks.detach().sum() == 0).to(masks.dtype)
    return masks + dead * best.view_as(masks)
