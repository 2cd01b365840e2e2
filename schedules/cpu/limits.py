"""Two loops that show what a core can do at best: multiply-adds in registers, and reading.

They are written like the kernels, so that a kernel's share of them is its own doing.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu import emit

# 4 x 3 accumulators, 3 operands and a weight fit 16 registers, and hide a latency of 4 cycles.
WEIGHTS, VECTORS = 4, 3
STEPS = 64  # of the inner loop: its weights stay in the first-level cache
READ_VECTORS = 8


def multiply_adds(repeats: int, lanes: int) -> int:
    """FLOPs of a call of `peak_prim_func`."""
    return 2 * repeats * STEPS * WEIGHTS * VECTORS * lanes


def peak_prim_func(name: str, repeats: int, lanes: int) -> Any:
    """f(x [3 vectors], weights [4 * STEPS], y [12 vectors]): y += weights x, again and again."""
    with emit.prim_func(name) as builder:
        x = emit.argument("x", VECTORS * lanes)
        weights = emit.argument("weights", WEIGHTS * STEPS)
        y = emit.argument("y", WEIGHTS * VECTORS * lanes)
        with T.serial(0, repeats), T.serial(0, STEPS) as j:
            for a in range(WEIGHTS):
                weight = emit.splat(weights[j * WEIGHTS + a], lanes)
                for v in range(VECTORS):
                    at = emit.ramp((a * VECTORS + v) * lanes, lanes)
                    read = x[emit.ramp(v * lanes, lanes)]
                    T.buffer_store(y, y[at] + weight * read, [at])
    return builder.get()


def read_prim_func(name: str, size: int, lanes: int) -> Any:
    """f(x [size], y [8 vectors]): y += x, in order; `size` is a multiple of 8 vectors."""
    step = READ_VECTORS * lanes
    with emit.prim_func(name) as builder:
        x = emit.argument("x", size)
        y = emit.argument("y", step)
        with T.serial(0, size // step) as j:
            for v in range(READ_VECTORS):
                at = emit.ramp(v * lanes, lanes)
                T.buffer_store(y, y[at] + x[emit.ramp(j * step + v * lanes, lanes)], [at])
    return builder.get()
