"""A convolution as a value: what a kernel is chosen and tuned for."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

SINGLE, HALF = "float32", "float16"  # that factors may be rounded to before they are multiplied
# Output channels that share their zeros, by the pattern's name.
BLOCKS = {"block4x1": 4, "block8x1": 8, "block16x1": 16}
FULL = 0.75  # share of nonzeros from which on positions of a window count as whole
SIGNATURE_BLOCK = 32  # input channels per block in the sparsity signature


@dataclass(frozen=True)
class SparsitySignature:
    """Where the nonzeros are, as far as a kernel's speed depends on it.

    `row_quantiles` are the 10, 50 and 90 % quantiles of nonzeros per (output channel, block of 32
    input channels). Two weights with one signature share tuning records.
    """

    density: float
    pattern: str
    row_quantiles: tuple[int, int, int]


def signature(weight: NDArray[np.number[Any]], pattern: str) -> SparsitySignature:
    """The signature of a weight [O, C / groups, kh, kw]."""
    nonzero = (weight != 0).reshape(len(weight), -1)
    starts = np.arange(0, nonzero.shape[1], SIGNATURE_BLOCK * math.prod(weight.shape[2:]))
    per_block = np.add.reduceat(nonzero, starts, axis=1, dtype=np.int64).ravel()
    low, middle, high = np.quantile(per_block, [0.1, 0.5, 0.9], method="nearest")
    density = float(np.count_nonzero(weight)) / max(weight.size, 1)
    return SparsitySignature(round(density, 3), pattern, (int(low), int(middle), int(high)))


@dataclass(frozen=True)
class Mixture:
    """A kernel for each image: the sum of the experts, each with its share in each output channel.

    `holders` are the experts that have weights at each position of the window, row by row.
    """

    experts: int
    holders: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ConvWorkload:
    """A 2-D convolution with its epilogue; values in memory and sums are fp32.

    Shapes: x [batch, in_channels, height, width], weight [out_channels, in_channels / groups,
    *kernel], y [batch, out_channels, out_height, out_width]. `padding` is top, left, bottom,
    right. `activation` is (low, high) of the clamp after bias and residual, None for unbounded.
    `dtype` is the least precise type that factors may be rounded to. A layer with a `mixture` gets
    its weights at run time, for each image its own; `sparsity` is that of where any expert has one.
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    sparsity: SparsitySignature
    activation: tuple[float | None, float | None] = (None, None)
    residual: bool = False
    dtype: str = field(default=SINGLE)
    mixture: Mixture | None = None

    @property
    def out_height(self) -> int:
        """Rows of the output plane."""
        return self._extent(0, self.height, self.padding[0] + self.padding[2])

    @property
    def out_width(self) -> int:
        """Columns of the output plane."""
        return self._extent(1, self.width, self.padding[1] + self.padding[3])

    def _extent(self, axis: int, size: int, padding: int) -> int:
        reach = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        return (size + padding - reach) // self.strides[axis] + 1

    @property
    def pointwise(self) -> bool:
        """Whether no tap needs a neighbouring pixel."""
        return self.kernel == (1, 1) and not any(self.padding)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values, `mixture` only where there is one."""
        values = {**vars(self), "sparsity": dict(vars(self.sparsity))}
        if self.mixture is None:
            del values["mixture"]
        else:
            values["mixture"] = dict(vars(self.mixture))
        return values

    @property
    def scattered(self) -> bool:
        """Whether a mixture has many zeros at the positions of the window that experts keep."""
        if self.mixture is None:
            return False
        kept = sum(1 for experts in self.mixture.holders if experts)
        return self.sparsity.density * math.prod(self.kernel) < FULL * kept

    @property
    def key(self) -> str:
        """A short stable hash of all fields."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
