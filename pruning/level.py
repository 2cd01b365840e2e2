"""What a layer is pruned to: a pattern and the share of weights that stay."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from topiarist.schedules.workload import BLOCKS

BLOCK_ROWS = {"unstructured": 1, **BLOCKS}  # filters that share their zeros
LEVELS = 30
DENSEST, SPARSEST = 0.9, 0.01
KERNEL_TAPS = 9  # of the 3x3 kernels that "kernel<k>" is for


@dataclass(frozen=True, order=True)
class Level:
    """A pattern and the share of weights that stay, 1.0 for "dense".

    Patterns are "dense", "unstructured", "block4x1", "block8x1", "block16x1", "N:M" (as in "2:4")
    and "kernel<k>": each 3x3 kernel keeps k taps, in one of a few arrangements.
    """

    pattern: str
    density: float

    def __str__(self) -> str:
        """For people: "unstructured 12.5 %"."""
        return self.pattern if self == DENSE else f"{self.pattern} {100 * self.density:.3g} %"


DENSE = Level("dense", 1.0)


def levels_of(pattern: str) -> tuple[Level, ...]:
    """The levels that a pattern is made at, the densest first; ValueError for no pattern."""
    if pattern in BLOCK_ROWS:
        densities = np.geomspace(DENSEST, SPARSEST, LEVELS)
        return tuple(Level(pattern, round(float(d), 6)) for d in densities)
    numbers, taps = n_m(pattern), kernel_taps(pattern)
    if numbers is not None:
        return (Level(pattern, numbers[0] / numbers[1]),)
    if taps is not None:
        return (Level(pattern, taps / KERNEL_TAPS),)
    raise ValueError(
        f"pattern {pattern!r}: expected {', '.join(BLOCK_ROWS)}, N:M (as in 2:4) "
        "or kernel<k> (as in kernel4)"
    )


def n_m(pattern: str) -> tuple[int, int] | None:
    """The numbers of "N:M", 0 < N < M; None for other patterns."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        return None
    return int(match[1]), int(match[2])


def kernel_taps(pattern: str) -> int | None:
    """The k of "kernel<k>", 0 < k < 9; None for other patterns."""
    match = re.fullmatch(r"kernel([1-8])", pattern)
    return int(match[1]) if match else None
