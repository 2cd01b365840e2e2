"""Convolutions, forward and backward, by matrix products of cache-sized pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topiarist.pruning.matching.call import Array, Call, Result, Scratch, refused
from topiarist.pruning.windows import Window

PIECE_BYTES = 3 << 19  # of columns at once: they are read again from the cache


def conv(call: Call, x: Array, w: Array, b: Array | None = None) -> Result:
    """[N, C, H, W], [O, C / groups, kh, kw] and a bias [O] -> [N, O, oh, ow]; or all without H."""
    if x.ndim not in (3, 4):
        raise refused(call.node, f"it is a convolution of {x.ndim - 2} dimensions")
    window = Window.of(call.node, x.shape[2:], w.shape[2:])
    planes = x.reshape(*x.shape[:2], -1, x.shape[-1])
    y, pull = _of_planes(call, planes, w.reshape(*w.shape[:2], *window.kernel), b, window)

    def pull_shaped(g: Array) -> Sequence[Array | None]:
        dx, dw, db = pull(g.reshape(y.shape))
        assert dw is not None
        return None if dx is None else dx.reshape(x.shape), dw.reshape(w.shape), db

    return y.reshape(*y.shape[:2], *y.shape[6 - x.ndim :]), pull_shaped


def _of_planes(call: Call, x: Array, w: Array, b: Array | None, window: Window) -> Result:
    """In the way that suits the weight."""
    if w.shape[1] == 1 and x.shape[1] == len(w) > 1:
        return _depthwise(call, x, w, b, window)
    if window.only_pixel and x.shape[1] == w.shape[1]:
        return _pointwise(call, x, w, b)
    return _unfolded(call, x, w, b, window)


def _pointwise(call: Call, x: Array, w: Array, b: Array | None) -> Result:
    """A matrix product for each image, from where the values are."""
    n, c, *size = x.shape
    matrix, values = w.reshape(len(w), c), x.reshape(n, c, -1)
    y = np.matmul(matrix, values)
    if b is not None:
        y += b[:, None]

    def pull(g: Array) -> Sequence[Array | None]:
        gradient = g.reshape(n, len(w), -1)
        dw = np.zeros_like(matrix)
        for image, of_image in zip(values, gradient, strict=True):
            dw += of_image @ image.T
        dx = np.matmul(matrix.T, gradient).reshape(x.shape) if call.wanted(0) else None
        return dx, dw.reshape(w.shape), _sum_channels(gradient)

    return y.reshape(n, len(w), *size), pull


def _sum_channels(gradient: Array) -> Array:
    """[N, C, ...] -> [C]."""
    sums: Array = gradient.reshape(*gradient.shape[:2], -1).sum(axis=2).sum(axis=0)
    return sums


def _depthwise(call: Call, x: Array, w: Array, b: Array | None, window: Window) -> Result:
    """Weight after weight, each for some channels of an image: BLAS has nothing to gain there."""
    n, c, *size = x.shape
    weights = w.reshape(c, -1)
    y = np.empty((n, c, *window.size), x.dtype)
    step = max(1, PIECE_BYTES // (8 * x.itemsize * window.padded[0] * window.padded[1]))
    pieces = [(i, slice(s, s + step)) for i in range(n) for s in range(0, c, step)]
    taps = list(window.taps())

    def padded(values: Array) -> Array:
        found = call.scratch.take("padded", (len(values), *window.padded), x.dtype)
        found.fill(0)
        found[window.inner(size)] = values
        return found

    for piece in pieces:
        source, target, some = padded(x[piece]), y[piece], weights[piece[1], :, None, None]
        product = call.scratch.take("product", target.shape, x.dtype)
        target[...] = 0 if b is None else b[piece[1], None, None]
        for number, tap in enumerate(taps):
            target += np.multiply(source[tap], some[:, number], out=product)

    def pull(g: Array) -> Sequence[Array | None]:
        dw = np.zeros_like(weights)
        dx = np.empty_like(x) if call.wanted(0) else None
        for piece in pieces:
            source, gradient, channels = padded(x[piece]), g[piece], piece[1]
            for number, tap in enumerate(taps):
                dw[channels, number] += np.einsum("chw,chw->c", source[tap], gradient)
            if dx is not None:
                source.fill(0)
                product = call.scratch.take("product", gradient.shape, x.dtype)
                for number, tap in enumerate(taps):
                    some = weights[channels, number, None, None]
                    source[tap] += np.multiply(gradient, some, out=product)
                dx[piece] = source[window.inner(size)]
        return dx, dw.reshape(w.shape), _sum_channels(g)

    return y, pull


def _unfolded(call: Call, x: Array, w: Array, b: Array | None, window: Window) -> Result:
    """By the columns [K, places] of all that a filter reads, K = C / groups * kh * kw."""
    groups = x.shape[1] // w.shape[1]
    matrix = w.reshape(groups, len(w) // groups, -1)
    columns = _Columns(window, x.shape[1], groups, x.dtype, call.scratch)
    y = _multiply(matrix, columns, x, ..., window.inner(x.shape[2:]), b)

    def pull(g: Array) -> Sequence[Array | None]:
        dw = np.zeros((groups, matrix.shape[2], matrix.shape[1]), x.dtype)
        for images in columns.portions(len(x)):
            padded = columns.pad(x[images], window.inner(x.shape[2:]))
            for rows in columns.blocks():
                read = columns.gather(padded, rows, len(x[images]))
                dw += np.matmul(read, columns.spread(g[images, :, rows]).swapaxes(1, 2))
        dx = _input_gradient(call, g, w, groups, window, x.shape[2:]) if call.wanted(0) else None
        return dx, dw.swapaxes(1, 2).reshape(w.shape), _sum_channels(g)

    return y, pull


def _input_gradient(
    call: Call, g: Array, w: Array, groups: int, window: Window, size: Sequence[int]
) -> Array:
    """A convolution of the output's gradient with the turned kernel.

    Strides put zeros between its values.
    """
    turned = w.reshape(groups, -1, *w.shape[1:])[..., ::-1, ::-1].swapaxes(1, 2)
    matrix = np.ascontiguousarray(turned).reshape(groups, w.shape[1], -1)
    reach = [d * (k - 1) for d, k in zip(window.dilations, window.kernel, strict=True)]
    back = Window(
        kernel=window.kernel,
        strides=(1, 1),
        dilations=window.dilations,
        before=(reach[0] - window.before[0], reach[1] - window.before[1]),
        behind=(0, 0),
        size=(size[0], size[1]),
        padded=(size[0] + reach[0], size[1] + reach[1]),
    )
    taken, put = zip(
        *map(_placed, window.size, window.strides, back.before, back.padded), strict=True
    )
    columns = _Columns(back, g.shape[1], groups, g.dtype, call.scratch)
    return _multiply(matrix, columns, g, (..., *taken), (..., *put))


def _placed(count: int, stride: int, start: int, length: int) -> tuple[slice, slice]:
    """Which of so many values, a stride apart, lie in a line of this length, and where."""
    first = max(0, -(start // stride))
    last = min(count - 1, (length - 1 - start) // stride)
    at = start + first * stride
    return slice(first, last + 1), slice(at, start + last * stride + 1, stride)


def _multiply(
    matrix: Array, columns: _Columns, x: Array, taken: Any, put: Any, b: Array | None = None
) -> Array:
    """The products with the columns of images, what is `taken` of them put at `put` amid zeros."""
    bias = columns.dtype.type(0) if b is None else b[:, None, None]
    window, outputs = columns.window, matrix.shape[0] * matrix.shape[1]
    y = np.empty((len(x), outputs, *window.size), x.dtype)
    for images in columns.portions(len(x)):
        count = len(x[images])
        padded = columns.pad(x[images][taken], put)
        for rows in columns.blocks():
            read = columns.gather(padded, rows, count)
            shape = (*matrix.shape[:2], read.shape[2])
            product = np.matmul(matrix, read, out=columns.scratch.take("product", shape, x.dtype))
            values = product.reshape(outputs, count, -1, columns.run)[..., : window.size[1]]
            np.add(values.swapaxes(0, 1), bias, out=y[images, :, rows])
    return y


@dataclass(frozen=True, eq=False)
class _Columns:
    """Copies what windows read into columns.

    With stride 1 a line of windows runs over whole padded rows, on to the next row: copies are
    long, and what the last few of a row give is cropped.
    """

    window: Window
    channels: int
    groups: int
    dtype: np.dtype[np.floating]
    scratch: Scratch

    @property
    def run(self) -> int:
        """The windows of a row, those to be cropped included."""
        whole = self.window.strides == (1, 1)
        return self.window.padded[1] if whole else self.window.size[1]

    @property
    def _row_bytes(self) -> int:
        """The columns of a row of windows."""
        kernel = self.window.kernel[0] * self.window.kernel[1]
        return self.channels * kernel * self.run * self.dtype.itemsize

    def portions(self, images: int) -> Iterator[slice]:
        """As many images at once as columns have room for."""
        step = max(1, PIECE_BYTES // (self._row_bytes * self.window.size[0]))
        return (slice(s, s + step) for s in range(0, images, step))

    def blocks(self) -> Iterator[slice]:
        """Rows of windows, of an image that is too large for once."""
        rows = self.window.size[0]
        step = max(1, min(rows, PIECE_BYTES // self._row_bytes))
        return (slice(s, min(s + step, rows)) for s in range(0, rows, step))

    def pad(self, x: Array, put: Any) -> Array:
        """The images amid zeros, as one line, with room for the run of the last row."""
        height, width = self.window.padded
        shape = len(x), self.channels, height, width
        line = self.scratch.take("padded", (math.prod(shape) + width,), self.dtype)
        line.fill(0)
        line[:-width].reshape(shape)[put] = x
        return line

    def gather(self, line: Array, rows: slice, images: int) -> Array:
        """What some rows of windows read, [groups, K, places]."""
        source = self._view(line, rows, images)
        columns = self.scratch.take("columns", source.shape, self.dtype)
        np.copyto(columns, source)
        depth = self.channels // self.groups * self.window.kernel[0] * self.window.kernel[1]
        return columns.reshape(self.groups, depth, -1)

    def spread(self, gradient: Array) -> Array:
        """[N, O, rows, ow] -> [groups, O / groups, places], zeros where it was cropped."""
        n, o, rows, width = gradient.shape
        values = self.scratch.take("gradient", (o, n, rows, self.run), self.dtype)
        values[..., width:] = 0
        values[..., :width] = gradient.swapaxes(0, 1)
        return values.reshape(self.groups, o // self.groups, -1)

    def _view(self, line: Array, rows: slice, images: int) -> Array:
        """[C, kh, kw, N, places], or [..., rows, columns] with strides, without a copy."""
        (height, width), (down, right) = self.window.padded, self.window.strides
        count = rows.stop - rows.start
        places: tuple[int, ...] = (count, self.run)
        steps: tuple[int, ...] = (down * width, right)
        if self.window.strides == (1, 1):
            places, steps = (count * width,), (1,)
        tall, wide = self.window.dilations
        image = self.channels * height * width
        strides = height * width, tall * width, wide, image, *steps
        at = rows.start * down * width
        return np.ndarray(  # as_strided takes as long as the copy
            (self.channels, *self.window.kernel, images, *places),
            self.dtype,
            line,
            at * self.dtype.itemsize,
            [self.dtype.itemsize * stride for stride in strides],
        )
