"""Scores and a budget -> the mask of weights to keep, one function per pattern.

Scores are [O, C / groups, kh, kw] and not negative; a structure's score is the L2 norm of its
weights' scores. Exactly round(density * count) structures are kept, at least one; among equal
scores the earlier position wins.
"""

from __future__ import annotations

import numpy as np

from topiarist.pruning.level import BLOCK_ROWS
from topiarist.pruning.patterns import Mask, block_starts
from topiarist.pruning.saliency import Scores


def unstructured_mask(scores: Scores, density: float) -> Mask:
    """The largest single weights."""
    return largest(scores, density)


def block_mask(scores: Scores, density: float, groups: int = 1, block: int = 4) -> Mask:
    """Blocks of `block` consecutive output channels share their zeros.

    A group's last block may be smaller, so blocks compete by their root mean square.
    """
    starts = block_starts(len(scores), groups, block)
    sizes = np.diff(starts, append=len(scores))
    energy = np.add.reduceat(scores**2, starts, axis=0)
    kept = largest(energy / sizes[:, None, None, None], density)
    return np.repeat(kept, sizes, axis=0)


def filter_mask(scores: Scores, density: float) -> Mask:
    """Whole filters."""
    return _spread(
        largest(np.sqrt((scores**2).sum(axis=(1, 2, 3), keepdims=True)), density), scores
    )


def position_mask(scores: Scores, density: float) -> Mask:
    """Positions of the kernel, in all channels."""
    return _spread(largest(np.sqrt((scores**2).sum(axis=(0, 1), keepdims=True)), density), scores)


def mask_at(scores: Scores, pattern: str, density: float, groups: int = 1) -> Mask:
    """That of a pattern whose density can be chosen; ValueError for another pattern."""
    if pattern == "unstructured":
        return unstructured_mask(scores, density)
    if pattern in BLOCK_ROWS:
        return block_mask(scores, density, groups, BLOCK_ROWS[pattern])
    if pattern in ("filter", "position"):
        return (filter_mask if pattern == "filter" else position_mask)(scores, density)
    raise ValueError(f"zeros of the pattern {pattern!r} have no density of choice")


def _spread(kept: Mask, scores: Scores) -> Mask:
    return np.broadcast_to(kept, scores.shape).copy()


def n_m_mask(scores: Scores, n: int, m: int) -> Mask:
    """The n largest of every m consecutive input channels, at each kernel tap.

    Where C / groups is no multiple of m, the last group has fewer channels and keeps n of them.
    """
    channels = scores.shape[1]
    padding = -channels % m
    padded = np.pad(scores, ((0, 0), (0, padding), (0, 0), (0, 0)), constant_values=-1.0)
    grouped = padded.reshape(len(scores), -1, m, *scores.shape[2:])
    order = np.argsort(-grouped, axis=2, kind="stable")
    kept = np.zeros(grouped.shape, dtype=np.bool_)
    np.put_along_axis(kept, order[:, :, :n], True, axis=2)
    return kept.reshape(padded.shape)[:, :channels]


def largest(scores: Scores, density: float) -> Mask:
    """The round(density * size) largest of scores of any shape, at least one."""
    flat = scores.ravel()
    keep = max(1, round(density * flat.size))
    if keep >= flat.size:
        return np.ones(scores.shape, dtype=np.bool_)
    threshold = np.partition(flat, flat.size - keep)[flat.size - keep]
    kept: Mask = flat > threshold
    ties = np.flatnonzero(flat == threshold)
    kept[ties[: keep - int(np.count_nonzero(kept))]] = True
    return kept.reshape(scores.shape)
