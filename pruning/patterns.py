"""Which regular structure the zeros of a weight have.

Every test asks two things: does the structure hold (nearly) everywhere, and would zeros at random
positions look the same? Only what chance can't explain counts, so a very sparse unstructured
weight isn't taken for N:M, and a handful of zeros isn't taken for blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, log, prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from topiarist.schedules.workload import BLOCKS

PatternKind = Literal[
    "dense",
    "unstructured",
    "block4x1",
    "block8x1",
    "block16x1",
    "n:m",
    "kernel",
    "filter",
    "channel",
]
Mask = NDArray[np.bool_]

GROUP_SIZES = (2, 4, 8, 16)  # the M of N:M that are looked for, the most specific first
MAX_SUPPORTS = 16  # distinct kernel supports; PatDNN (ASPLOS'20) uses 4 to 12

DENSE_FROM = 0.95  # dense int8 weights, dequantised, have 1 to 3 % zeros by rounding
_NEARLY_ALL = 0.98
_CHANCE = log(1e-6)  # log probability below which chance is ruled out
_REUSE = 8  # kernels per support


@dataclass(frozen=True)
class Pattern:
    """The structure of a weight's zeros, and the facts behind it.

    `n` and `m` belong to "n:m": n nonzeros (rarely fewer, never more) in every m consecutive
    input channels, at each kernel tap (for 1x1 and fully connected layers this is the flattened
    input axis). `block` belongs to "block4x1" and its like; `supports` (distinct kernel supports)
    and `taps` (nonzeros in each) belong to "kernel".
    """

    kind: PatternKind
    density: float
    nnz: int
    dead_filters: int
    dead_channels: int
    n: int | None = None
    m: int | None = None
    block: int | None = None
    supports: int | None = None
    taps: int | None = None

    def __str__(self) -> str:
        """The name people use, for example "2:4"."""
        return f"{self.n}:{self.m}" if self.kind == "n:m" else self.kind


def find_pattern(weight: NDArray[Any], groups: int = 1) -> Pattern:
    """The pattern of a weight [O, C / groups, kh, kw]; fully connected is [M, K, 1, 1].

    "filter" and "channel" mean that what is not dead is dense. `dead_channels` counts over all
    groups. Any float dtype; NaN counts as nonzero.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight must be [O, C / groups, kh, kw], got shape {weight.shape}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{weight.shape[0]} filters can't be divided into {groups} groups")
    mask: Mask = weight != 0
    live_filters: Mask = np.any(mask, axis=(1, 2, 3))
    by_group = mask.reshape(groups, -1, *mask.shape[1:])
    live_channels: Mask = np.any(by_group, axis=(1, 3, 4))  # [groups, C / groups]
    nnz = int(np.count_nonzero(mask))
    structure = _structure(mask, live_filters, live_channels, nnz, groups)
    return Pattern(
        density=nnz / mask.size if mask.size else 1.0,
        nnz=nnz,
        dead_filters=int(np.count_nonzero(~live_filters)),
        dead_channels=int(np.count_nonzero(~live_channels)),
        **structure,
    )


def block_starts(filters: int, groups: int = 1, block: int = 4) -> list[int]:
    """First filter of each block; blocks don't cross groups, a group's last may be smaller."""
    per_group = filters // groups
    return [g * per_group + i for g in range(groups) for i in range(0, per_group, block)]


def _structure(
    mask: Mask, live_filters: Mask, live_channels: Mask, nnz: int, groups: int
) -> dict[str, Any]:
    """`kind` and the facts that belong to it, the most specific structure first."""
    taps = prod(mask.shape[2:])
    filters_by_group = live_filters.reshape(groups, -1).sum(axis=1)
    live_size = int(filters_by_group @ live_channels.sum(axis=1)) * taps
    if nnz >= DENSE_FROM * live_size and not live_filters.all():
        return {"kind": "filter"}
    if nnz >= DENSE_FROM * live_size and not live_channels.all():
        return {"kind": "channel"}
    if nnz >= DENSE_FROM * mask.size:
        return {"kind": "dense"}
    return (
        _kernel_pattern(mask)
        or _block_pattern(mask, groups)
        or _n_m_pattern(mask[live_filters])
        or {"kind": "unstructured"}
    )


def _kernel_pattern(mask: Mask) -> dict[str, Any] | None:
    """Few supports, all with one number of taps, each used by many kernels."""
    size = prod(mask.shape[2:])
    if not 1 < size < 64:
        return None
    kernels = mask.reshape(-1, size)
    counts = kernels.sum(axis=1)
    live = counts > 0
    taps = int(np.bincount(counts[live]).argmax())
    regular = kernels[counts == taps]
    bits = np.uint64(1) << np.arange(size, dtype=np.uint64)
    supports = np.unique((regular * bits).sum(axis=1)).size
    few = supports <= min(MAX_SUPPORTS, comb(size, taps) // 2)
    if taps == size or not few or len(regular) < max(_REUSE * supports, _NEARLY_ALL * live.sum()):
        return None
    return {"kind": "kernel", "supports": supports, "taps": taps}


def _block_pattern(mask: Mask, groups: int) -> dict[str, Any] | None:
    """Of the blocks with a nonzero, nearly all have nothing but nonzeros."""
    density = float(mask.mean())
    for name, block in sorted(BLOCKS.items(), key=lambda item: -item[1]):  # most specific first
        starts = np.array(block_starts(len(mask), groups, block))
        sizes = np.diff(np.append(starts, len(mask)))
        counts = np.add.reduceat(mask, starts, axis=0, dtype=np.uint8)[sizes == block]
        live = int(np.count_nonzero(counts))
        full = int(np.count_nonzero(counts == block))
        if not live or full < _NEARLY_ALL * live:
            continue
        by_chance = live * log(density**block / (1 - (1 - density) ** block))
        if by_chance < _CHANCE:
            return {"kind": name, "block": block}
    return None


def _n_m_pattern(mask: Mask) -> dict[str, Any] | None:
    """Nearly all groups of M input channels have exactly N nonzeros, 0 < N < M; none has more."""
    density = float(mask.mean())
    for m in GROUP_SIZES:
        whole = mask.shape[1] // m * m
        counts = mask[:, :whole].reshape(len(mask), -1, m, *mask.shape[2:]).sum(axis=2)
        if not counts.size:
            continue
        histogram = np.bincount(counts.ravel())
        n = int(histogram.argmax())
        regular = len(histogram) == n + 1 and histogram[n] >= _NEARLY_ALL * counts.size
        if not 0 < n < m or not regular:
            continue
        binomial = comb(m, n) * density**n * (1 - density) ** (m - n)
        if counts.size * log(binomial) < _CHANCE:
            return {"kind": "n:m", "n": n, "m": m}
    return None
