"""What kernels and their estimates have to know of a core, from the target's data."""

from __future__ import annotations

from dataclasses import dataclass

from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class Core:
    """A processor core as far as kernels differ for it; times are in its cycles.

    Code: with `lane_fma` a multiply-add takes one lane of a vector of weights. With `opaque_base`
    LLVM is kept from putting large constants into addresses, where instructions have no room for
    them. `operands` are the registers that a tile of one output channel needs beside its sums. With
    `line_requests` there is one request per cache line that is asked for ahead, otherwise one per
    vector.

    Estimates: `far_bytes` come in a cycle from beyond the second-level cache, `nonzero_bytes` from
    there with every nonzero.
    """

    lane_fma: bool
    opaque_base: bool
    operands: int
    line_requests: bool
    tile_vectors: int  # of a tile in memory: larger ones spread a channel over more cache lines
    cycles_per_us: float
    load: float  # a vector of the input that serves one multiply-add
    l2_load: float  # beyond that, from the second-level cache
    fma: float  # a multiply-add of registers
    nonzero: float  # index and weight of one nonzero
    visit: float  # per vector of a tile, which a visit to a row loads and stores
    turn: float  # beyond that, to a row: its loop starts, and ends unforeseen
    dense_fma: float
    dense_load: float
    exposed: float  # share of dense loads that multiply-adds do not hide
    latency: float  # of a multiply-add
    transform: float  # of Winograd's, per vector
    far_bytes: float
    nonzero_bytes: float
    weights_per_us: float  # of dense fully connected layers, which read each once


# Fitted to 500 timed configurations of 16 layers at 90 % zeros with 16 lanes, at a nominal clock.
_X86 = Core(
    lane_fma=False,
    opaque_base=False,
    operands=2,
    line_requests=False,
    tile_vectors=14,
    cycles_per_us=3000.0,
    load=1.0,
    l2_load=0.7,
    fma=0.55,
    nonzero=1.2,
    visit=3.0,
    turn=0.0,
    dense_fma=0.5,
    dense_load=0.5,
    exposed=0.0,
    latency=4.0,
    transform=3.0,
    far_bytes=8.0,
    nonzero_bytes=0.0,  # `nonzero` has them
    weights_per_us=4000.0,
)


_CLOCK_GHZ = 1.5  # where nobody told
_BANDWIDTH_GBS = 4.0  # likewise: small boards
_MOST_LOADS = 3  # of vectors in a cycle: some cores multiply more than they load


def core_of(target: TargetSpec) -> Core:
    """The core of a target; its fastest where they differ."""
    return _arm(target) if target.family == "arm" else _X86


def _arm(target: TargetSpec) -> Core:
    """From clock, multiply-adds per cycle and bandwidth; times as llvm-mca has them (docs/arm.md).

    A core that works in order needs registers for loads on their way.
    """
    bandwidth_gbs = target.bandwidth_gbs or _BANDWIDTH_GBS
    clock_ghz = target.clock_ghz or _CLOCK_GHZ
    fma = 1 / (target.fma_per_cycle or 1.0)
    load = max(fma, 1 / _MOST_LOADS)
    in_order = target.out_of_order is False
    tile = target.registers // 2 if in_order else target.registers - 4
    return Core(
        lane_fma=target.lane_fma,
        opaque_base=True,
        operands=target.registers - tile,
        line_requests=True,
        tile_vectors=tile,
        cycles_per_us=clock_ghz * 1000,
        load=1.15 * load if in_order else load,
        l2_load=(2.0 if in_order else 1.0) * load,
        fma=fma,
        nonzero=5.5 if in_order else 2 * load + 1.5,
        visit=2 * load,
        turn=15.0,
        dense_fma=fma,
        dense_load=load,
        exposed=0.1,
        latency=4.0,
        transform=1.5 + 4 * load,
        far_bytes=bandwidth_gbs / clock_ghz,
        nonzero_bytes=6.0,
        weights_per_us=bandwidth_gbs * 1000 / 4,
    )
