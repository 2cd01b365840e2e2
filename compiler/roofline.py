"""The machine's roofline, measured: multiply-adds of one core, and its reads from beyond L2."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.measure import Timer
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Ref
from topiarist.schedules.cpu import limits
from topiarist.targets.spec import TargetSpec

REPEATS = 200  # of the loop of multiply-adds: some tenths of a millisecond
L2_TIMES = 16  # what is read is so many times larger than the second-level cache
ROUNDS = 8
PAUSE_S = 0.03  # between rounds: something else may be running for a moment


Loop = tuple[str, list[Ref | NDArray[Any]], float]  # function, arguments, units of work


def with_roofline(
    spec: TargetSpec,
    timer: Timer | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> TargetSpec:
    """The specification with `peak_gflops` and `bandwidth_gbs`, timed here on one core.

    The best of several rounds, for they are limits; takes about half a second. Where a
    specification states them, they stay.
    """
    if spec.peak_gflops is not None and spec.bandwidth_gbs is not None:
        return spec
    parts = Parts(spec, 1)
    peak, bandwidth = _rates(parts, [_peak(parts), _read(parts)], timer or Timer(1), sleep)
    return replace(spec, peak_gflops=round(peak, 1), bandwidth_gbs=round(bandwidth, 1))


def _rates(
    parts: Parts, loops: Sequence[Loop], timer: Timer, sleep: Callable[[float], None]
) -> list[float]:
    """Units of work in a nanosecond, the best of all rounds."""
    compiled = parts.compiled([name for name, _, _ in loops])
    least = [float("inf")] * len(loops)
    for i in range(ROUNDS):
        if i:
            sleep(PAUSE_S)
        for j, (name, args, _) in enumerate(loops):
            least[j] = min(least[j], *timer.seconds(compiled[name], args))
    return [work / seconds / 1e9 for (_, _, work), seconds in zip(loops, least, strict=True)]


def _peak(parts: Parts) -> Loop:
    """FLOPs in registers."""
    lanes = parts.target.lanes
    name = parts.function("peak", "peak", lambda name: limits.peak_prim_func(name, REPEATS, lanes))
    weights = np.full(limits.WEIGHTS * limits.STEPS, 1e-3, np.float32)
    x = Ref("x", (limits.VECTORS * lanes,))
    y = Ref("y", (limits.WEIGHTS * limits.VECTORS * lanes,))
    return name, [x, weights, y], limits.multiply_adds(REPEATS, lanes)


def _read(parts: Parts) -> Loop:
    """Bytes from beyond the second-level cache, in order."""
    lanes = parts.target.lanes
    step = limits.READ_VECTORS * lanes
    size = L2_TIMES * parts.target.l2_bytes // 4 // step * step
    name = parts.function("read", "read", lambda name: limits.read_prim_func(name, size, lanes))
    return name, [Ref("far", (size,)), Ref("sums", (step,))], 4 * size
