"""Minimal filtering F(m, r) along one axis: m outputs of r taps from m + r - 1 products.

Toom-Cook's construction: both polynomials are evaluated at m + r - 2 points and at infinity,
multiplied there, and the product is interpolated (Lavin and Gray, CVPR 2016; Winograd, 1980).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit

# In this order: numbers grow slowly, and pairs of opposite points share sums.
_POINTS = tuple(Fraction(p) for p in ("0", "1", "-1", "2", "-2", "1/2"))
MOST_PRODUCTS = len(_POINTS) + 1
# Relative to the largest output, in two dimensions, by products along an axis: the largest seen
# over the layers of ResNet-50 and VGG16 and over strided first layers, with normal weights.
_ADDED_ERROR = {3: 1e-6, 4: 1e-6, 5: 4e-6, 6: 1e-5, 7: 1e-5}

Vectors = list[Any]
Row = Sequence[Fraction]


@dataclass(frozen=True)
class MinimalFilter:
    """F(outputs, taps); with one output it is a plain sum of products."""

    outputs: int
    taps: int

    @property
    def products(self) -> int:
        """Products, and values of the input that they take."""
        return self.outputs + self.taps - 1

    @property
    def added_error(self) -> float:
        """Rounding that the transforms add, relative to the largest output."""
        return 0.0 if self.outputs == 1 or self.taps == 1 else _ADDED_ERROR[self.products]

    @cached_property
    def _points(self) -> tuple[Fraction, ...]:
        return _POINTS[: self.products - 1]

    @property
    def _trivial(self) -> bool:
        return self.outputs == 1 or self.taps == 1

    def weight_transform(self) -> NDArray[np.float64]:
        """G [products, taps]: a filter's values at the points, scaled for the interpolation."""
        if self._trivial:
            return np.eye(self.taps) if self.outputs == 1 else np.ones((self.products, 1))
        rows = [
            [p**k / math.prod(p - q for q in self._points if q != p) for k in range(self.taps)]
            for p in self._points
        ]
        rows.append([Fraction(0)] * (self.taps - 1) + [Fraction(1)])
        return np.array(rows, np.float64)

    def input_transform(self, d: Vectors, lanes: int) -> Vectors:
        """B^T d: `products` vectors of as many."""
        if self._trivial:
            return d
        found: Vectors = []
        rows = [_coefficients(q for q in self._points if q != p) for p in self._points]
        for i, row in enumerate(rows):
            if i and self._opposite(i) and _mirrored(rows[i - 1], row):
                continue
            if i + 1 < len(rows) and self._opposite(i + 1) and _mirrored(row, rows[i + 1]):
                found += _sum_and_difference(row, d, lanes)
            else:
                found.append(_combined(row, d, lanes))
        return [*found, _combined(_coefficients(self._points), d, lanes)]

    def output_transform(self, s: Vectors, lanes: int) -> Vectors:
        """A^T s: `outputs` vectors of `products`."""
        if self.outputs == 1:
            return [_combined([Fraction(1)] * len(s), s, lanes)]
        if self.taps == 1:
            return s
        # With p to the power of k, opposite points add up for even k and cancel for odd ones.
        even, odd, weights = [s[0]], [s[0]], [Fraction(0)]
        for i, p in enumerate(self._points[1:], 1):
            if self._opposite(i):
                continue
            if i + 1 < len(self._points) and self._opposite(i + 1):
                even.append(T.bind(s[i] + s[i + 1]))
                odd.append(T.bind(s[i] - s[i + 1]))
            else:
                even.append(s[i])
                odd.append(s[i])
            weights.append(p)
        last = self.outputs - 1
        return [
            _combined(
                [*(w**power for w in weights), Fraction(power == last)],
                [*(odd if power % 2 else even), s[-1]],
                lanes,
            )
            for power in range(self.outputs)
        ]

    def _opposite(self, index: int) -> bool:
        """Whether a point is that before it with the other sign."""
        return self._points[index] == -self._points[index - 1] != 0


def _coefficients(roots: Iterator[Fraction] | Sequence[Fraction]) -> list[Fraction]:
    """Of the polynomial with these roots, lowest power first."""
    found = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *found], [root * c for c in found] + [Fraction(0)]
        found = [a - b for a, b in zip(shifted, scaled, strict=True)]
    return found


def _mirrored(a: Row, b: Row) -> bool:
    """Whether two polynomials differ in the signs of their odd or even powers only."""
    last = len(a) - 1
    return all(
        x == (y if (last - k) % 2 == 0 else -y) for k, (x, y) in enumerate(zip(a, b, strict=True))
    )


def _sum_and_difference(row: Row, d: Vectors, lanes: int) -> Vectors:
    """The products with a row and with its mirror image, which share their halves."""
    last = len(row) - 1
    halves = [
        T.bind(
            _combined(
                [c if (last - k) % 2 == part else Fraction(0) for k, c in enumerate(row)], d, lanes
            )
        )
        for part in (0, 1)
    ]
    return [halves[0] + halves[1], halves[0] - halves[1]]


def _combined(row: Row, vectors: Vectors, lanes: int) -> Any:
    """The sum of vectors times numbers, with a multiplication only where there must be one."""
    terms = [(c, v) for c, v in zip(row, vectors, strict=False) if c]
    terms.sort(key=lambda term: term[0] != 1)  # stable: begin with one that needs no arithmetic
    (c, v), *rest = terms
    total = v if c == 1 else emit.splat(float(c), lanes) * v
    for c, v in rest:
        if abs(c) == 1:
            total = total + v if c == 1 else total - v
        else:
            factor = emit.splat(float(abs(c)), lanes) * v
            total = total + factor if c > 0 else total - factor
    return total
