"""Dynamic convolution: a kernel for each image, mixed from experts that all images share.

    y[n, o] = sum_p shares[n, p, o] * conv(x[n], experts[p, o])

Only the positions of the window that some expert has cost anything. There are two forms, both
with every block of weights outside and all tiles of the picture inside:

- *mixed*: the sum of the experts first, then one convolution with it. A panel, the kernel of a
  block of output channels over a block of input channels, is mixed right before it is used, in
  the first-level cache, from experts that were asked for while the panel before was used. The
  mixed kernel never gets to memory. Costs the union of the masks for each pixel, and reading
  their sum for each image.
- *shared*: one convolution after the other, each scaled where it is added to the output. Costs
  the sum of the masks for each pixel; a batch reads the weights once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import direct, emit
from topiarist.schedules.cpu.ahead import Ahead
from topiarist.schedules.kernel import ConvSite, KernelConfig, Packed
from topiarist.schedules.workload import ConvWorkload, Mixture

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class DynamicConfig(KernelConfig):
    """Vectors of a tile, output channels of a tile, input channels of a block; the form."""

    rows: int
    cols: int
    out_block: int
    in_block: int
    shared: bool = False

    def __str__(self) -> str:
        form = "shared" if self.shared else "mixed"
        return f"{self.rows}x{self.cols}x{self.out_block}/{self.in_block} {form}"

    @property
    def loops(self) -> direct.DirectConfig:
        """The same tiles and blocks, of an ordinary convolution."""
        return direct.DirectConfig(self.rows, self.cols, self.out_block, self.in_block)


@dataclass(frozen=True)
class Terms:
    """Which (position, expert) pairs have weights, in the order that a form reads them."""

    positions: tuple[int, ...]  # of the window, that some expert has
    holders: tuple[tuple[int, ...], ...]  # of each of these positions

    @staticmethod
    def of(mixture: Mixture) -> Terms:
        """Of a layer."""
        kept = [(at, experts) for at, experts in enumerate(mixture.holders) if experts]
        return Terms(tuple(at for at, _ in kept), tuple(experts for _, experts in kept))

    @property
    def count(self) -> int:
        """The sum of the masks."""
        return sum(len(experts) for experts in self.holders)

    def by_expert(self) -> dict[int, list[int]]:
        """The positions of each expert that has any."""
        found: dict[int, list[int]] = {}
        for at, experts in zip(self.positions, self.holders, strict=True):
            for expert in experts:
                found.setdefault(expert, []).append(at)
        return dict(sorted(found.items()))


def mixture_of(workload: ConvWorkload) -> Mixture:
    """The mixture of a layer that has one."""
    assert workload.mixture is not None
    return workload.mixture


def pack(site: ConvSite, config: DynamicConfig, weight: FloatArray) -> Packed:
    """The experts in panels, and equal shares, which stand for those that a network computes.

    `weight` is the experts [P, O, I, kh, kw], or what they give when mixed in equal shares,
    [O, I, kh, kw]. Mixed: [block of I][block of O][position][expert][i][o]; shared: [block of
    I][block of O][expert][i][position][o].
    """
    w, mixture = site.workload, mixture_of(site.workload)
    experts = weight if weight.ndim == 5 else _spread(weight, mixture)
    terms = Terms.of(mixture)
    taps = experts.reshape(*experts.shape[:3], -1)
    if config.shared:
        groups = [taps[p][:, :, at] for p, at in terms.by_expert().items()]
    else:
        groups = [
            taps[p][:, :, [at]]
            for at, holders in zip(terms.positions, terms.holders, strict=True)
            for p in holders
        ]
    blocks = w.in_channels // config.in_block
    # [O, I, positions] -> [block of I, block of O, i, position, o], and these side by side.
    parts = [
        group.reshape(-1, config.out_block, blocks, config.in_block, group.shape[2])
        .transpose(2, 0, 3, 4, 1)
        .reshape(blocks, w.out_channels // config.out_block, -1)
        for group in groups
    ]
    panels = np.concatenate(parts, axis=2).ravel() if parts else np.zeros(1)
    shares = np.full(w.batch * mixture.experts * w.out_channels, 1 / mixture.experts)
    return panels.astype(np.float32), shares.astype(np.float32)


def _spread(weight: FloatArray, mixture: Mixture) -> FloatArray:
    """Experts whose mean is the weight."""
    scale = np.zeros((mixture.experts, len(mixture.holders)), np.float32)
    for at, holders in enumerate(mixture.holders):
        scale[list(holders), at] = mixture.experts / max(1, len(holders))
    return weight * scale.reshape(mixture.experts, 1, 1, *weight.shape[2:])


@dataclass(frozen=True)
class Loops:
    """The code of a layer."""

    k: direct._Kernel
    config: DynamicConfig
    mixture: Mixture

    @staticmethod
    def of(site: ConvSite, config: DynamicConfig) -> Loops | None:
        """None where the tile does not fit the layouts, or blocks don't divide the channels."""
        w = site.workload
        kernel = direct.make_kernel(site, config.loops)
        if kernel is None or w.in_channels % config.in_block or w.out_channels % config.out_block:
            return None
        return Loops(kernel, config, mixture_of(w))

    @property
    def terms(self) -> Terms:
        return Terms.of(self.mixture)

    @property
    def out_blocks(self) -> int:
        return self.k.workload.out_channels // self.config.out_block

    @property
    def tiles(self) -> int:
        return self.k.geometry.tiles[0] * self.k.geometry.tiles[1]

    def prim_func(self, name: str) -> Any:
        """f(x, experts, shares, bias[, residual], y)."""
        k, w, views = self.k, self.k.workload, self.k.views
        weights = w.in_channels * w.out_channels * self.terms.count
        with emit.prim_func(name) as builder:
            x = emit.argument("x", w.batch * views.x.layout.size)
            experts = emit.argument("experts", max(1, weights))
            shares = emit.argument("shares", w.batch * self.mixture.experts * w.out_channels)
            bias = emit.argument("bias", w.out_channels)
            residual = None
            if views.residual is not None:
                residual = emit.argument("residual", w.batch * views.residual.layout.size)
            y = emit.argument("y", w.batch * views.y.layout.size)
            ops = direct._Operands(x, bias, residual, y)
            if self.config.shared:
                self._shared(ops, experts, shares)
            else:
                self._mixed(ops, experts, shares)
            emit.write_halo(y, views.y, w.batch, k.threads)
        return builder.get()

    def _mixed(self, ops: direct._Operands, experts: Any, shares: Any) -> None:
        size, terms = self.config.in_block * self.config.out_block, self.terms
        with T.serial(0, self.k.workload.batch) as image:

            def in_block(q: Any, first: bool, last: bool) -> None:
                with emit.loop(self.out_blocks, self.k.threads) as block:
                    panel = T.alloc_buffer((max(1, len(terms.positions)) * size,), "float32")
                    source = (q * self.out_blocks + block) * terms.count * size
                    self._mix(panel, experts, source, shares, image, block)
                    ahead = self._ahead(self.tiles)
                    with T.serial(0, self.tiles) as tile:
                        where = self._where(image, tile)
                        at, channels = self._outputs(where, block)
                        sums = [
                            self.k.load(ops, a, where, channel, first)
                            for a, channel in zip(at, channels, strict=True)
                        ]
                        steps = [(t, i * size) for i, t in enumerate(terms.positions)]
                        reads = self._inputs(where, q)
                        for c in self._channels(ahead, experts, source, tile):
                            for position, first_weight in steps:
                                weight_at = first_weight + c * self.config.out_block
                                tap = self._tap(reads, c, position)
                                self.k.multiply(sums, (panel, weight_at), (ops.x, tap))
                        for a, total in zip(at, sums, strict=True):
                            self.k.store(ops.y, a, total, last)

            emit.peeled(self.k.in_blocks, in_block)

    def _mix(
        self, panel: Any, experts: Any, source: Any, shares: Any, image: Any, block: Any
    ) -> None:
        """panel[position] = sum of the shares of its experts times their weights."""
        out_block, lanes = self.config.out_block, self.k.lanes
        size = self.config.in_block * out_block
        first = {p: self._share_at(image, p, block * out_block) for p in self.terms.by_expert()}
        factors = {p: repeated(shares, at, out_block, lanes) for p, at in first.items()}
        read = 0
        for i, holders in enumerate(self.terms.holders):
            sources = {p: source + (read + n) * size for n, p in enumerate(holders)}
            read += len(holders)
            with T.serial(0, size // lanes) as v:
                vectors = [
                    factors[p] * experts[emit.ramp(at + v * lanes, lanes)]
                    for p, at in sources.items()
                ]
                T.buffer_store(panel, sum_of(vectors), [emit.ramp(i * size + v * lanes, lanes)])
            with T.serial(0, size % lanes) as rest:
                j = size - size % lanes + rest
                values = [
                    shares[first[p] + j % out_block] * experts[at + j] for p, at in sources.items()
                ]
                T.buffer_store(panel, sum_of(values), [i * size + j])

    def _shared(self, ops: direct._Operands, experts: Any, shares: Any) -> None:
        batch, out_block = self.k.workload.batch, self.config.out_block
        panel = self.config.in_block * out_block * self.terms.count
        every = self.terms.by_expert()

        def in_block(q: Any, first: bool, last: bool) -> None:
            with emit.loop(self.out_blocks, self.k.threads) as block:
                source = (q * self.out_blocks + block) * panel
                ahead = self._ahead(batch * self.tiles * len(every))
                with T.serial(0, batch) as image, T.serial(0, self.tiles) as tile:
                    where = self._where(image, tile)
                    at, channels = self._outputs(where, block)
                    begin = source
                    for n, (expert, positions) in enumerate(every.items()):
                        sums = [
                            emit.accumulators(self.k.vectors, self.k.lanes) for _ in range(out_block)
                        ]
                        for total in (vector for row in sums for vector in row):
                            emit.assign(total, emit.splat(0.0, self.k.lanes))
                        turn = (image * self.tiles + tile) * len(every) + n
                        reads, width = self._inputs(where, q), len(positions) * out_block
                        for c in self._channels(ahead, experts, source, turn):
                            for i, position in enumerate(positions):
                                weight_at = begin + c * width + i * out_block
                                tap = self._tap(reads, c, position)
                                self.k.multiply(sums, (experts, weight_at), (ops.x, tap))
                        begin = begin + self.config.in_block * width
                        done = last and n == len(every) - 1
                        for a, channel, row in zip(at, channels, sums, strict=True):
                            share = shares[self._share_at(image, expert, channel)]
                            started = not first or n > 0
                            so_far = (
                                self.k.so_far(ops.y, a)
                                if started
                                else self.k.initial(ops, a, where, channel)
                            )
                            for total, value in zip(row, so_far, strict=True):
                                scaled = emit.splat(share, self.k.lanes) * emit.value_of(total)
                                emit.assign(total, value + scaled)
                            self.k.store(ops.y, a, row, done)

        emit.peeled(self.k.in_blocks, in_block)

    def _ahead(self, turns: int) -> Ahead:
        per_channel = max(1, self.terms.count) * self.config.out_block
        return Ahead.of(self.config.in_block, per_channel, turns)

    def _channels(self, ahead: Ahead, experts: Any, panel: Any, turn: Any) -> Iterator[Any]:
        """Loops over the input channels of a block, asking for the next panel on the way."""
        with T.serial(0, self.config.in_block // ahead.channels) as part:
            ahead.emit(experts, panel, turn, part)
            with T.serial(0, ahead.channels) as within:
                yield part * ahead.channels + within

    def _where(self, image: Any, tile: Any) -> direct._Where:
        nx = self.k.geometry.tiles[1]
        return direct._Where(image, tile // nx, tile % nx)

    def _outputs(self, where: direct._Where, block: Any) -> tuple[list[Any], list[Any]]:
        """Where the output channels of a block lie, and which they are."""
        base = self.k.y_at(where.image, where.ty, where.tx)
        channels = [block * self.config.out_block + a for a in range(self.config.out_block)]
        stride = self.k.views.y.layout.channel_stride
        return [base + channel * stride for channel in channels], channels

    def _inputs(self, where: direct._Where, q: Any) -> Any:
        """The tap (0, 0) of a tile in the first channel of a block."""
        stride = self.k.views.x.layout.channel_stride
        base = self.k.x_at(where.image, where.ty, where.tx)
        return base + q * self.config.in_block * stride

    def _tap(self, base: Any, channel: Any, position: int) -> Any:
        return (
            base
            + channel * self.k.views.x.layout.channel_stride
            + int(self.k.geometry.taps.ravel()[position])
        )

    def _share_at(self, image: Any, expert: int, channel: Any) -> Any:
        count = self.k.workload.out_channels
        return (image * self.mixture.experts + expert) * count + channel


def repeated(shares: Any, at: Any, block: int, lanes: int) -> Any:
    """The shares of `block` neighbouring channels, over and over."""
    if block == 1:
        return T.bind(emit.splat(shares[at], lanes))
    read = T.bind(shares[emit.ramp(at, block)])
    if block == lanes:
        return read
    return T.bind(tirx.Shuffle([read] * (lanes // block), list(range(lanes))))


def sum_of(terms: list[Any]) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
