"""Where a layer's zeros would be at a level that it isn't pruned to: what prices are asked with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.pruning.level import BLOCK_ROWS, Level, n_m
from topiarist.pruning.masks import block_mask, n_m_mask, unstructured_mask
from topiarist.pruning.patterns import DENSE_FROM, Mask
from topiarist.pruning.saliency import Scores, magnitude
from topiarist.schedules.workload import SparsitySignature, signature


def signature_at(weight: NDArray[Any], level: Level, groups: int = 1) -> SparsitySignature:
    """The signature of a weight [O, C / groups, kh, kw] pruned to a level by magnitude.

    Where the level is denser than the weight, some of its zeros, drawn at random but always the
    same ones, count as weights that stay. Raises ValueError for the patterns "kernel<k>".
    """
    return signatures_at(weight, [level], groups)[0]


def signatures_at(
    weight: NDArray[Any], levels: Iterable[Level], groups: int = 1
) -> list[SparsitySignature]:
    """As `signature_at`, of several levels."""
    scores = _scores(weight)
    return [signature_of(_mask(scores, level, groups), level) for level in levels]


def _scores(weight: NDArray[Any]) -> Scores:
    """Magnitudes; those of zeros are less than all others, and all different."""
    scores = magnitude(weight)
    zeros = scores == 0
    count = int(np.count_nonzero(zeros))
    if count:
        least = float(np.min(scores, where=~zeros, initial=1.0))
        scores[zeros] = least * np.random.default_rng(0).uniform(0.0, 0.5, count)
    return scores


def _mask(scores: Scores, level: Level, groups: int) -> Mask:
    numbers = n_m(level.pattern)
    if numbers is not None:
        return n_m_mask(scores, *numbers)
    if level.pattern in ("dense", "unstructured"):
        return unstructured_mask(scores, level.density)
    if level.pattern not in BLOCK_ROWS:
        raise ValueError(f"magnitude has no rule for the pattern {level.pattern!r}")
    return block_mask(scores, level.density, groups, BLOCK_ROWS[level.pattern])


def signature_of(mask: Mask, level: Level) -> SparsitySignature:
    """What the compiler finds in a weight [O, C / groups, kh, kw] with these zeros."""
    dense = np.count_nonzero(mask) >= DENSE_FROM * mask.size
    return signature(mask.view(np.int8), "dense" if dense else level.pattern)
