"""ExactOBS for wide layers: many weights at a time while there are many, then one at a time.

One-at-a-time removal needs an inverse [c, c] for each block of filters, c^3 multiplications.
Here the first weights go in rounds. A round removes those with the least w_p^2 d_p and then solves
for the rest, for all filters at once by conjugate gradients with the one H that they share. d_p is
1 / (H^-1)_pp at first and would be H_pp at last; in between, a power of each, fitted to the exact
inverse of two blocks in each round. What is left at the end is small enough for the exact way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topiarist.pruning.cores import on_all_cores
from topiarist.pruning.moments import invert
from topiarist.pruning.obs import (
    Array,
    GroupLimit,
    Index,
    Removals,
    eliminate,
    in_batches,
)
from topiarist.targets.linux import available_cores

Mask = NDArray[np.bool_]

EXACT_COLUMNS = 512  # that a block is left with for the exact way
ROUND_SHARE = 0.1  # of the columns left that go in a round
SOLVER_STEPS = 12
SOLVER_ERROR = 1e-2  # of the gradient's norm
_SAMPLES = 2


def remove_in_rounds(
    weight: Array,
    matrix: Array,
    inverse: Array,
    limit: GroupLimit | None = None,
    progress: Callable[[float], None] = lambda share: None,
    exact_columns: int = EXACT_COLUMNS,
) -> Removals:
    """What `remove_one_by_one` gives, nearly, for blocks of filters [blocks, rows, c].

    With a limit nothing is left to the exact way: every group gives what it may in rounds.
    """
    scheme = _Scheme(matrix, inverse, limit)
    if limit is not None:
        return _rounds(weight, scheme, limit.steps, progress)[2]
    steps = max(0, weight.shape[2] - exact_columns)
    w, keep, rounds = _rounds(weight, scheme, steps, lambda share: progress(share / 2))

    def finish(part: slice) -> Removals:
        return _finish(w[part], keep[part], matrix)

    rest = in_batches(finish, len(w), 1, lambda share: progress((1 + share) / 2))
    return Removals(
        np.concatenate([rounds.order, rest.order], axis=1),
        np.concatenate([rounds.cost, rest.cost], axis=1),
    )


def settle(w: Array, target: Array, keep: Mask, matrix: Array) -> tuple[Array, Array]:
    """Move filters [rows, c] to the least (w - target) H (w - target)^T with zeros but at `keep`.

    Returns them and the losses [rows].
    """
    step = -(-len(w) // available_cores())
    parts = [slice(s, s + step) for s in range(0, len(w), step)]
    done = list(
        on_all_cores(lambda part: _descend(w[part], target[part], keep[part], matrix), parts)
    )
    return np.concatenate([d[0] for d in done]), np.concatenate([d[1] for d in done])


def _descend(w: Array, target: Array, keep: Mask, matrix: Array) -> tuple[Array, Array]:
    """Conjugate gradients, preconditioned by the diagonal, for each filter by itself."""
    w = np.where(keep, w, 0.0)
    gradient = (w - target) @ matrix
    diagonal = np.diagonal(matrix)
    step = np.zeros_like(w)
    before = first = np.zeros(len(w))
    for count in range(SOLVER_STEPS):
        residual = np.where(keep, gradient, 0.0)
        scaled = residual / diagonal
        size = np.einsum("rc,rc->r", residual, scaled)
        first = size if not count else first
        if (size <= SOLVER_ERROR**2 * first).all():
            break
        step = (
            scaled + step * np.divide(size, before, where=before > 0, out=np.zeros(len(w)))[:, None]
        )
        moved = step @ matrix
        curvature = np.einsum("rc,rc->r", step, moved)
        length = np.divide(size, curvature, where=curvature > 0, out=np.zeros(len(w)))[:, None]
        w -= length * step
        gradient -= length * moved
        before = size
    return w, np.einsum("rc,rc->r", w - target, gradient)


@dataclass(frozen=True, eq=False)
class _Scheme:
    """What is the same for all blocks."""

    matrix: Array
    inverse: Array
    limit: GroupLimit | None


def _finish(w: Array, keep: Mask, matrix: Array) -> Removals:
    """The exact way for what one block [1, rows, c] has left."""
    columns = np.flatnonzero(keep[0])
    inverse = invert(matrix[np.ix_(columns, columns)])
    assert inverse is not None, "a part of a positive definite matrix is one"
    return eliminate(w[:, :, columns], inverse[None], columns[None], len(columns))


def _rounds(
    target: Array, scheme: _Scheme, steps: int, progress: Callable[[float], None]
) -> tuple[Array, Mask, Removals]:
    """Remove `steps` columns of each block; returns what the filters are then, and where."""
    blocks, rows, columns = target.shape
    w, keep = target.copy(), np.ones((blocks, columns), np.bool_)
    lost = np.zeros(blocks)
    orders, costs = [], []
    done = 0
    while done < steps:
        count = min(steps - done, max(1, int(ROUND_SHARE * (columns - done))))
        score = np.einsum("brc,brc->bc", w, w) * _stiffness(keep, scheme)
        score[~keep] = np.inf
        if scheme.limit is not None:
            _respect(score, keep, scheme.limit)
            count = min(count, int(np.isfinite(score).sum(axis=1).min()))
        chosen = np.argsort(score, axis=1, kind="stable")[:, :count]
        np.put_along_axis(keep, chosen, False, axis=1)
        flat = np.repeat(keep, rows, axis=0)
        w_rows, losses = settle(
            w.reshape(-1, columns), target.reshape(-1, columns), flat, scheme.matrix
        )
        w, total = w_rows.reshape(w.shape), losses.reshape(blocks, rows).sum(axis=1)
        orders.append(chosen)
        costs.append(_shared(np.take_along_axis(score, chosen, axis=1), total - lost))
        lost, done = np.maximum(total, lost), done + count
        progress(done / steps)
    return w, keep, Removals(np.concatenate(orders, axis=1), np.concatenate(costs, axis=1))


def _shared(score: Array, loss: Array) -> Array:
    """What a round has lost, over its columns as their scores are."""
    total = score.sum(axis=1)
    factor = np.divide(np.maximum(loss, 0.0), total, where=total > 0, out=np.zeros(len(score)))
    shares: Array = score * factor[:, None]
    return shares


def _stiffness(keep: Mask, scheme: _Scheme) -> Array:
    """d [c], about 1 / (H_keep^-1)_pp for any block."""
    first, last = -np.log(np.diagonal(scheme.inverse)), np.log(np.diagonal(scheme.matrix))
    span = last - first
    above, below = 0.0, 0.0
    samples = [np.flatnonzero(mask) for mask in keep[:_SAMPLES]]
    parts = on_all_cores(lambda columns: invert(scheme.matrix[np.ix_(columns, columns)]), samples)
    for columns, inverse in zip(samples, parts, strict=True):
        if inverse is not None:
            exact = -np.log(np.diagonal(inverse))
            above += float(((exact - first[columns]) * span[columns]).sum())
            below += float((span[columns] ** 2).sum())
    share = above / below if below > 0 else 0.0
    stiffness: Array = np.exp(first + share * span)
    return stiffness


def _respect(score: Array, keep: Mask, limit: GroupLimit) -> None:
    """Set the score of columns that may not go, whatever else goes, to infinity."""
    group = np.broadcast_to(limit.group, score.shape)
    order: Index = np.lexsort((score, group), axis=-1)
    sizes = np.bincount(limit.group)
    starts = np.cumsum(sizes) - sizes
    rank = np.empty_like(order)
    places = np.arange(score.shape[1]) - starts[limit.group[order]]
    np.put_along_axis(rank, order, places, axis=1)
    gone = np.stack([np.bincount(limit.group, ~k, len(sizes)) for k in keep]).astype(np.int64)
    left = np.take_along_axis(limit.removed - gone, group, axis=1)
    score[rank >= left] = np.inf
