"""One layer, one pattern: in which order its weights go, what that costs, and what is left.

Filters are scaled as the batch norm after the layer scales them, so that losses of different
filters, and of layers before and after a rescaling, can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from topiarist.pruning.cores import on_all_cores
from topiarist.pruning.kernel_patterns import remove_taps, tap_library
from topiarist.pruning.layers import WeightedLayer
from topiarist.pruning.level import BLOCK_ROWS, KERNEL_TAPS, Level, kernel_taps, levels_of, n_m
from topiarist.pruning.moments import Moments, damped
from topiarist.pruning.obs import Array, GroupLimit, Index, Removals, remove_one_by_one
from topiarist.pruning.obs_rounds import remove_in_rounds
from topiarist.pruning.patterns import Mask, block_starts

Criterion = Literal["obs", "magnitude"]
WIDE = 768  # inputs of a filter above which weights go in rounds at first
CRITERIA: tuple[Criterion, ...] = ("obs", "magnitude")


def refuses(layer: WeightedLayer, pattern: str) -> str | None:
    """Why a layer can't have a pattern, or None."""
    filters, channels, *kernel = layer.weight.shape
    if filters // layer.groups < BLOCK_ROWS.get(pattern, 1):
        return f"{filters // layer.groups} filters in a group are less than a block"
    numbers = n_m(pattern)
    if numbers is not None and channels < numbers[1]:
        return f"{channels} input channels, {pattern} needs {numbers[1]}"
    if kernel_taps(pattern) is not None and kernel != [3, 3]:
        return f"{pattern} is for kernels of 3x3, not {kernel[0]}x{kernel[1]}"
    return None


def order_removals(
    layer: WeightedLayer,
    scale: Array,
    moments: Moments,
    pattern: str,
    criterion: Criterion,
    progress: Callable[[float], None] = lambda share: None,
) -> Removals:
    """The order for all blocks of filters of a layer, group after group.

    `scale` [O] weighs the filters' outputs.
    """
    weight = layer.weight.astype(np.float64)
    if criterion == "obs":
        weight = weight * scale[:, None, None, None]
    library = _library(weight, pattern)
    found: list[Removals] = []
    for blocks in np.split(_blocks(layer, pattern, weight), layer.groups):
        report = partial(_report, progress, len(found), layer.groups)
        if criterion == "magnitude":
            found.append(_by_magnitude(blocks, _limit(layer, pattern), library))
        else:
            matrix = moments.matrix[len(found)]
            alive = np.where(np.diagonal(matrix) > 0, blocks, 0.0)
            known = damped(layer.name, matrix)
            found.append(_by_loss(alive, known, _limit(layer, pattern), library, report))
    return Removals(
        np.concatenate([r.order for r in found]), np.concatenate([r.cost for r in found])
    )


def _by_loss(
    blocks: Array,
    known: tuple[Array, Array],
    limit: GroupLimit | None,
    library: Index | None,
    progress: Callable[[float], None],
) -> Removals:
    """Those that the layer's output misses least; `known` is H and its inverse."""
    matrix, inverse = known
    if library is not None:
        return remove_taps(blocks, matrix, inverse, library, progress)
    if len(matrix) > WIDE:
        return remove_in_rounds(blocks, matrix, inverse, limit, progress)
    return remove_one_by_one(blocks, inverse, limit, progress)


def _report(progress: Callable[[float], None], done: int, groups: int, share: float) -> None:
    """Progress of one group as that of the layer."""
    progress((done + share) / groups)


def _library(weight: Array, pattern: str) -> Index | None:
    """The arrangements of "kernel<k>", None for other patterns."""
    taps = kernel_taps(pattern)
    return None if taps is None else tap_library(np.abs(weight).reshape(-1, KERNEL_TAPS), taps)


def kept(layer: WeightedLayer, removals: Removals, level: Level) -> Mask:
    """The weights [O, C / groups, kh, kw] that stay at a level; zeros stay zeros."""
    rows, columns = BLOCK_ROWS.get(level.pattern, 1), layer.weight[0].size
    starts = np.array(block_starts(len(layer.weight), layer.groups, rows))
    (counts,) = _counts(layer, removals, [level])
    mask = np.ones((len(starts), columns), np.bool_)
    for block, count in enumerate(counts):
        mask[block, removals.order[block, :count]] = False
    sizes = np.diff(starts, append=len(layer.weight))
    whole: Mask = np.repeat(mask, sizes, axis=0).reshape(layer.weight.shape)
    whole &= layer.weight != 0
    return whole


def losses(layer: WeightedLayer, removals: Removals, pattern: str) -> Array:
    """What each level of a pattern adds to the layer's loss, summed up from the removals."""
    total = np.cumsum(np.pad(removals.cost, ((0, 0), (1, 0))), axis=1)
    every = np.arange(len(total))
    counts = _counts(layer, removals, levels_of(pattern))
    return np.array([total[every, count].sum() for count in counts])


def output_energy(weight: NDArray[np.floating], scale: Array, moments: Moments) -> float:
    """sum(s^2 w H w^T) over the filters [O, C / groups, kh, kw]."""
    rows = (weight.astype(np.float64) * scale[:, None, None, None]).reshape(
        len(moments.matrix), -1, weight[0].size
    )
    return float(sum(((w @ h) * w).sum() for w, h in zip(rows, moments.matrix, strict=True)))


def solve(layer: WeightedLayer, mask: Mask, moments: Moments) -> NDArray[np.float32]:
    """The weights at the places of `mask` whose outputs are nearest to the layer's own."""
    filters, columns = len(layer.weight), layer.weight[0].size
    weight = layer.weight.reshape(layer.groups, -1, columns).astype(np.float64)
    masks = mask.reshape(weight.shape)
    solved = np.zeros_like(weight)
    for group, matrix in enumerate(moments.matrix):
        alive = np.diagonal(matrix) > 0
        regular, inverse = damped(layer.name, matrix)
        known, masks_here = np.where(alive, weight[group], 0.0), masks[group] & alive
        runs = _same_rows(masks_here)
        solve_run = partial(_solve_rows, known, masks_here, regular, inverse)
        for rows, values in zip(runs, on_all_cores(solve_run, runs), strict=True):
            solved[group, rows] = values
    return solved.reshape(filters, *layer.weight.shape[1:]).astype(np.float32)


def _solve_rows(weights: Array, masks: Mask, matrix: Array, inverse: Array, rows: slice) -> Array:
    """Least squares for rows [rows, c] that keep the same columns, by the smaller system."""
    weight, keep = weights[rows], masks[rows.start]
    result = np.zeros_like(weight)
    if not keep.any():
        return result
    if 2 * np.count_nonzero(keep) <= keep.size:
        system, right = matrix[np.ix_(keep, keep)], matrix[keep] @ weight.T
        result[:, keep] = linalg.solve(system, right, assume_a="pos").T
        return result
    gone = ~keep
    if not gone.any():
        return weight
    forces = linalg.solve(inverse[np.ix_(gone, gone)], weight[:, gone].T, assume_a="pos")
    result[:, keep] = weight[:, keep] - forces.T @ inverse[np.ix_(gone, keep)]
    return result


def _same_rows(mask: Mask) -> list[slice]:
    """Runs of rows [rows, c] with equal masks."""
    changes = np.flatnonzero((mask[1:] != mask[:-1]).any(axis=1)) + 1
    return [slice(a, b) for a, b in pairwise([0, *changes.tolist(), len(mask)])]


def _blocks(layer: WeightedLayer, pattern: str, weight: Array) -> Array:
    """Filters [O, C / groups, kh, kw] -> [blocks, rows, c]; smaller blocks have rows of zeros."""
    rows = BLOCK_ROWS.get(pattern, 1)
    by_group = weight.reshape(layer.groups, -1, weight[0].size)
    padded = np.pad(by_group, ((0, 0), (0, -by_group.shape[1] % rows), (0, 0)))
    return padded.reshape(-1, rows, padded.shape[2])


def _limit(layer: WeightedLayer, pattern: str) -> GroupLimit | None:
    """For N:M, what may go of every M input channels at a tap."""
    numbers = n_m(pattern)
    if numbers is None:
        return None
    n, m = numbers
    _, channels, height, width = layer.weight.shape
    channel, tap = np.divmod(np.arange(channels * height * width), height * width)
    group = channel // m * (height * width) + tap
    return GroupLimit(group, np.maximum(np.bincount(group) - n, 0))


def _by_magnitude(blocks: Array, limit: GroupLimit | None, library: Index | None) -> Removals:
    """The smallest first; the cost is the block's energy."""
    energy = np.einsum("brc,brc->bc", blocks, blocks)
    if library is not None:
        order = _smallest_arrangements(energy, library)
    elif limit is not None:
        order = _smallest_of_groups(energy, limit)
    else:
        order = np.argsort(energy, axis=1, kind="stable")
    return Removals(order, np.take_along_axis(energy, order, axis=1))


def _smallest_arrangements(energy: Array, library: Index) -> Index:
    """For each kernel the taps of that arrangement which takes the least, [blocks, steps]."""
    kernels = energy.reshape(len(energy), -1, KERNEL_TAPS)
    best = kernels[:, :, library].sum(axis=3).argmin(axis=2)
    first = KERNEL_TAPS * np.arange(kernels.shape[1])
    order: Index = (library[best] + first[:, None]).reshape(len(energy), -1)
    return order


def _smallest_of_groups(energy: Array, limit: GroupLimit) -> Index:
    """Of each group of columns the smallest that may go, [blocks, steps]."""
    chosen = []
    for group, count in enumerate(limit.removed):
        members = np.flatnonzero(limit.group == group)
        ranked = np.argsort(energy[:, members], axis=1, kind="stable")
        chosen.append(members[ranked[:, :count]])
    return np.concatenate(chosen, axis=1)


def _counts(layer: WeightedLayer, removals: Removals, levels: Sequence[Level]) -> list[Index]:
    """For each level of one pattern, how many columns of each block go.

    Over the whole layer, those go that cost the least per weight.
    """
    blocks, steps = removals.cost.shape
    rows = BLOCK_ROWS.get(levels[0].pattern)
    if rows is None:
        return [np.full(blocks, steps) for _ in levels]
    sizes = np.diff(block_starts(len(layer.weight), layer.groups, rows), append=len(layer.weight))
    rising = np.maximum.accumulate(removals.cost, axis=1) / sizes[:, None]
    cheapest = np.argsort(rising, axis=None, kind="stable") // steps
    going = [rising.size - max(1, round(level.density * rising.size)) for level in levels]
    return [np.bincount(cheapest[:count], minlength=blocks) for count in going]
