"""Direct convolution on a GPU: the sparse (CSR) and the dense form.

A thread has `pixels` of a picture's column for `channels` neighbouring output channels in its
registers and walks over the nonzeros of these channels together (or over all taps): it loads an
input value for each of its pixels and multiplies it with a weight for each of its channels. The
column index of the CSR matrix is the offset of the tap in the input's buffer (Park et al., ICLR
2017, section 2.1). Neighbouring threads have neighbouring pixels, so loads are coalesced; all of
them read the same weights. Where the pixels are few, `split` threads share the nonzeros of a row
and add up their sums at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.direct import refuses_views
from topiarist.schedules.cpu.emit import argument, prim_func, symbol
from topiarist.schedules.cuda import emit
from topiarist.schedules.kernel import ConvViews, KernelConfig, Packed
from topiarist.schedules.layout import LaneLayout
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.cuda import MAX_BLOCK_SHARED, MAX_BLOCK_THREADS

QUAD = 4  # values of the widest load


@dataclass(frozen=True)
class CudaConfig(KernelConfig):
    """The knobs: output channels and pixels of a thread; threads; threads that split a row.

    `chunk` nonzeros at a time are staged in shared memory, 0 reads them where they are. With
    `quads` the pixels are four neighbours, and one load has them all.
    """

    channels: int
    pixels: int
    threads: int
    split: int
    chunk: int = 0
    quads: bool = False

    def __str__(self) -> str:
        staged = f" chunks of {self.chunk}" if self.chunk else ""
        pixels = f"{self.pixels} quads" if self.quads else f"{self.pixels}"
        return f"{self.channels}x{pixels} {self.threads}x{self.split} threads{staged}"

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return self.channels * self.pixels

    @property
    def block_threads(self) -> int:
        """Threads of a block."""
        return self.threads * self.split

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the sums to add up, and what is staged."""
        sums = (self.split - 1) * self.threads * self.sums
        return 4 * (sums + self.split * self.chunk * (1 + self.channels))


def refuses_place(workload: ConvWorkload, config: CudaConfig, views: ConvViews) -> str | None:
    """Why a configuration can't run between these layouts, None where it can."""
    w = workload
    why = refuses_views(w, views)
    layouts = [v.layout for v in (views.x, views.y, views.residual) if v is not None]
    if why is None and any(layout.grid.lanes > 1 or layout.tile for layout in layouts):
        why = "a GPU reads planes of pixels, no vectors and no tiles"
    if why is not None:
        return why
    if w.out_channels // w.groups % config.channels:
        return f"output channels per group are no multiple of {config.channels}"
    if config.quads and not (_flat(views.x.layout) and w.pointwise and w.strides == (1, 1)):
        return "four pixels at a time need a pointwise layer of stride 1 and an input without halo"
    if not config.quads and w.out_height % config.pixels:
        return f"{w.out_height} rows are no multiple of {config.pixels}"
    if config.block_threads > MAX_BLOCK_THREADS:
        return f"{config.block_threads} threads in a block"
    if config.shared_bytes > MAX_BLOCK_SHARED:
        return f"{config.shared_bytes} bytes of shared memory in a block"
    return None


def _flat(layout: LaneLayout) -> bool:
    """Whether the rows of a plane follow each other without a gap."""
    return layout.row_vectors == layout.grid.width and layout.halo[0] == 0


@dataclass(frozen=True)
class Loops:
    """The kernel of a layer in its place; `sparse` skips zeros."""

    workload: ConvWorkload
    config: CudaConfig
    views: ConvViews
    sparse: bool

    @property
    def group_in(self) -> int:
        return self.workload.in_channels // self.workload.groups

    @property
    def group_out(self) -> int:
        return self.workload.out_channels // self.workload.groups

    @property
    def rows(self) -> int:
        """Blocks of output channels: the rows of the packed weight."""
        return self.workload.out_channels // self.config.channels

    @property
    def taps(self) -> int:
        """Weights of an output channel."""
        return self.group_in * math.prod(self.workload.kernel)

    @property
    def places(self) -> int:
        """Places of an image that threads have, each with so many pixels."""
        w, pixels = self.workload, self.config.pixels
        if self.config.quads:
            return -(-w.out_height * w.out_width // QUAD)
        return w.out_height // pixels * w.out_width

    @property
    def tiles(self) -> int:
        """Blocks of threads over all images."""
        return -(-self.workload.batch * self.places // self.config.threads)

    @property
    def offset_unit(self) -> int:
        """What an offset counts in: quads are told to be aligned by their index."""
        return QUAD if self.config.quads else 1

    def offsets(self) -> NDArray[np.int64]:
        """Of the taps [C / groups, kh, kw] in the input, from the tap (0, 0) of channel 0."""
        w, layout = self.workload, self.views.x.layout
        channel = np.arange(self.group_in) * layout.channel_stride
        ky = np.arange(w.kernel[0]) * w.dilation[0] * layout.row_vectors
        kx = np.arange(w.kernel[1]) * w.dilation[1]
        return channel[:, None, None] + ky[:, None] + kx


@dataclass(frozen=True)
class _Place:
    """A thread's pixels: where the first lies in the input and in the outputs, and the steps.

    `exists` is false in the last block's spare threads, which compute with others' inputs.
    """

    x: Any
    image: Any
    row: Any
    col: Any
    exists: Any


@dataclass(frozen=True)
class _Operands:
    x: Any
    weight: _Weight
    bias: Any
    residual: Any
    y: Any


@dataclass(frozen=True)
class _Weight:
    """The buffers of a packed weight; a dense one has no `starts` and one list of offsets."""

    k: Loops
    values: Any
    offsets: Any
    starts: Any = None

    def row(self, row: Any) -> tuple[Any, Any]:
        """Where a row begins in the values, and how many columns it has."""
        if self.starts is None:
            return row * self.k.taps, self.k.taps
        begin = T.bind(self.starts[row])
        return begin, T.bind(self.starts[row + 1] - begin)

    def offset(self, row: Any, begin: Any, column: Any) -> Any:
        """The offset of a row's column from the input's first channel."""
        if self.starts is not None:
            return self.offsets[begin + column]
        k = self.k
        group = row * k.config.channels // k.group_out
        stride = k.group_in * k.views.x.layout.channel_stride // k.offset_unit
        return self.offsets[column] + group * stride


def make_prim_func(k: Loops, name: str) -> Any:
    """f(x, values, offsets[, starts], bias[, residual], y)."""
    w, views, c = k.workload, k.views, k.config
    with prim_func(name) as builder:
        x = argument("x", w.batch * views.x.layout.size)
        if k.sparse:
            weight = _Weight(
                k,
                values=argument("values", symbol("count")),
                offsets=argument("offsets", symbol("columns"), "int32"),
                starts=argument("starts", k.rows + 1, "int32"),
            )
        else:
            values = argument("values", w.out_channels * k.taps)
            weight = _Weight(k, values, argument("offsets", k.taps, "int32"))
        bias = argument("bias", w.out_channels)
        residual = None
        if views.residual is not None:
            residual = argument("residual", w.batch * views.residual.layout.size)
        y = argument("y", w.batch * views.y.layout.size)
        ops = _Operands(x, weight, bias, residual, y)
        with emit.grid((k.tiles, k.rows), (c.threads, c.split)) as ((tile, row), (tx, ty)):
            _thread(k, ops, tile, row, tx, ty)
    return builder.get()


def _thread(k: Loops, ops: _Operands, tile: Any, row: Any, tx: Any, ty: Any) -> None:
    """What one thread does."""
    place = _place(k, tile * k.config.threads + tx)
    sums = emit.local(k.config.sums)
    for i in range(k.config.sums):
        T.buffer_store(sums, T.float32(0), [i])
    if k.config.chunk:
        _staged(k, ops, place, sums, row, tx, ty)
    else:
        _unstaged(k, ops, place, sums, row, ty)
    _add_up(k, sums, tx, ty)
    with emit.when(T.And(place.exists, ty == 0)):
        _store(k, ops, place, sums, row)
    view, c = k.views.y, k.config
    worker = (tile * c.split + ty) * c.threads + tx
    with T.serial(0, k.workload.batch) as image, T.serial(0, c.channels) as a:
        at = view.at(image, row * c.channels + a)
        emit.write_halo(ops.y, view, at, worker, k.tiles * c.block_threads)


def _place(k: Loops, number: Any) -> _Place:
    """The thread's pixels, from its number among all threads."""
    w, views = k.workload, k.views
    count = w.batch * k.places
    place = T.bind(T.min(number, count - 1))
    image = place // k.places
    layout = views.x.layout
    start = image * layout.size + views.x.base
    if k.config.quads:
        quad = place % k.places
        # In quads, for the compiler to see that it is aligned.
        x = image * (layout.size // QUAD) + views.x.base // QUAD + quad
        return _Place(T.bind(x), image, quad, 0, number < count)
    row, col = place // w.out_width % (w.out_height // k.config.pixels), place % w.out_width
    top, left = (0, 0) if w.pointwise else w.padding[:2]
    first = layout.offset(row * w.strides[0] - top, col * w.strides[1] - left)
    return _Place(T.bind(start + first), image, row, col, number < count)


def _unstaged(k: Loops, ops: _Operands, place: _Place, sums: Any, row: Any, ty: Any) -> None:
    """Every thread reads its columns' offsets and weights where they are."""
    begin, count = ops.weight.row(row)
    first, mine = 0, count
    if k.config.split > 1:
        part = T.bind(T.floordiv(count + k.config.split - 1, k.config.split))
        first = ty * part
        mine = T.max(T.min(part, count - first), 0)
    with T.serial(0, mine) as step:
        column = T.bind(first + step)
        at = (begin + column) * k.config.channels
        weights = _vector(ops.weight.values, at, k.config.channels)
        _multiply(k, ops.x, place, sums, ops.weight.offset(row, begin, column), weights)


def _staged(k: Loops, ops: _Operands, place: _Place, sums: Any, row: Any, tx: Any, ty: Any) -> None:
    """The block copies chunks of offsets and weights into shared memory, one for each split."""
    c = k.config
    step = c.chunk * c.split
    values, offsets = emit.shared(step * c.channels), emit.shared(step, "int32")
    begin, count = ops.weight.row(row)
    worker = ty * c.threads + tx

    def copy(to: Any, size: int, limit: Any, read: Callable[[Any], Any]) -> None:
        for turn in range(-(-size // c.block_threads)):
            item = turn * c.block_threads + worker
            with emit.when(T.And(item < size, item < limit)):
                T.buffer_store(to, read(item), [item])

    with T.serial(0, T.floordiv(count + step - 1, step)) as q:
        done = q * step
        rest = count - done
        copy(offsets, step, rest, lambda i: ops.weight.offset(row, begin, done + i))
        copy(
            values,
            step * c.channels,
            rest * c.channels,
            lambda i: ops.weight.values[(begin + done) * c.channels + i],
        )
        with T.serial(0, T.max(T.min(rest - ty * c.chunk, c.chunk), 0)) as within:
            column = T.bind(ty * c.chunk + within)
            weights = _vector(values, column * c.channels, c.channels)
            _multiply(k, ops.x, place, sums, offsets[column], weights)


def _vector(buffer: Any, at: Any, count: int) -> list[Any]:
    """`count` neighbouring values, in loads as wide as they allow."""
    width = math.gcd(count, QUAD)
    if width == 1:
        return [T.bind(buffer[at + i]) for i in range(count)]
    held = emit.local(count)
    for i in range(0, count, width):
        T.buffer_store(held, buffer[T.ramp(at + i, 1, width)], [T.ramp(i, 1, width)])
    return [held[i] for i in range(count)]


def _multiply(k: Loops, x: Any, place: _Place, sums: Any, offset: Any, weights: list[Any]) -> None:
    """Add a column's products to the sums."""
    c = k.config
    at = T.bind(place.x + offset)
    if c.quads:
        inputs = _vector(x, at * QUAD, QUAD)
    else:
        step = k.workload.out_height // c.pixels * k.workload.strides[0]
        inputs = [T.bind(x[at + v * step * k.views.x.layout.row_vectors]) for v in range(c.pixels)]
    for a, weight in enumerate(weights):
        for v, value in enumerate(inputs):
            i = a * c.pixels + v
            T.buffer_store(sums, sums[i] + weight * value, [i])


def _add_up(k: Loops, sums: Any, tx: Any, ty: Any) -> None:
    """The first thread of those that split a row gets the sums of all."""
    c = k.config
    if c.split == 1:
        return
    parts = emit.shared((c.split - 1) * c.threads * c.sums)

    def at(part: Any, i: int) -> Any:
        return (part * c.sums + i) * c.threads + tx

    with emit.when(ty > 0):
        for i in range(c.sums):
            T.buffer_store(parts, sums[i], [at(ty - 1, i)])
    with emit.when(ty == 0):
        for part in range(c.split - 1):
            for i in range(c.sums):
                T.buffer_store(sums, sums[i] + parts[at(part, i)], [i])


def _store(k: Loops, ops: _Operands, place: _Place, sums: Any, row: Any) -> None:
    """Bias, residual, clamp; every pixel by one thread."""
    w, c = k.workload, k.config
    for v in range(c.pixels):
        if c.quads:
            pixel = place.row * QUAD + v
            y, x, inside = pixel // w.out_width, pixel % w.out_width, w.out_height * w.out_width
            with emit.when(pixel < inside):
                _store_pixel(k, ops, place.image, (y, x), sums, row, v)
        else:
            y = place.row + v * (w.out_height // c.pixels)
            _store_pixel(k, ops, place.image, (y, place.col), sums, row, v)


def _store_pixel(
    k: Loops, ops: _Operands, image: Any, pixel: tuple[Any, Any], sums: Any, row: Any, v: int
) -> None:
    c, views = k.config, k.views
    for a in range(c.channels):
        channel = row * c.channels + a
        at = views.y.at(image, channel) + views.y.layout.offset(*pixel)
        value = sums[a * c.pixels + v] + ops.bias[channel]
        if views.in_place:
            value = value + ops.y[at]
        elif views.residual is not None:
            other = views.residual
            value = value + ops.residual[other.at(image, channel) + other.layout.offset(*pixel)]
        T.buffer_store(ops.y, emit.clamp(value, k.workload.activation), [at])


def pack(k: Loops, weight: NDArray[np.float32]) -> Packed:
    """values, offsets and, for the sparse form, starts of the weight [O, C / groups, kh, kw].

    A row holds the columns of `channels` neighbouring output channels: the union of their
    nonzeros, or all.
    """
    at = k.offsets().ravel() // k.offset_unit
    blocks = weight.reshape(k.rows, k.config.channels, k.taps)
    if not k.sparse:
        return blocks.transpose(0, 2, 1).astype(np.float32).ravel(), at.astype(np.int32)
    kept = (blocks != 0).any(1)
    row, column = np.nonzero(kept)
    stride = k.group_in * k.views.x.layout.channel_stride // k.offset_unit
    group = row * k.config.channels // k.group_out
    values = blocks[row, :, column].ravel()
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept.sum(1))])
    # A column of padding keeps an empty weight's buffers non-empty.
    return (
        np.append(values, np.zeros(k.config.channels)).astype(np.float32),
        np.append(at[column] + group * stride, 0).astype(np.int32),
        starts.astype(np.int32),
    )
