"""Direct convolution on lane-strided vectors: the sparse (CSR) and the dense form.

Loop order: tile of output vectors -> group -> block of input channels -> output channels -> the
nonzeros (or all taps) of that block. A tile of `rows x cols` vectors of `block` output channels
stays in registers over the innermost loop, which broadcasts a weight and multiplies it into
vectors of the input. The column index of the CSR matrix is the offset of the tap in the input's
layout (Park et al., ICLR 2017, section 2.1), as 16 bits in units of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit
from topiarist.schedules.cpu.ahead import LINE, Ahead, one_per_unit
from topiarist.schedules.cpu.core import Core, core_of
from topiarist.schedules.kernel import ConvSite, ConvViews, KernelConfig
from topiarist.schedules.layout import (
    Halo,
    LaneLayout,
    TileAddress,
    halo_of_taps,
    tile_address,
)
from topiarist.schedules.workload import ConvWorkload

FloatArray = NDArray[np.float32]
MAX_OFFSET = 1 << 16
NONZEROS_AHEAD = 256
MOST_FETCHED = 16  # requests for input in a visit
FETCHED_AHEAD = 4  # visits
EVEN = 1.05  # the busiest thread's share of tasks, relative to an even one, that is good enough


@dataclass(frozen=True)
class DirectConfig(KernelConfig):
    """The knobs: vectors of a tile, output channels of a tile, input channels of a block.

    With `weights_outside` (dense form) every block of weights meets all tiles before the next one,
    which spares reading weights that exceed the caches once per tile.
    """

    rows: int
    cols: int
    out_block: int
    in_block: int
    weights_outside: bool = False

    def __str__(self) -> str:
        order = " weights outside" if self.weights_outside else ""
        return f"{self.rows}x{self.cols}x{self.out_block}/{self.in_block}{order}"


@dataclass(frozen=True)
class _Geometry:
    """Everything about addresses that a kernel needs, as numbers."""

    x: TileAddress
    y: TileAddress
    residual: TileAddress | None
    tiles: tuple[int, int]
    x_origin: int  # of the tap (0, 0) relative to the tile's first vector
    taps: NDArray[np.int64]  # [kh, kw] offsets from that tap


def refuses_views(workload: ConvWorkload, views: ConvViews) -> str | None:
    """Why a direct convolution can't run between these layouts, None where it can."""
    a, b = views.x.layout, views.y.layout
    sy, sx = workload.strides
    if (a.grid.sy, a.grid.sx) != (b.grid.sy, b.grid.sx):
        return f"lanes {a.grid.sy}x{a.grid.sx} in, {b.grid.sy}x{b.grid.sx} out"
    if (a.grid.rows, a.grid.cols) != (sy * b.grid.rows, sx * b.grid.cols):
        return f"sub-images {a.grid} in are not {sy}x{sx} those of {b.grid} out"
    if not workload.pointwise:
        if a.tile is not None:
            return "taps need a padded input, got a tiled one"
        if a.fill != 0:
            return f"the padding is {a.fill}, not zero"
        need = required_halo(workload)
        if any(have < want for have, want in zip(a.halo, need, strict=True)):
            return f"halo {a.halo}, needs {need}"
    res = views.residual
    if res is not None and res.layout.grid != b.grid:
        return f"the residual's sub-images {res.layout.grid} are not {b.grid}"
    return None


def required_halo(workload: ConvWorkload) -> Halo:
    """The halo that the input of a convolution needs."""
    w = workload
    return halo_of_taps(w.kernel, w.strides, w.padding, w.dilation)


def _geometry(workload: ConvWorkload, config: DirectConfig, views: ConvViews) -> _Geometry | None:
    grid = views.y.layout.grid
    if grid.rows % config.rows or grid.cols % config.cols:
        return None
    tiles = grid.rows // config.rows, grid.cols // config.cols
    tile = config.rows, config.cols
    x = tile_address(views.x.layout, tiles, tile, workload.strides)
    y = tile_address(views.y.layout, tiles, tile, (1, 1))
    residual = None
    if views.residual is not None:
        residual = tile_address(views.residual.layout, tiles, tile, (1, 1))
        if residual is None:
            return None
    if x is None or y is None:
        return None
    taps, origin = _taps(workload, views.x.layout)
    return _Geometry(x, y, residual, tiles, origin, taps)


def _taps(workload: ConvWorkload, layout: LaneLayout) -> tuple[NDArray[np.int64], int]:
    if workload.pointwise:
        return np.zeros((1, 1), np.int64), 0
    row = layout.row_vectors * layout.grid.lanes
    col = layout.grid.lanes
    ky = np.arange(workload.kernel[0]) * workload.dilation[0] * row
    kx = np.arange(workload.kernel[1]) * workload.dilation[1] * col
    origin = -(workload.padding[0] * row + workload.padding[1] * col)
    return ky[:, None] + kx[None, :], origin


def _blocks(size: int, block: int) -> list[tuple[int, int]]:
    """(first, count) of consecutive blocks."""
    return [(first, min(block, size - first)) for first in range(0, size, block)]


@dataclass(frozen=True)
class _Operands:
    x: Any
    bias: Any
    residual: Any
    y: Any


@dataclass(frozen=True)
class _Where:
    """The image and tile that a loop body works on."""

    image: Any
    ty: Any
    tx: Any


@dataclass(frozen=True)
class _Kernel:
    """The loops around the innermost one, shared by the sparse and the dense form."""

    workload: ConvWorkload
    config: DirectConfig
    views: ConvViews
    geometry: _Geometry
    threads: int
    core: Core

    @property
    def lanes(self) -> int:
        return self.views.y.layout.grid.lanes

    @property
    def request(self) -> int:
        """Values that one request brings."""
        return max(LINE, self.lanes) if self.core.line_requests else self.lanes

    @property
    def group_in(self) -> int:
        return self.workload.in_channels // self.workload.groups

    @property
    def group_out(self) -> int:
        return self.workload.out_channels // self.workload.groups

    @property
    def in_blocks(self) -> int:
        return -(-self.group_in // self.config.in_block)

    @property
    def images(self) -> int:
        """How many have weights of their own, one after the other; constant ones are for all."""
        return 1 if self.workload.mixture is None else self.workload.batch

    @property
    def tile_count(self) -> int:
        return self.workload.batch * self.geometry.tiles[0] * self.geometry.tiles[1]

    @property
    def few_tiles(self) -> bool:
        """Whether threads share out the channels: tiles this close share pairs of cache lines."""
        return self.tile_count <= self.threads

    def splits(self) -> int:
        """Parts that the output channels are split into, so that every thread has work."""
        blocks, rest = divmod(self.group_out, self.config.out_block)
        if self.threads == 1 or rest:  # every part would compute the rest
            return 1
        tiles = self.tile_count
        if self.few_tiles and blocks % self.threads == 0:
            return self.threads

        def idle(splits: int) -> float:
            """Time of the thread with most tasks, relative to an even share."""
            return -(-tiles * splits // self.threads) * self.threads / (tiles * splits)

        # As few as keep the threads busy: every part reads the tile's input again.
        found = [s for s in range(1, 2 * self.threads + 1) if blocks % s == 0]
        return next((s for s in found if idle(s) < EVEN), min(found, key=idle))

    def tile_loop(self, body: Callable[[Any, Any, Any, Any], None]) -> None:
        """body(image, ty, tx, split), over threads when there are several."""
        ny, nx = self.geometry.tiles
        splits, tiles = self.splits(), self.tile_count
        with emit.loop(tiles * splits, self.threads) as p:
            tile, split = (p % tiles, p // tiles) if self.few_tiles else (p // splits, p % splits)
            body(tile // (ny * nx), tile // nx % ny, tile % nx, split)

    def steps(self, address: TileAddress) -> list[int]:
        return [step for row in address.steps for step in row]

    def y_at(self, image: Any, ty: Any, tx: Any) -> Any:
        view = self.views.y
        return image * view.layout.size + self.geometry.y.base(ty, tx) + view.base

    def x_at(self, image: Any, ty: Any, tx: Any) -> Any:
        view = self.views.x
        base = image * view.layout.size + self.geometry.x.base(ty, tx) + view.base
        return base + self.geometry.x_origin

    def initial(self, ops: _Operands, at: Any, where: _Where, channel: Any) -> list[Any]:
        """What a tile of one channel starts with: bias, plus the residual."""
        start = emit.splat(ops.bias[channel], self.lanes)
        if self.views.in_place:
            return [start + value for value in self.so_far(ops.y, at)]
        residual = self._residual(ops, where, channel)
        return [start + value for value in residual] or [start] * self.vectors

    def load(self, ops: _Operands, at: Any, where: _Where, channel: Any, first: bool) -> list[Any]:
        """Accumulators of a tile of one channel: its initial values, or the sum so far."""
        values = self.initial(ops, at, where, channel) if first else self.so_far(ops.y, at)
        sums = emit.accumulators(self.vectors, self.lanes)
        for total, value in zip(sums, values, strict=True):
            emit.assign(total, value)
        return sums

    @property
    def vectors(self) -> int:
        """Vectors of a tile of one channel."""
        return self.config.rows * self.config.cols

    def so_far(self, y: Any, at: Any) -> list[Any]:
        return [y[emit.ramp(at + step, self.lanes)] for step in self.steps(self.geometry.y)]

    def _residual(self, ops: _Operands, where: _Where, channel: Any) -> list[Any]:
        """The residual's tile of one channel; nothing where there is none."""
        view, address = self.views.residual, self.geometry.residual
        if view is None or address is None:
            return []
        base = where.image * view.layout.size + address.base(where.ty, where.tx) + view.base
        base = base + channel * view.layout.channel_stride
        return [ops.residual[emit.ramp(base + step, self.lanes)] for step in self.steps(address)]

    def fetch(self, y: Any, group_at: Any, order: Any, visit: Any) -> None:
        """Ask for the tile of a later visit to the sparse form's rows, which come in any order.

        It pays where a visit does little else: measured, for pointwise layers that widen.
        """
        visits = self.workload.groups * self.in_blocks * self.group_out // self.config.out_block
        later = T.cast(order[T.min(visit + FETCHED_AHEAD, visits - 1)], "int32")
        at = T.bind(group_at + later * self.views.y.layout.channel_stride)
        for step in one_per_unit(self.steps(self.geometry.y), self.request):
            emit.prefetch(y, at + step)

    def fetch_input(self, x: Any, next_block: Any, visit: Any, visits: int) -> None:
        """Ask for a share of the next block of input channels, where it lies in one piece.

        With threads, half of it comes from another core's cache.
        """
        layout = self.views.x.layout
        if self.in_blocks == 1 or (layout.tile is None and self.geometry.tiles != (1, 1)):
            return
        requests = self.config.in_block * layout.channel_stride // self.request
        share = -(-requests // visits)
        for i in range(share if share <= MOST_FETCHED else 0):
            emit.prefetch(x, next_block + (visit * share + i) * self.request)

    def multiply(
        self, sums: list[list[Any]], weights: tuple[Any, Any], inputs: tuple[Any, Any]
    ) -> None:
        """sums[a][v] += weights[at + a] * x[tap + v]; each operand as (buffer, position)."""
        (buffer, at), (x, tap) = weights, inputs
        found = emit.splats(buffer, at, len(sums), self.lanes, self.core.lane_fma)
        for row, weight in zip(sums, found, strict=True):
            for total, step in zip(row, self.steps(self.geometry.x), strict=True):
                read = x[emit.ramp(tap + step, self.lanes)]
                emit.assign(total, emit.value_of(total) + weight * read)

    def store(self, y: Any, at: Any, sums: list[Any], last: bool) -> None:
        """Write a tile of one channel, clamped when it is complete."""
        bounds = self.workload.activation if last else (None, None)
        for total, step in zip(sums, self.steps(self.geometry.y), strict=True):
            value = emit.clamp(emit.value_of(total), bounds, self.lanes)
            T.buffer_store(y, value, [emit.ramp(at + step, self.lanes)])


def make_kernel(site: ConvSite, config: DirectConfig) -> _Kernel | None:
    """The kernel's loops, None where the tile does not fit the layouts."""
    geometry = _geometry(site.workload, config, site.views)
    if geometry is None:
        return None
    core = core_of(site.target)
    return _Kernel(site.workload, config, site.views, geometry, site.threads, core)


@dataclass(frozen=True)
class _Csr:
    """The buffers of a packed sparse weight (`pack_sparse`)."""

    values: Any
    offsets: Any
    starts: Any
    order: Any

    def fetch(self, at: Any, block: int) -> None:
        """Ask for nonzeros that are needed soon: about as many as a visit uses."""
        emit.prefetch(self.values, at * block)
        emit.prefetch(self.values, at * block + LINE)
        emit.prefetch(self.offsets, at)


def _sparse_body(k: _Kernel, ops: _Operands, weight: _Csr) -> Callable[[Any, Any, Any, Any], None]:
    """The loops inside a tile of the sparse form."""
    block = k.config.out_block
    visits = k.group_out // block
    all_visits = k.workload.groups * k.in_blocks * visits
    chunk = visits // k.splits()
    x_stride, y_stride = k.views.x.layout.channel_stride, k.views.y.layout.channel_stride
    index = "int64" if k.core.opaque_base else "int32"

    def tile(image: Any, ty: Any, tx: Any, split: Any) -> None:
        y_base, x_base = k.y_at(image, ty, tx), k.x_at(image, ty, tx)
        where = _Where(image, ty, tx)
        with T.serial(0, k.workload.groups) as group:

            def in_block(q: Any, first: bool, last: bool) -> None:
                x_block = x_base + (group * k.group_in + q * k.config.in_block) * x_stride
                if k.core.opaque_base:
                    # `starts` begins with 0, which LLVM can't know.
                    x_block = T.bind(T.cast(T.max(x_block, weight.starts[0]), "int64"))
                with T.serial(0, chunk) as within:
                    visit = (group * k.in_blocks + q) * visits + split * chunk + within
                    k.fetch_input(ops.x, x_block + k.config.in_block * x_stride, within, chunk)
                    row = T.bind(T.cast(weight.order[visit], "int32"))
                    channel = group * k.group_out + row
                    at = [y_base + (channel + a) * y_stride for a in range(block)]
                    sums = [k.load(ops, at[a], where, channel + a, first) for a in range(block)]
                    if k.workload.pointwise and k.group_out > k.group_in:
                        k.fetch(ops.y, y_base + group * k.group_out * y_stride, weight.order, visit)
                    begin = T.bind(weight.starts[visit])
                    values = begin
                    if k.images > 1:
                        values = T.bind(begin + image * weight.starts[all_visits])
                    weight.fetch(begin + NONZEROS_AHEAD, block)
                    with T.serial(0, weight.starts[visit + 1] - begin) as j:
                        tap = x_block + T.cast(weight.offsets[begin + j], index) * k.lanes
                        k.multiply(sums, (weight.values, (values + j) * block), (ops.x, tap))
                    for a in range(block):
                        k.store(ops.y, at[a], sums[a], last)

            emit.peeled(k.in_blocks, in_block)

    return tile


def sparse_prim_func(k: _Kernel, name: str) -> Any:
    """f(x, values, offsets, starts, order, bias[, residual], y); the nonzeros are dynamic."""
    w, views = k.workload, k.views
    visits = w.groups * k.in_blocks * (k.group_out // k.config.out_block)
    with emit.prim_func(name) as builder:
        nnz, count = emit.symbol("count"), emit.symbol("nonzeros")
        x = emit.argument("x", w.batch * views.x.layout.size)
        weight = _Csr(
            values=emit.argument("values", count),
            offsets=emit.argument("offsets", nnz, "uint16"),
            starts=emit.argument("starts", visits + 1, "int32"),
            order=emit.argument("order", visits, "uint16"),
        )
        bias = emit.argument("bias", w.out_channels)
        residual = None
        if views.residual is not None:
            residual = emit.argument("residual", w.batch * views.residual.layout.size)
        y = emit.argument("y", w.batch * views.y.layout.size)
        ops = _Operands(x, bias, residual, y)
        k.tile_loop(_sparse_body(k, ops, weight))
        emit.write_halo(y, views.y, w.batch, k.threads)
    return builder.get()


def pack_sparse(k: _Kernel, weight: FloatArray) -> tuple[NDArray[Any], ...] | None:
    """values, offsets, starts, order of the weight [O, C / groups, kh, kw]; see `in_visits`.

    A mixture has values for each image. None where an offset needs more than 16 bits.
    """
    values, offsets, starts, order = in_visits(k, weight)
    if offsets.size and offsets.max() >= MAX_OFFSET:
        return None
    # One value of padding keeps an empty weight's buffers non-empty.
    return (
        np.append(np.tile(values, k.images), 0).astype(np.float32),
        np.append(offsets, 0).astype(np.uint16),
        starts.astype(np.int32),
        order.astype(np.uint16),
    )


def in_visits(k: _Kernel, weight: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """values, offsets, starts, order of a weight of any dtype, for one image.

    A visit works on `out_block` neighbouring output channels in a block of input channels, on the
    union of their nonzeros. Visits come in the order group, block of input channels, number of
    nonzeros: neighbours of one length make the ends of their loops predictable. `order` holds
    their first channels within the group.
    """
    block = k.config.out_block
    stride, lanes = k.views.x.layout.channel_stride, k.lanes
    taps = k.geometry.taps[None] + np.arange(k.group_in)[:, None, None] * stride
    values, offsets, counts, orders = [], [], [np.zeros(1, np.int64)], []
    for part, first, count in _row_blocks(k):
        at = (taps[first : first + count] - first * stride).ravel()
        dense = weight[part, first : first + count].reshape(-1, block, len(at))
        kept = (dense != 0).any(1)
        order = _by_length(kept.sum(1), k.splits())
        visit, col = np.nonzero(kept[order])
        offsets.append(at[col] // lanes)
        values.append(dense[order[visit], :, col].ravel())
        counts.append(kept[order].sum(1))
        orders.append(order * block)
    starts = np.cumsum(np.concatenate(counts))
    return np.concatenate(values), np.concatenate(offsets), starts, np.concatenate(orders)


def _by_length(lengths: NDArray[np.int64], splits: int) -> NDArray[np.int64]:
    """The order of rising length within each of the parts that threads work on."""
    parts = lengths.reshape(splits, -1)
    order = np.argsort(parts, axis=1, kind="stable")
    return (order + np.arange(splits)[:, None] * parts.shape[1]).ravel()


def _row_blocks(k: _Kernel) -> Iterator[tuple[slice, int, int]]:
    """(output channels of a group, first input channel, count) in the kernel's order."""
    for group in range(k.workload.groups):
        part = slice(group * k.group_out, (group + 1) * k.group_out)
        for first, count in _blocks(k.group_in, k.config.in_block):
            yield part, first, count


@dataclass(frozen=True)
class _DenseLoops:
    """The loops of the dense form around the product of one tile with one block of channels."""

    k: _Kernel
    ops: _Operands
    weights: Any

    def emit(self) -> None:
        """All loops, in the order that the configuration asks for."""
        if self.k.config.weights_outside:
            self._weights_outside()
        else:
            self.k.tile_loop(self._tile)

    def _segments(self) -> list[tuple[int, int, int]]:
        """(first channel, blocks, channels per block) within a group: whole blocks and the rest."""
        block = self.k.config.out_block
        whole_blocks, rest = divmod(self.k.group_out, block)
        segments = [(0, whole_blocks, block), (whole_blocks * block, 1, rest)]
        return [(first, count, size) for first, count, size in segments if count * size]

    def _tile(self, image: Any, ty: Any, tx: Any, split: Any) -> None:
        where, splits = _Where(image, ty, tx), self.k.splits()
        with T.serial(0, self.k.workload.groups) as group:

            def in_block(q: Any, first: bool, last: bool) -> None:
                for channel, count, size in self._segments():
                    chunk = count // splits
                    with T.serial(0, chunk) as within:
                        at = channel + (split * chunk + within) * size
                        self._product(where, _Step(group, q, first, last), at, size)

            emit.peeled(self.k.in_blocks, in_block)

    def _weights_outside(self) -> None:
        """Every block of weights is read once and meets all tiles."""
        ny, nx = self.k.geometry.tiles
        with (
            T.serial(0, self.k.workload.batch) as image,
            T.serial(0, self.k.workload.groups) as group,
        ):

            def in_block(q: Any, first: bool, last: bool) -> None:
                for channel, count, size in self._segments():
                    with emit.loop(count, self.k.threads) as within, T.serial(0, ny * nx) as tile:
                        where = _Where(image, tile // nx, tile % nx)
                        step = _Step(group, q, first, last, tile, ny * nx)
                        self._product(where, step, channel + within * size, size)

            emit.peeled(self.k.in_blocks, in_block)

    def _product(self, where: _Where, step: _Step, first_channel: Any, size: int) -> None:
        """Accumulate one block of input channels into `size` output channels of one tile."""
        k, ops = self.k, self.ops
        (kh, kw), taps = k.geometry.taps.shape, k.geometry.taps
        row_tap = int(taps[1, 0]) if kh > 1 else 0
        col_tap = int(taps[0, 1]) if kw > 1 else 0
        x_stride, y_stride = k.views.x.layout.channel_stride, k.views.y.layout.channel_stride
        x_block = k.x_at(where.image, where.ty, where.tx)
        x_block = x_block + (step.group * k.group_in + step.q * k.config.in_block) * x_stride
        channel = step.group * k.group_out + first_channel
        y_base = k.y_at(where.image, where.ty, where.tx)
        at = [y_base + (channel + a) * y_stride for a in range(size)]
        sums = [k.load(ops, at[a], where, channel + a, step.first) for a in range(size)]
        block = (step.group * k.in_blocks + step.q) * k.group_out + first_channel
        w_block = block * k.config.in_block * kh * kw
        ahead = Ahead.of(k.config.in_block, kh * kw * size, step.turns)
        with T.serial(0, k.config.in_block // ahead.channels) as part:
            ahead.emit(self.weights, w_block, step.turn, part)
            with (
                T.serial(0, ahead.channels) as within,
                T.serial(0, kh) as ky,
                T.serial(0, kw) as kx,
            ):
                c = part * ahead.channels + within
                tap = x_block + c * x_stride + ky * row_tap + kx * col_tap
                w_at = w_block + ((c * kh + ky) * kw + kx) * size
                k.multiply(sums, (self.weights, w_at), (ops.x, tap))
        for a in range(size):
            k.store(ops.y, at[a], sums[a], step.last)


@dataclass(frozen=True)
class _Step:
    """A group and a block of its input channels; whether it is the first or the last block.

    A panel of weights is used `turns` times in a row; this is one of them.
    """

    group: Any
    q: Any
    first: bool
    last: bool
    turn: Any = 0
    turns: int = 1


def dense_prim_func(k: _Kernel, name: str) -> Any:
    """f(x, weights, bias[, residual], y)."""
    w, views = k.workload, k.views
    kh, kw = k.geometry.taps.shape
    with emit.prim_func(name) as builder:
        x = emit.argument("x", w.batch * views.x.layout.size)
        weights = emit.argument("weights", w.out_channels * k.group_in * kh * kw)
        bias = emit.argument("bias", w.out_channels)
        residual = None
        if views.residual is not None:
            residual = emit.argument("residual", w.batch * views.residual.layout.size)
        y = emit.argument("y", w.batch * views.y.layout.size)
        _DenseLoops(k, _Operands(x, bias, residual, y), weights).emit()
        emit.write_halo(y, views.y, w.batch, k.threads)
    return builder.get()


def pack_dense(k: _Kernel, weight: FloatArray) -> FloatArray:
    """The weight as [group][block of C][block of O][c][kh][kw][o]; C divides into its blocks."""
    block = k.config.out_block
    whole_channels = k.group_out - k.group_out % block
    parts = []
    for part, first, count in _row_blocks(k):
        w = weight[part, first : first + count]
        for rows in (w[:whole_channels], w[whole_channels:]):
            if len(rows):
                size = block if len(rows) >= block else len(rows)
                split = rows.reshape(-1, size, *rows.shape[1:])
                parts.append(np.moveaxis(split, 1, -1).ravel())
    return np.concatenate(parts).astype(np.float32)
