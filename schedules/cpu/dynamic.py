"""Dynamic convolution: a kernel for each image, mixed from experts that all images share.

    y[n, o] = sum_p shares[n, p, o] * conv(x[n], experts[p, o])

Only the positions of the window that some expert has cost anything. There are two forms:

- *mixed*: the sum of the experts first, then one convolution with it. A panel, the kernel of a
  block of output channels over a block of input channels, is mixed right before all tiles of the
  picture use it, in the first-level cache, from experts that were asked for while the panel before
  was used; so the mixed kernel never gets to memory. Where they fit the second-level cache, all
  panels can be mixed first, and each tile meets them all. Costs the union of the masks for each
  pixel, and reading their sum for each image.
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
    """Vectors of a tile, output channels of a tile, input channels of a block; the form.

    With `tiles_outside` (mixed form) all panels are mixed before the first tile.
    """

    rows: int
    cols: int
    out_block: int
    in_block: int
    shared: bool = False
    tiles_outside: bool = False

    def __str__(self) -> str:
        form = "shared" if self.shared else "tiles outside" if self.tiles_outside else "mixed"
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
class _Requests:
    """What to ask for during a turn."""

    ahead: Ahead
    experts: Any
    panel: Any
    turn: Any


@dataclass(frozen=True)
class _Scaled:
    """An expert, its positions, and all shares."""

    expert: int
    positions: tuple[int, ...]
    shares: Any


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
    def panel(self) -> int:
        """Weights of one position, or of one of its experts, in a panel."""
        return self.config.in_block * self.config.out_block

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
            elif self.config.tiles_outside:
                self._tiles_outside(ops, experts, shares)
            else:
                self._mixed(ops, experts, shares)
            emit.write_halo(y, views.y, w.batch, k.threads)
        return builder.get()

    def _mixed(self, ops: direct._Operands, experts: Any, shares: Any) -> None:
        """Each panel is mixed and meets all tiles."""
        blocks, size = self.out_blocks, len(self.terms.positions) * self.panel
        with T.serial(0, self.k.workload.batch) as image:

            def in_block(q: Any, first: bool, last: bool) -> None:
                with emit.loop(blocks, self.k.threads) as block:
                    panel, number = T.alloc_buffer((max(1, size),), "float32"), q * blocks + block
                    self._mix((panel, 0), experts, shares, image, number)
                    with T.serial(0, self.tiles) as tile:
                        where, step = self._where(image, tile), direct._Step(0, q, first, last)
                        ahead = self._ahead(experts, number, tile, self.tiles)
                        self._product(ops, (panel, 0), where, step, block, ahead)

            emit.peeled(self.k.in_blocks, in_block)

    def _tiles_outside(self, ops: direct._Operands, experts: Any, shares: Any) -> None:
        """All panels are mixed, and each tile meets them all."""
        blocks, size = self.out_blocks, len(self.terms.positions) * self.panel
        count = self.k.in_blocks * blocks
        with T.serial(0, self.k.workload.batch) as image:
            panels = T.alloc_buffer((max(1, count * size),), "float32")
            with emit.loop(count, self.k.threads) as number:
                self._mix((panels, number * size), experts, shares, image, number)
            with emit.loop(self.tiles, self.k.threads) as tile:
                where = self._where(image, tile)

                def in_block(q: Any, first: bool, last: bool) -> None:
                    step = direct._Step(0, q, first, last)
                    with T.serial(0, blocks) as block:
                        at = (q * blocks + block) * size
                        self._product(ops, (panels, at), where, step, block)

                emit.peeled(self.k.in_blocks, in_block)

    def _product(
        self,
        ops: direct._Operands,
        panel: tuple[Any, Any],
        where: direct._Where,
        step: direct._Step,
        block: Any,
        ahead: _Requests | None = None,
    ) -> None:
        """Add a mixed panel's part to one tile of its output channels."""
        (weights, first_weight), k = panel, self.k
        at, channels = self._outputs(where, block)
        outputs = list(zip(at, channels, strict=True))
        sums = [k.load(ops, a, where, channel, step.first) for a, channel in outputs]
        reads = self._inputs(where, step.q)
        for c in self._channels(ahead):
            for i, position in enumerate(self.terms.positions):
                weight_at = first_weight + i * self.panel + c * self.config.out_block
                k.multiply(sums, (weights, weight_at), (ops.x, self._tap(reads, c, position)))
        for a, total in zip(at, sums, strict=True):
            k.store(ops.y, a, total, step.last)

    def _mix(
        self, panel: tuple[Any, Any], experts: Any, shares: Any, image: Any, number: Any
    ) -> None:
        """Each position of a panel: the sum of the shares of its experts times their weights."""
        (target, begin), size = panel, self.panel
        out_block, lanes = self.config.out_block, self.k.lanes
        channel = number % self.out_blocks * out_block
        first = {p: self._share_at(image, p, channel) for p in self.terms.by_expert()}
        factors = {p: repeated(shares, at, out_block, lanes) for p, at in first.items()}
        source = number * self.terms.count * size
        for i, holders in enumerate(self.terms.holders):
            sources = {p: source + n * size for n, p in enumerate(holders)}
            source = source + len(holders) * size
            to = begin + i * size
            with T.serial(0, size // lanes) as v:
                vectors = [
                    factors[p] * experts[emit.ramp(at + v * lanes, lanes)]
                    for p, at in sources.items()
                ]
                T.buffer_store(target, sum_of(vectors), [emit.ramp(to + v * lanes, lanes)])
            with T.serial(0, size % lanes) as rest:
                j = size - size % lanes + rest
                values = [
                    shares[first[p] + j % out_block] * experts[at + j] for p, at in sources.items()
                ]
                T.buffer_store(target, sum_of(values), [to + j])

    def _shared(self, ops: direct._Operands, experts: Any, shares: Any) -> None:
        """Each panel meets all tiles of all images, expert by expert."""
        batch, every = self.k.workload.batch, self.terms.by_expert()

        def in_block(q: Any, first: bool, last: bool) -> None:
            with emit.loop(self.out_blocks, self.k.threads) as block:
                number = q * self.out_blocks + block
                with T.serial(0, batch) as image, T.serial(0, self.tiles) as tile:
                    where, turns = self._where(image, tile), batch * self.tiles * len(every)
                    begin = number * self.terms.count * self.panel
                    for n, (expert, positions) in enumerate(every.items()):
                        turn = (image * self.tiles + tile) * len(every) + n
                        ahead = self._ahead(experts, number, turn, turns)
                        done = last and n == len(every) - 1
                        step = direct._Step(0, q, first and n == 0, done)
                        scaled = _Scaled(expert, tuple(positions), shares)
                        self._scaled(ops, (experts, begin), where, step, block, scaled, ahead)
                        begin = begin + len(positions) * self.panel

        emit.peeled(self.k.in_blocks, in_block)

    def _scaled(
        self,
        ops: direct._Operands,
        panel: tuple[Any, Any],
        where: direct._Where,
        step: direct._Step,
        block: Any,
        scaled: _Scaled,
        ahead: _Requests,
    ) -> None:
        """Add the part of one expert, times its shares, to one tile of a block of channels."""
        (weights, begin), k, out_block = panel, self.k, self.config.out_block
        at, channels = self._outputs(where, block)
        sums = [emit.accumulators(k.vectors, k.lanes) for _ in channels]
        for total in (vector for row in sums for vector in row):
            emit.assign(total, emit.splat(0.0, k.lanes))
        reads, width = self._inputs(where, step.q), len(scaled.positions) * out_block
        for c in self._channels(ahead):
            for i, position in enumerate(scaled.positions):
                weight_at = begin + c * width + i * out_block
                k.multiply(sums, (weights, weight_at), (ops.x, self._tap(reads, c, position)))
        for a, channel, row in zip(at, channels, sums, strict=True):
            values = k.initial(ops, a, where, channel) if step.first else k.so_far(ops.y, a)
            share = scaled.shares[self._share_at(where.image, scaled.expert, channel)]
            for total, value in zip(row, values, strict=True):
                emit.assign(total, value + emit.splat(share, k.lanes) * emit.value_of(total))
            k.store(ops.y, a, row, step.last)

    def _ahead(self, experts: Any, number: Any, turn: Any, turns: int) -> _Requests:
        """Requests for the panel after this one, of which each of the turns makes its part."""
        per_channel = max(1, self.terms.count) * self.config.out_block
        ahead = Ahead.of(self.config.in_block, per_channel, turns)
        return _Requests(ahead, experts, number * self.terms.count * self.panel, turn)

    def _channels(self, requests: _Requests | None) -> Iterator[Any]:
        """Loops over the input channels of a block, asking for weights on the way."""
        if requests is None:
            with T.serial(0, self.config.in_block) as c:
                yield c
            return
        channels = requests.ahead.channels
        with T.serial(0, self.config.in_block // channels) as part:
            requests.ahead.emit(requests.experts, requests.panel, requests.turn, part)
            with T.serial(0, channels) as within:
                yield part * channels + within

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
