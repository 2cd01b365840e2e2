"""The loops of Park et al.'s kernel (`schedules/cpu/park.py`).

Pictures are planes of pixels, row by row, and a vector holds neighbours of a row. The column index
of the CSR matrix is "stretched": the offset of the tap in the input. Rows lie width + pad values
apart, so what is right of one row is left of the next. A register tile is whole rows of one output
channel; the lanes past their ends hold garbage that a masked store drops.

Loop order: image -> 16 output channels -> column block (of input channels) -> output channel ->
tile -> nonzeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.kernel import ConvViews, KernelConfig
from topiarist.schedules.workload import ConvWorkload

OUT_BLOCK = 16  # output channels that a thread takes through all column blocks


@dataclass(frozen=True)
class ParkConfig(KernelConfig):
    """Rows of a register tile, input channels of a column block."""

    rows: int
    in_block: int

    def __str__(self) -> str:
        return f"{self.rows} rows/{self.in_block}"


@dataclass(frozen=True)
class Plane:
    """Where a padded picture lies: (c, y, x) at c * channel + y * row + x, in `size` values."""

    row: int
    channel: int
    size: int

    def stretched(self, channels: int, kernel: tuple[int, int]) -> NDArray[np.int64]:
        """[channels, kh, kw]: the offset of each tap, which is its column index."""
        c, ky, kx = np.ogrid[:channels, : kernel[0], : kernel[1]]
        return np.asarray(c * self.channel + ky * self.row + kx)


def padded_plane(workload: ConvWorkload, lanes: int) -> Plane:
    """The kernel's copy of an image; a row's garbage lanes reach past the end of the last one."""
    w, pad = workload, workload.padding[0]
    row = w.width + pad
    channel = (w.height + pad) * row
    return Plane(row, channel, w.in_channels * channel + pad * (w.width + 2 * pad) + lanes - 1)


def row_vectors(workload: ConvWorkload, lanes: int) -> int:
    """Vectors of an output row."""
    return -(-workload.out_width // lanes)


@dataclass(frozen=True)
class _Operands:
    """The function's arguments; `plane` is the padded copy, or x where none is needed."""

    x: Any
    values: Any
    indices: Any
    starts: Any
    bias: Any
    y: Any
    plane: Any


@dataclass(frozen=True)
class _Visit:
    """A row of the matrix within a column block, and what it reads and writes.

    It starts with the bias in the first column block, `sums` otherwise, and ends up in y after the
    last one, in `sums` otherwise.
    """

    begin: Any
    count: Any
    plane_at: Any
    bias: Any | None
    sums: Any
    sums_at: Any
    y_at: Any | None


@dataclass(frozen=True)
class Loops:
    """A kernel between two layouts."""

    workload: ConvWorkload
    config: ParkConfig
    views: ConvViews
    lanes: int
    threads: int

    @property
    def group_in(self) -> int:
        return self.workload.in_channels // self.workload.groups

    @property
    def group_out(self) -> int:
        return self.workload.out_channels // self.workload.groups

    @property
    def in_blocks(self) -> int:
        return self.group_in // self.config.in_block

    @property
    def cols(self) -> int:
        return row_vectors(self.workload, self.lanes)

    @property
    def copies(self) -> bool:
        """Whether images are copied: into padding, or so that garbage lanes have what to read."""
        return self.workload.padding[0] > 0 or self.workload.out_width % self.lanes > 0

    @property
    def plane(self) -> Plane:
        """Where the taps are read from."""
        if self.copies:
            return padded_plane(self.workload, self.lanes)
        layout = self.views.x.layout
        return Plane(layout.row_vectors, layout.channel_stride, layout.size)

    def prim_func(self, name: str) -> Any:
        """For each image the padded copy, then blocks of output channels, over threads."""
        w, blocks = self.workload, -(-self.group_out // OUT_BLOCK)
        with emit.prim_func(name) as builder:
            nonzeros = emit.symbol("nonzeros")
            x = emit.argument("x", w.batch * self.views.x.layout.size)
            values = emit.argument("values", nonzeros)
            indices = emit.argument("indices", nonzeros, "int32")
            rows = w.groups * self.in_blocks * self.group_out
            starts = emit.argument("starts", rows + 1, "int32")
            bias = emit.argument("bias", w.out_channels)
            y = emit.argument("y", w.batch * self.views.y.layout.size)
            copy = T.alloc_buffer((self.plane.size,), scope="global") if self.copies else x
            ops = _Operands(x, values, indices, starts, bias, y, copy)
            with T.serial(0, w.batch) as image:
                if self.copies:
                    self._copy(ops, image)
                with emit.loop(w.groups * blocks, self.threads) as task:
                    self._block(ops, image, task // blocks, task % blocks * OUT_BLOCK)
        return builder.get()

    def _pixels(self, image: Any, channel: Any) -> Any:
        """Where a channel's first pixel lies in x."""
        view = self.views.x
        return view.at(image, channel) + view.layout.offset(0, 0)

    def _copy(self, ops: _Operands, image: Any) -> None:
        """An image into planes with zeros above and on the left, and below the last one."""
        w, plane, pad = self.workload, self.plane, self.workload.padding[0]
        zero, row = T.float32(0), self.views.x.layout.row_vectors
        with emit.loop(w.in_channels, self.threads) as channel:
            base, source = channel * plane.channel, self._pixels(image, channel)
            with T.serial(0, pad * plane.row) as i:
                T.buffer_store(ops.plane, zero, [base + i])
            with T.serial(0, w.height) as y:
                at = base + (y + pad) * plane.row
                with T.serial(0, pad) as i:
                    T.buffer_store(ops.plane, zero, [at + i])
                with T.serial(0, w.width) as i:
                    T.buffer_store(ops.plane, ops.x[source + y * row + i], [at + pad + i])
        end = w.in_channels * plane.channel
        with T.serial(0, pad * (w.width + 2 * pad)) as i:
            T.buffer_store(ops.plane, zero, [end + i])

    def _block(self, ops: _Operands, image: Any, group: Any, first: Any) -> None:
        """Up to 16 output channels of a group through all column blocks."""
        origin = 0 if self.copies else self._pixels(image, 0)
        base = origin + group * self.group_in * self.plane.channel
        size = self.workload.out_height * self.cols * self.lanes
        several = self.in_blocks > 1
        sums = T.alloc_buffer((OUT_BLOCK * size,), scope="global") if several else None

        def column_block(q: Any, starts: bool, ends: bool) -> None:
            with T.serial(0, T.min(OUT_BLOCK, self.group_out - first)) as within:
                row = (group * self.in_blocks + q) * self.group_out + first + within
                channel = group * self.group_out + first + within
                begin = T.bind(ops.starts[row])
                visit = _Visit(
                    begin=begin,
                    count=T.bind(ops.starts[row + 1] - begin),
                    plane_at=base,
                    bias=ops.bias[channel] if starts else None,
                    sums=sums,
                    sums_at=within * size,
                    y_at=self.views.y.at(image, channel) if ends else None,
                )
                self._row(ops, visit)

        emit.peeled(self.in_blocks, column_block)

    def _row(self, ops: _Operands, visit: _Visit) -> None:
        """All tiles of an output channel: of so many rows, and the rest."""
        whole, rest = divmod(self.workload.out_height, self.config.rows)
        with T.serial(0, whole) as tile:
            self._tile(ops, visit, tile * self.config.rows, self.config.rows)
        if rest:
            self._tile(ops, visit, whole * self.config.rows, rest)

    def _tile(self, ops: _Operands, visit: _Visit, first: Any, rows: int) -> None:
        """The nonzeros of a row of the matrix times the rows `first...` of the virtual one."""
        places = [(row, col) for row in range(rows) for col in range(self.cols)]
        lanes, plane = self.lanes, visit.plane_at + first * self.plane.row
        so_far = [
            emit.ramp(visit.sums_at + ((first + row) * self.cols + col) * lanes, lanes)
            for row, col in places
        ]
        sums = emit.accumulators(len(places), lanes)
        for total, at in zip(sums, so_far, strict=True):
            start = visit.sums[at] if visit.bias is None else emit.splat(visit.bias, lanes)
            emit.assign(total, start)
        with T.serial(0, visit.count) as j:
            weight = emit.splat(ops.values[visit.begin + j], lanes)
            tap = plane + ops.indices[visit.begin + j]
            for total, (row, col) in zip(sums, places, strict=True):
                read = ops.plane[emit.ramp(tap + row * self.plane.row + col * lanes, lanes)]
                emit.assign(total, emit.value_of(total) + weight * read)
        for total, at, (row, col) in zip(sums, so_far, places, strict=True):
            if visit.y_at is None:
                T.buffer_store(visit.sums, emit.value_of(total), [at])
            else:
                self._store(ops.y, visit.y_at, first + row, col, emit.value_of(total))

    def _store(self, y: Any, channel_at: Any, row: Any, col: int, value: Any) -> None:
        """A vector of the output, without the lanes past the end of the row."""
        value = emit.clamp(value, self.workload.activation, self.lanes)
        at = channel_at + row * self.views.y.layout.row_vectors + col * self.lanes
        inside = min(self.lanes, self.workload.out_width - col * self.lanes)
        if inside == self.lanes:
            T.buffer_store(y, value, [emit.ramp(at, self.lanes)])
        else:
            emit.masked_store(y, at, value, inside, self.lanes)
