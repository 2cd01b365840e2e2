"""Poolings and means over planes, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from topiarist.pruning.matching.call import Array, Call, Result, refused
from topiarist.pruning.windows import Window


def max_pool(call: Call, x: Array) -> Result:
    """MaxPool; of equal values the first one gets the gradient."""
    return _pool(_maximum, call, x)


def average_pool(call: Call, x: Array) -> Result:
    """AveragePool; padding counts only where the node says so."""
    return _pool(_average, call, x)


def _pool(method: Callable[[Call, Array, Window], Result], call: Call, x: Array) -> Result:
    """A pooling of [N, C, H, W] or [N, C, W]."""
    if x.ndim not in (3, 4):
        raise refused(call.node, f"it is a pooling of {x.ndim - 2} dimensions")
    window = Window.of(call.node, x.shape[2:], call.get("kernel_shape", ()))
    y, pull = method(call, x.reshape(*x.shape[:2], -1, x.shape[-1]), window)

    def pull_shaped(g: Array) -> Sequence[Array | None]:
        (dx,) = pull(g.reshape(y.shape))
        assert dx is not None
        return (dx.reshape(x.shape),)

    return y.reshape(*y.shape[:2], *y.shape[6 - x.ndim :]), pull_shaped


def _maximum(call: Call, x: Array, window: Window) -> Result:
    padded = _padded(x, window, -np.inf)
    taps = list(window.taps())
    y = reduce(np.maximum, (padded[tap] for tap in taps[1:]), padded[taps[0]].copy())

    def pull(g: Array) -> Sequence[Array | None]:
        dx = np.zeros_like(padded)
        left = np.ones(y.shape, np.bool_)
        for tap in taps:
            chosen = left & (padded[tap] == y)
            left ^= chosen
            dx[tap] += np.where(chosen, g, 0)
        return (dx[window.inner(x.shape[2:])],)

    return y, pull


def _average(call: Call, x: Array, window: Window) -> Result:
    padded = _padded(x, window, 0)
    taps = list(window.taps())
    counted = np.zeros(window.padded, x.dtype)
    counted[window.inner(x.shape[2:])] = 1
    if call.get("count_include_pad", 0):
        ends = (
            b + s + e for b, s, e in zip(window.before, x.shape[2:], window.behind, strict=True)
        )
        counted[tuple(slice(end) for end in ends)] = 1
    counts = sum(counted[tap] for tap in taps)
    y: Array = sum(padded[tap] for tap in taps) / counts

    def pull(g: Array) -> Sequence[Array | None]:
        dx, share = np.zeros_like(padded), g / counts
        for tap in taps:
            dx[tap] += share
        return (dx[window.inner(x.shape[2:])],)

    return y, pull


def _padded(x: Array, window: Window, fill: float) -> Array:
    """The planes with padding."""
    padded = np.full((*x.shape[:2], *window.padded), fill, x.dtype)
    padded[window.inner(x.shape[2:])] = x
    return padded


def global_max_pool(call: Call, x: Array) -> Result:
    """GlobalMaxPool."""
    flat = x.reshape(*x.shape[:2], -1)
    at = flat.argmax(axis=2)[..., None]
    small = (*x.shape[:2], *[1] * (x.ndim - 2))

    def pull(g: Array) -> Sequence[Array | None]:
        dx = np.zeros_like(flat)
        np.put_along_axis(dx, at, g.reshape(at.shape), axis=2)
        return (dx.reshape(x.shape),)

    return np.take_along_axis(flat, at, axis=2).reshape(small), pull


def global_average_pool(call: Call, x: Array) -> Result:
    """GlobalAveragePool."""
    return _mean(x, tuple(range(2, x.ndim)), keep=True)


def reduce_mean(call: Call, x: Array, axes: Array | None = None) -> Result:
    """ReduceMean."""
    found = call.ints("axes", (x, axes), 1)
    if not found and call.get("noop_with_empty_axes", 0):
        return x, lambda g: (g,)
    places = tuple(a % x.ndim for a in found or range(x.ndim))
    return _mean(x, places, keep=bool(call.get("keepdims", 1)))


def _mean(x: Array, axes: tuple[int, ...], keep: bool) -> Result:
    count = math.prod(x.shape[axis] for axis in axes)
    small = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
    y = x.mean(axis=axes, keepdims=keep)
    return y, lambda g: (np.broadcast_to(g.reshape(small) / count, x.shape),)
