"""Sparse tensors of four dimensions (weights) and three (activations), to and from dense ones.

Conversion keeps every value whose bits are not all zero, so that it is exact both ways: -0.0 and
NaN are stored. Operators store what is not equal to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class SparseWeight:
    """A weight [O, C, kh, kw] as rows of nonzeros, one row for each (filter, input channel).

    Row o * C + c has the entries starts[row] to starts[row + 1]; `taps` holds (c * kh + r) * kw + s
    of each. So a filter's entries are a row of a CSR matrix, too, with `taps` as its columns.
    """

    shape: tuple[int, int, int, int]
    starts: IntArray
    taps: IntArray
    values: FloatArray

    @staticmethod
    def from_dense(weight: FloatArray) -> SparseWeight:
        """Raises ValueError unless the weight has four dimensions."""
        if weight.ndim != 4:
            raise ValueError(f"a weight has the shape [O, C, kh, kw], got {list(weight.shape)}")
        filters, channels, kh, kw = weight.shape
        rows = _stored(weight).reshape(filters * channels, kh * kw)
        row, tap = np.nonzero(rows)
        starts = np.concatenate([[0], np.cumsum(rows.sum(axis=1))]).astype(np.int32)
        taps = (row % channels * (kh * kw) + tap).astype(np.int32)
        values = np.asarray(weight, np.float32).reshape(rows.shape)[row, tap]
        return SparseWeight((filters, channels, kh, kw), starts, taps, values)

    def to_dense(self) -> FloatArray:
        """The weight [O, C, kh, kw]."""
        filters, channels, kh, kw = self.shape
        dense = np.zeros((filters, channels * kh * kw), np.float32)
        of_filter = np.repeat(np.arange(filters), np.diff(self.starts[::channels]))
        dense[of_filter, self.taps] = self.values
        return dense.reshape(self.shape)

    @property
    def constants(self) -> tuple[IntArray, IntArray, FloatArray]:
        """starts, taps, values as operators take them: buffers have at least one entry."""
        pad = np.zeros(max(0, 1 - len(self.taps)), np.int32)
        values = np.concatenate([self.values, pad.astype(np.float32)])
        return self.starts, np.concatenate([self.taps, pad]), values


@dataclass(frozen=True)
class SparseActivation:
    """An activation [C, H, W] as rows of (column, value), one row for each (channel, line).

    Row c * H + y has `counts[row]` entries with ascending columns at the start of `columns[row]`
    and `values[row]`, which have room for W; what follows them is undefined.
    """

    shape: tuple[int, int, int]
    counts: IntArray
    columns: IntArray
    values: FloatArray

    @staticmethod
    def from_dense(activation: FloatArray) -> SparseActivation:
        """Raises ValueError unless the activation has three dimensions."""
        if activation.ndim != 3:
            raise ValueError(f"an activation has the shape [C, H, W], got {list(activation.shape)}")
        channels, height, width = activation.shape
        lines = np.asarray(activation, np.float32).reshape(channels * height, width)
        # A stable sort brings the stored columns to the front, in their order.
        columns = np.argsort(~_stored(lines), axis=1, kind="stable").astype(np.int32)
        counts = _stored(lines).sum(axis=1).astype(np.int32)
        values = np.take_along_axis(lines, columns, axis=1)
        return SparseActivation((channels, height, width), counts, columns, values)

    def to_dense(self) -> FloatArray:
        """The activation [C, H, W]."""
        dense = np.zeros(self.columns.shape, np.float32)
        row, entry = np.nonzero(np.arange(self.shape[2]) < self.counts[:, None])
        dense[row, self.columns[row, entry]] = self.values[row, entry]
        return dense.reshape(self.shape)

    @property
    def buffers(self) -> tuple[IntArray, IntArray, FloatArray]:
        """counts, columns, values as operators take them."""
        return self.counts, self.columns.ravel(), self.values.ravel()

    @property
    def density(self) -> float:
        """Share of stored values."""
        return float(self.counts.sum()) / max(self.columns.size, 1)


def _stored(dense: FloatArray) -> NDArray[np.bool_]:
    """Which values have a bit that is set."""
    stored: NDArray[np.bool_] = np.ascontiguousarray(dense, np.float32).view(np.uint32) != 0
    return stored
