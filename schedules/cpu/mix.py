"""Mixing the kernels of a dynamic convolution: values[n] = sum_p shares[n, p, o] * experts[p, o].

The mixed values come in the order that the convolution reads them (`direct.pack_sparse`): visits
to `block` output channels in a block of input channels, and in each visit one position of the
window after the other. Experts differ in the positions that they have, so a position is a
*segment* of each visit, mixed from those experts alone that have it: what is read is the sum of
the masks, what is written their union.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import direct, emit
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernel import ConvSite

FloatArray = NDArray[np.float32]
FULL = 0.75  # share of nonzeros in the experts' positions, from which on positions are whole


@dataclass(frozen=True)
class Support:
    """Where mixed kernels have values, and the experts of each segment of a visit."""

    weight: FloatArray  # [O, I, kh, kw]: 1 where there is a value
    segments: tuple[tuple[int, ...], ...]


def support_of(experts: FloatArray) -> Support:
    """Whole positions; all experts' nonzeros in one segment where most of the positions are zeros.

    `experts` is [P, O, I, kh, kw].
    """
    nonzero = experts != 0
    masks = nonzero.any(axis=(1, 2))
    area = masks.sum() * experts.shape[1] * experts.shape[2]
    if np.count_nonzero(nonzero) < FULL * area:
        return Support(nonzero.any(axis=0).astype(np.float32), (tuple(range(len(experts))),))
    weight = np.broadcast_to(masks.any(axis=0), experts.shape[1:]).astype(np.float32)
    at = np.argwhere(masks.any(axis=0))
    segments = tuple(tuple(np.flatnonzero(masks[:, y, x]).tolist()) for y, x in at)
    return Support(weight, segments or ((),))


def pack_experts(
    site: ConvSite, config: DirectConfig, experts: FloatArray, support: Support
) -> FloatArray:
    """Visit by visit, segment by segment: the values of each of the segment's experts."""
    loops = direct.make_kernel(site, config)
    assert loops is not None  # the convolution has been packed
    weight = support.weight
    number = np.arange(1, weight.size + 1).reshape(weight.shape) * (weight != 0)
    order, _, starts, _ = direct.in_visits(loops, number)
    flat = np.pad(experts.reshape(len(experts), -1), ((0, 0), (1, 0)))  # 0 where nothing is
    parts = [np.zeros(1, np.float32)]  # an empty buffer is none
    for begin, end in itertools.pairwise(starts * config.out_block):
        segments = order[begin:end].reshape(len(support.segments), -1)
        for numbers, members in zip(segments, support.segments, strict=True):
            parts += [flat[expert, numbers] for expert in members]
    return np.concatenate(parts[1:] + parts[:1])


@dataclass(frozen=True)
class MixShape:
    """What the code depends on; visits are as many as there are in an image."""

    batch: int
    experts: int
    channels: int
    block: int
    visits: int
    segments: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(site: ConvSite, config: DirectConfig, experts: int, support: Support) -> MixShape:
        """Of a layer in its place."""
        w = site.workload
        blocks = -(-w.in_channels // config.in_block)
        visits = blocks * (w.out_channels // config.out_block)
        return MixShape(
            w.batch, experts, w.out_channels, config.out_block, visits, support.segments
        )


def mix_prim_func(name: str, shape: MixShape, lanes: int, threads: int) -> Any:
    """f(shares [N, P, O], experts, starts, order, values): `starts`, `order` of the convolution."""
    with emit.prim_func(name) as builder:
        shares = emit.argument("shares", shape.batch * shape.experts * shape.channels)
        experts = emit.argument("experts", emit.symbol("expert_count"))
        starts = emit.argument("starts", shape.visits + 1, "int32")
        order = emit.argument("order", shape.visits, "uint16")
        values = emit.argument("values", emit.symbol("count"))
        with emit.loop(shape.batch * shape.visits, threads) as at:
            image, visit = at // shape.visits, at % shape.visits
            begin = T.bind(starts[visit])
            length = T.bind(
                (starts[visit + 1] - begin) * shape.block // T.int32(len(shape.segments))
            )
            row = T.bind(T.cast(order[visit], "int32"))
            every = sum(len(members) for members in shape.segments)
            source = T.bind(begin * shape.block // len(shape.segments) * every)
            target = T.bind((image * starts[shape.visits] + begin) * shape.block)
            used = sorted({expert for members in shape.segments for expert in members})
            at_share = {p: (image * shape.experts + p) * shape.channels + row for p in used}
            factors = {p: _factor(shares, at_share[p], shape.block, lanes) for p in used}
            terms = 0
            for segment, members in enumerate(shape.segments):
                sources = [source + (terms + k) * length for k in range(len(members))]
                terms += len(members)
                if not members:
                    continue
                segment_at = target + segment * length
                whole = T.bind(length // lanes)
                with T.serial(0, whole) as i:
                    total = _total(
                        [factors[p] for p in members],
                        [experts[emit.ramp(s + i * lanes, lanes)] for s in sources],
                    )
                    T.buffer_store(values, total, [emit.ramp(segment_at + i * lanes, lanes)])
                with T.serial(0, length - whole * lanes) as j:
                    last = whole * lanes + j
                    total = _total(
                        [shares[at_share[p] + j % shape.block] for p in members],
                        [experts[s + last] for s in sources],
                    )
                    T.buffer_store(values, total, [segment_at + last])
    return builder.get()


def _factor(shares: Any, at: Any, block: int, lanes: int) -> Any:
    """The shares of `block` neighbouring channels, over and over."""
    if block == 1:
        return T.bind(emit.splat(shares[at], lanes))
    read = T.bind(shares[emit.ramp(at, block)])
    if block >= lanes:
        return read
    return T.bind(tirx.Shuffle([read] * (lanes // block), list(range(lanes))))


def _total(factors: list[Any], terms: list[Any]) -> Any:
    total = factors[0] * terms[0]
    for factor, term in zip(factors[1:], terms[1:], strict=True):
        total = total + factor * term
    return total
