"""Mixing nonzeros: values[n] = sum_p shares[n, p, o] * experts[p], for a sparse convolution.

Where experts have zeros all over, their sum is a sparse weight whose values are computed at run
time, in the order in which the convolution visits them (`direct.in_visits`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import direct, emit
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.cpu.dynamic import repeated, sum_of
from topiarist.schedules.kernel import ConvSite

FloatArray = NDArray[np.float32]


def pack_experts(
    site: ConvSite, config: DirectConfig, experts: FloatArray, weight: FloatArray
) -> FloatArray:
    """[visit][expert][value]. `experts` is [P, O, I, kh, kw], `weight` not 0 where any is."""
    loops = direct.make_kernel(site, config)
    assert loops is not None  # the convolution has been packed
    number = np.arange(1, weight.size + 1).reshape(weight.shape) * (weight != 0)
    order, _, starts, _ = direct.in_visits(loops, number)
    flat = np.pad(experts.reshape(len(experts), -1), ((0, 0), (1, 0)))  # 0 where nothing is
    visits = itertools.pairwise(starts * config.out_block)
    parts = [flat[:, order[begin:end]].ravel() for begin, end in visits]
    return np.append(np.concatenate(parts), np.float32(0))  # an empty buffer is none


@dataclass(frozen=True)
class MixShape:
    """What the code depends on; visits are as many as there are in an image."""

    batch: int
    experts: int
    channels: int
    block: int
    visits: int

    @staticmethod
    def of(site: ConvSite, config: DirectConfig, experts: int) -> MixShape:
        """Of a layer in its place."""
        w = site.workload
        visits = -(-w.in_channels // config.in_block) * (w.out_channels // config.out_block)
        return MixShape(w.batch, experts, w.out_channels, config.out_block, visits)


def mix_prim_func(name: str, shape: MixShape, lanes: int, threads: int) -> Any:
    """f(shares [N, P, O], experts, starts, order, values): `starts`, `order` of the convolution."""
    with emit.prim_func(name) as builder:
        shares = emit.argument("shares", shape.batch * shape.experts * shape.channels)
        experts = emit.argument("experts", emit.symbol("expert_count"))
        starts = emit.argument("starts", shape.visits + 1, "int32")
        order = emit.argument("order", shape.visits, "uint16")
        values = emit.argument("values", emit.symbol("count"))
        every = range(shape.experts)
        with emit.loop(shape.batch * shape.visits, threads) as at:
            image, visit = at // shape.visits, at % shape.visits
            begin = T.bind(starts[visit] * shape.block)
            length = T.bind(starts[visit + 1] * shape.block - begin)
            target = T.bind(image * starts[shape.visits] * shape.block + begin)
            row = T.bind(T.cast(order[visit], "int32"))
            first = [(image * shape.experts + p) * shape.channels + row for p in every]
            factors = [repeated(shares, share, shape.block, lanes) for share in first]
            sources = [begin * shape.experts + p * length for p in every]
            whole = T.bind(length // lanes)
            with T.serial(0, whole) as v:
                vectors = [
                    factor * experts[emit.ramp(source + v * lanes, lanes)]
                    for factor, source in zip(factors, sources, strict=True)
                ]
                T.buffer_store(values, sum_of(vectors), [emit.ramp(target + v * lanes, lanes)])
            with T.serial(0, length - whole * lanes) as rest:
                j = whole * lanes + rest
                singles = [
                    shares[share + j % shape.block] * experts[source + j]
                    for share, source in zip(first, sources, strict=True)
                ]
                T.buffer_store(values, sum_of(singles), [target + j])
    return builder.get()
