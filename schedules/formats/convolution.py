"""Convolutions of sparse weights with dense and with sparse activations, one image at a time.

A fully connected layer is the convolution of K channels of 1x1, or of one picture with a kernel of
its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.formats.rows import Rows
from topiarist.schedules.workload import ConvWorkload

Order = Literal["weights", "pixels"]


def sparse_dense_prim_func(name: str, workload: ConvWorkload, threads: int) -> Any:
    """f(x, starts, taps, values, bias, y): CSR times a dense activation [C, H, W].

    Each nonzero is multiplied with the part of the plane that it sees: vectors along lines, but
    every sum goes through memory. This is the plain way; `schedules/cpu/direct.py` is the fast one.
    Raises ValueError for more than one image and for a residual.
    """
    layer = _Layer.of(workload)
    w = workload
    with emit.prim_func(name) as builder:
        x = emit.argument("x", w.in_channels * w.height * w.width)
        weight = _Weight.argument(layer)
        y = emit.argument("y", w.out_channels * layer.plane)
        with emit.loop(w.out_channels, threads) as o:
            weight.start(o, y)
            begin, count = weight.entries(o * layer.channels, layer.channels)
            with T.serial(0, count) as j:
                tap = weight.tap(begin + j)
                value = T.bind(weight.values[begin + j])
                first_y, lines = _reach(tap.dy, w.height, w.out_height, w.strides[0])
                first_x, pixels = _reach(tap.dx, w.width, w.out_width, w.strides[1])
                plane = T.bind((layer.first_channel(o) + tap.channel) * (w.height * w.width))
                with T.serial(0, lines) as line, T.serial(0, pixels) as pixel:
                    oy, ox = first_y + line, first_x + pixel
                    to = o * layer.plane + oy * w.out_width + ox
                    iy, ix = oy * w.strides[0] + tap.dy, ox * w.strides[1] + tap.dx
                    T.buffer_store(y, y[to] + value * x[plane + iy * w.width + ix], [to])
            weight.finish(o, y)
    return builder.get()


def sparse_sparse_prim_func(
    name: str, workload: ConvWorkload, threads: int, order: Order = "weights"
) -> Any:
    """f(x, starts, taps, values, bias, y, pairs): x is three buffers, y dense [O, oh, ow].

    Products are scattered: every nonzero meets every stored pixel that it sees. `order` names the
    operand of the outer loop, within an input channel. `pairs` [O] counts multiply-adds. Raises
    ValueError for more than one image and for a residual.
    """
    layer = _Layer.of(workload)
    w = workload
    with emit.prim_func(name) as builder:
        x = Rows.argument("x", (w.in_channels, w.height, w.width))
        weight = _Weight.argument(layer)
        y = emit.argument("y", w.out_channels * layer.plane)
        pairs = emit.argument("pairs", w.out_channels, "int32")
        scatter = _Scatter(layer, x, weight, y, pairs)
        with emit.loop(w.out_channels, threads) as o:
            weight.start(o, y)
            T.buffer_store(pairs, T.int32(0), [o])
            with T.serial(0, layer.channels) as c:
                begin, count = weight.entries(o * layer.channels + c, 1)
                first_row = (layer.first_channel(o) + c) * w.height
                if order == "weights":
                    with T.serial(0, count) as j, T.serial(0, w.height) as line:
                        scatter.line(o, begin + j, first_row + line, line)
                else:
                    with T.serial(0, w.height) as line:
                        row = first_row + line
                        with T.serial(0, x.counts[row]) as entry, T.serial(0, count) as j:
                            scatter.pair(o, begin + j, row, line, entry)
            weight.finish(o, y)
    return builder.get()


@dataclass(frozen=True)
class _Layer:
    """The layer, and what follows from it."""

    workload: ConvWorkload

    @staticmethod
    def of(workload: ConvWorkload) -> _Layer:
        if workload.batch != 1 or workload.residual:
            raise ValueError(
                "operators on sparse tensors take one image and no residual: call them once per "
                "image, and add with `add_prim_func`"
            )
        return _Layer(workload)

    @property
    def channels(self) -> int:
        """Input channels of a filter."""
        return self.workload.in_channels // self.workload.groups

    @property
    def plane(self) -> int:
        """Pixels of an output channel."""
        return self.workload.out_height * self.workload.out_width

    def first_channel(self, o: Any) -> Any:
        """The first input channel of a filter's group."""
        return o // (self.workload.out_channels // self.workload.groups) * self.channels


@dataclass(frozen=True)
class _Tap:
    """Where a nonzero reads: the channel in its group, and the shifts (dilated, less padding)."""

    channel: Any
    dy: Any
    dx: Any


@dataclass(frozen=True)
class _Weight:
    """The constants of a convolution among a function's arguments."""

    layer: _Layer
    starts: Any
    taps: Any
    values: Any
    bias: Any

    @staticmethod
    def argument(layer: _Layer) -> _Weight:
        outputs, count = layer.workload.out_channels, emit.symbol("count")
        return _Weight(
            layer,
            emit.argument("starts", outputs * layer.channels + 1, "int32"),
            emit.argument("taps", count, "int32"),
            emit.argument("values", count),
            emit.argument("bias", outputs),
        )

    def entries(self, row: Any, rows: int) -> tuple[Any, Any]:
        """The first entry of `rows` rows, and their number of entries."""
        begin = T.bind(self.starts[row])
        return begin, self.starts[row + rows] - begin

    def tap(self, entry: Any) -> _Tap:
        w, (kh, kw) = self.layer.workload, self.layer.workload.kernel
        tap = T.bind(self.taps[entry])
        return _Tap(
            T.bind(tap // (kh * kw)),
            T.bind(tap // kw % kh * w.dilation[0] - w.padding[0]),
            T.bind(tap % kw * w.dilation[1] - w.padding[1]),
        )

    def start(self, o: Any, y: Any) -> None:
        """The filter's outputs become its bias."""
        with T.serial(0, self.layer.plane) as p:
            T.buffer_store(y, self.bias[o], [o * self.layer.plane + p])

    def finish(self, o: Any, y: Any) -> None:
        """The filter's outputs are clamped."""
        low, high = self.layer.workload.activation
        if low is None and high is None:
            return
        with T.serial(0, self.layer.plane) as p:
            at = o * self.layer.plane + p
            value = y[at]
            if low is not None:
                value = T.max(value, T.float32(low))
            if high is not None:
                value = T.min(value, T.float32(high))
            T.buffer_store(y, value, [at])


@dataclass(frozen=True)
class _Scatter:
    """Products of nonzeros and stored pixels, added where they belong."""

    layer: _Layer
    x: Rows
    weight: _Weight
    y: Any
    pairs: Any

    def line(self, o: Any, entry: Any, row: Any, line: Any) -> None:
        """A nonzero times all of a row."""
        w, tap = self.layer.workload, self.weight.tap(entry)
        with T.If(_hits(line - tap.dy, w.strides[0], w.out_height)), T.Then():
            oy = (line - tap.dy) // w.strides[0]
            with T.serial(0, self.x.counts[row]) as e:
                at = row * w.width + e
                column = T.bind(self.x.columns[at] - tap.dx)
                with T.If(_hits(column, w.strides[1], w.out_width)), T.Then():
                    self._add(o, oy, column // w.strides[1], entry, at)

    def pair(self, o: Any, entry: Any, row: Any, line: Any, e: Any) -> None:
        """A nonzero times one stored pixel."""
        w, tap = self.layer.workload, self.weight.tap(entry)
        at = row * w.width + e
        column = T.bind(self.x.columns[at] - tap.dx)
        inside = T.And(
            _hits(line - tap.dy, w.strides[0], w.out_height),
            _hits(column, w.strides[1], w.out_width),
        )
        with T.If(inside), T.Then():
            oy = (line - tap.dy) // w.strides[0]
            self._add(o, oy, column // w.strides[1], entry, at)

    def _add(self, o: Any, oy: Any, ox: Any, entry: Any, at: Any) -> None:
        to = o * self.layer.plane + oy * self.layer.workload.out_width + ox
        product = self.weight.values[entry] * self.x.values[at]
        T.buffer_store(self.y, self.y[to] + product, [to])
        T.buffer_store(self.pairs, self.pairs[o] + 1, [o])


def _hits(shifted: Any, stride: int, outputs: int) -> Any:
    """Whether a shifted input coordinate belongs to an output."""
    inside = T.And(shifted >= 0, shifted < outputs * stride)
    return T.And(inside, shifted % stride == 0) if stride > 1 else inside


def _reach(shift: Any, inputs: int, outputs: int, stride: int) -> tuple[Any, Any]:
    """First output and number of outputs whose input, stride * output + shift, exists."""
    first = T.bind(T.max(0, (stride - 1 - shift) // stride))
    end = T.min(outputs, (inputs - shift + stride - 1) // stride)
    return first, T.bind(T.max(0, end - first))
