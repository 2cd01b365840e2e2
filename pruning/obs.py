"""ExactOBS: remove weights one at a time and let those that stay make up for them.

Optimal Brain Compression (Frantar and Alistarh, NeurIPS 2022). For filters w and the second
moments H of their inputs, the weight p whose loss is least, w_p^2 / (H^-1)_pp, goes; the others
change by -w_p / (H^-1)_pp * (H^-1)[p], and p drops out of H^-1 by a step of Gaussian elimination.

Filters of a block share their zeros, so they share H^-1 as well, and a block costs as much as one
filter. The elimination is put off and done for many steps at once, as a pivoted Cholesky
factorisation does it: the same result, by matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import blas

from topiarist.pruning.cores import on_all_cores
from topiarist.targets.linux import available_cores

Array = NDArray[np.float64]
Index = NDArray[np.int64]

BATCH_BYTES = 96 << 20  # of inverses that a core works on at once
_TINY = 1e-30


@dataclass(frozen=True, eq=False)
class Removals:
    """In which order the columns of each block of filters go.

    `order` is [blocks, steps], the column that goes in each step; `cost` what each step adds to
    the block's loss sum((w - w0) H (w - w0)^T), of the same shape.
    """

    order: Index
    cost: Array


@dataclass(frozen=True)
class GroupLimit:
    """Of the columns with the number i in `group` [c] at most `removed[i]` may go: N:M."""

    group: Index
    removed: Index

    @property
    def steps(self) -> int:
        """How many columns may go in all."""
        return int(self.removed.sum())


def remove_one_by_one(
    weight: Array,
    inverse: Array,
    limit: GroupLimit | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Removals:
    """The greedy order for blocks of filters [blocks, rows, c] with one inverse [c, c].

    All c columns go, or as many as the limit lets.
    """
    blocks, _, columns = weight.shape
    steps = columns if limit is None else limit.steps

    def remove(part: slice) -> Removals:
        w = weight[part].copy()
        inverses = np.repeat(inverse[None], len(w), axis=0)
        names = np.repeat(np.arange(columns)[None], len(w), axis=0)
        return eliminate(w, inverses, names, steps, limit)

    return in_batches(remove, blocks, max(1, BATCH_BYTES // (8 * columns**2)), progress)


def in_batches(
    remove: Callable[[slice], Removals],
    blocks: int,
    at_once: int,
    progress: Callable[[float], None],
) -> Removals:
    """Removals of all blocks, on all cores, `at_once` or fewer on each."""
    batch = min(64, -(-blocks // available_cores()), at_once)
    parts = [slice(s, min(s + batch, blocks)) for s in range(0, blocks, batch)]
    results = []
    for result in on_all_cores(remove, parts):
        results.append(result)
        progress(len(results) / len(parts))
    return Removals(
        np.concatenate([r.order for r in results]), np.concatenate([r.cost for r in results])
    )


def eliminate(
    w: Array, inverses: Array, columns: Index, steps: int, limit: GroupLimit | None = None
) -> Removals:
    """The greedy order of blocks with an inverse each.

    `w` is [blocks, rows, k], `inverses` [blocks, k, k], `columns` [blocks, k] what the positions
    are called in the order; `w` and `inverses` are used up.
    """
    blocks = len(w)
    order, cost = np.empty((blocks, steps), np.int64), np.empty((blocks, steps))
    allowance = None if limit is None else _allowance(limit, blocks)
    at = 0
    while at < steps:
        width = min(steps - at, 32 if w.shape[2] < 1024 else 96)
        panel = slice(at, at + width)
        factor, gone = _panel(w, inverses, columns, order[:, panel], cost[:, panel], allowance)
        at += width
        if at < steps:
            w, inverses, columns = _compact(w, inverses, columns, factor, ~gone)
    return Removals(order, cost)


@dataclass(frozen=True, eq=False)
class _Allowance:
    """How many columns of each group may still go, [blocks, groups]; it is counted down."""

    group: Index
    left: Index

    def forbidden(self, columns: Index) -> NDArray[np.bool_]:
        """The columns [blocks, k] whose group has given all it may."""
        return np.take_along_axis(self.left, self.group[columns], axis=1) <= 0

    def take(self, columns: Index) -> NDArray[np.bool_]:
        """Count one column [blocks] of each block; which groups have no more to give."""
        rows = np.arange(len(columns))
        self.left[rows, self.group[columns]] -= 1
        return self.left[rows, self.group[columns]] <= 0


def _allowance(limit: GroupLimit, blocks: int) -> _Allowance:
    """The limit for each block, nothing taken yet."""
    return _Allowance(limit.group, np.repeat(limit.removed[None], blocks, axis=0))


def _panel(
    w: Array,
    inverses: Array,
    columns: Index,
    order: Index,
    cost: Array,
    allowance: _Allowance | None,
) -> tuple[Array, NDArray[np.bool_]]:
    """Take as many columns as `order` is wide; fills `order` and `cost`, and updates `w`.

    Returns the factor V [blocks, width, k], which the inverses are to lose V^T V of, and the
    positions that are gone.
    """
    blocks, _, k = w.shape
    every = np.arange(blocks)
    diagonal = np.diagonal(inverses, axis1=1, axis2=2).copy()
    barred = np.zeros((blocks, k)) if allowance is None else _bar(allowance.forbidden(columns))
    gone = np.zeros((blocks, k), np.bool_)
    factor = np.empty((blocks, order.shape[1], k))
    for step in range(order.shape[1]):
        score = np.einsum("brk,brk->bk", w, w)
        score /= diagonal
        score += barred
        p = score.argmin(axis=1)
        order[:, step], cost[:, step] = columns[every, p], score[every, p]
        column = inverses[every, p]
        if step:
            earlier = factor[every, :step, p][:, None]
            column -= np.matmul(earlier, factor[:, :step])[:, 0]
        pivot = diagonal[every, p]
        w -= (w[every, :, p] / pivot[:, None])[:, :, None] * column[:, None]
        w[every, :, p] = 0.0
        column /= np.sqrt(pivot)[:, None]
        factor[:, step] = column
        diagonal -= column * column
        np.maximum(diagonal, _TINY, out=diagonal)
        barred[every, p] = np.inf
        gone[every, p] = True
        if allowance is not None:
            _bar_groups(barred, allowance, columns, columns[every, p])
    return factor, gone


def _bar(forbidden: NDArray[np.bool_]) -> Array:
    """Infinite where a column may not go, to be added to its score."""
    return np.where(forbidden, np.inf, 0.0)


def _bar_groups(barred: Array, allowance: _Allowance, columns: Index, taken: Index) -> None:
    """Bar what is left of the groups that have now given all they may."""
    full = allowance.take(taken)
    same = allowance.group[columns] == allowance.group[taken][:, None]
    barred[same & full[:, None]] = np.inf


def _compact(
    w: Array, inverses: Array, columns: Index, factor: Array, alive: NDArray[np.bool_]
) -> tuple[Array, Array, Index]:
    """Leave out the positions that are gone, and do the elimination that was put off."""
    blocks, rows, _ = w.shape
    left = int(alive[0].sum())
    positions = np.nonzero(alive)[1].reshape(blocks, left)
    smaller = np.empty((blocks, left, left))
    for block, keep in enumerate(positions):
        np.take(inverses[block][keep], keep, axis=1, out=smaller[block], mode="clip")
        part = np.ascontiguousarray(factor[block][:, keep]).T
        blas.dgemm(-1.0, part, part, 1.0, smaller[block].T, trans_b=1, overwrite_c=1)
    kept = np.broadcast_to(positions[:, None], (blocks, rows, left))
    return (
        np.take_along_axis(w, kept, axis=2),
        smaller,
        np.take_along_axis(columns, positions, axis=1),
    )
