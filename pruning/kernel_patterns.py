"""3x3 kernels that keep k taps each, in one of a few arrangements: the library of the layer.

PatDNN (Niu et al., ASPLOS 2020) with the losses of ExactOBS: a kernel that gives up the taps P
loses w_P (H^-1_PP)^-1 w_P, and the others make up for it. The kernels that lose the least go
first, in rounds with an exact solution between them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from topiarist.pruning.level import KERNEL_TAPS
from topiarist.pruning.obs import Array, Index, Removals
from topiarist.pruning.obs_rounds import settle

LIBRARY = 8  # arrangements in a layer
ROUNDS = 12


def remove_taps(
    weight: Array,
    matrix: Array,
    inverse: Array,
    library: Index,
    progress: Callable[[float], None] = lambda share: None,
) -> Removals:
    """Bring every kernel of the filters [O, 1, channels * 9] to an arrangement of the library.

    `library` is [arrangements, taps that go]. The order names the taps of one kernel after the
    other.
    """
    target = weight[:, 0]
    filters, columns = target.shape
    channels = columns // KERNEL_TAPS
    w, keep = target.copy(), np.ones(target.shape, np.bool_)
    open_kernels = np.ones((filters, channels), np.bool_)
    stiffness = _stiffness(inverse, library)
    lost, orders, costs = np.zeros(filters), [], []
    for count in _portions(channels):
        score = _scores(w, library, stiffness)
        best = score.argmin(axis=2)
        least = np.where(open_kernels, score.min(axis=2), np.inf)
        chosen = np.argsort(least, axis=1, kind="stable")[:, :count]
        taps = library[np.take_along_axis(best, chosen, axis=1)] + KERNEL_TAPS * chosen[..., None]
        going = taps.reshape(filters, -1)
        np.put_along_axis(keep, going, False, axis=1)
        np.put_along_axis(open_kernels, chosen, False, axis=1)
        w, total = settle(w, target, keep, matrix)
        orders.append(going)
        step = np.maximum(total - lost, 0.0) / going.shape[1]
        costs.append(np.repeat(step[:, None], going.shape[1], axis=1))
        lost = np.maximum(lost, total)
        progress(1 - open_kernels[0].mean())
    return Removals(np.concatenate(orders, axis=1), np.concatenate(costs, axis=1))


def tap_library(importance: NDArray[np.floating], taps: int) -> Index:
    """The taps that go in each arrangement, [arrangements, 9 - taps].

    `importance` is [kernels, 9]. Those arrangements are taken that the most kernels would choose
    for themselves.
    """
    largest = np.sort(np.argsort(-importance, axis=1, kind="stable")[:, :taps], axis=1)
    names, votes = np.unique(largest, axis=0, return_counts=True)
    chosen = names[np.argsort(-votes, kind="stable")[:LIBRARY]]
    return np.array([np.setdiff1d(np.arange(KERNEL_TAPS), kept) for kept in chosen])


def _portions(channels: int) -> list[int]:
    """How many kernels of each filter go in each round."""
    edges = np.unique(np.linspace(0, channels, min(ROUNDS, channels) + 1).astype(int))
    return [int(size) for size in np.diff(edges)]


def _stiffness(inverse: Array, library: Index) -> Array:
    """(H^-1_PP)^-1 for each channel and arrangement, [channels, arrangements, taps, taps]."""
    channels = np.arange(0, len(inverse), KERNEL_TAPS)
    columns = channels[:, None, None] + library
    blocks = inverse[columns[..., :, None], columns[..., None, :]]
    result: Array = np.linalg.inv(blocks)
    return result


def _scores(w: Array, library: Index, stiffness: Array) -> Array:
    """What each kernel loses in each arrangement, [filters, channels, arrangements]."""
    kernels = w.reshape(len(w), -1, KERNEL_TAPS)
    scores = np.empty((*kernels.shape[:2], len(library)))
    for index, taps in enumerate(library):
        parts = kernels[:, :, taps]
        pushed = np.einsum("fcp,cpq->fcq", parts, stiffness[:, index])
        scores[:, :, index] = np.einsum("fcp,fcp->fc", parts, pushed)
    return scores
