"""Sparse convolution whose code holds the weights: one instruction for each nonzero.

After SparseRT (Wang, PACT 2020). A thread has one or a few neighbouring rows' pixels of `channels`
output channels in its registers. It loads an input value once and multiplies it with the weight of
every channel that has a nonzero there; weights and the places of the input values are constants in
the instructions. With 64 channels at 90 % zeros a load feeds six multiply-adds, where the generic
kernel for scattered zeros loads a value for each.

The bodies, one for each block of channels and each of the threads that split its columns, are
inline PTX: NVIDIA's compiler takes ten times as long to get there from C.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import argument, prim_func
from topiarist.schedules.cuda.thread import (
    CudaConfig,
    Loops,
    each_thread,
    refuses_place,
    tap_offsets,
)
from topiarist.schedules.kernel import ConvViews
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.cuda import WARP

# Multiply-adds in the code. So many are a megabyte, eight times the instruction cache of a
# multiprocessor (128 KB: Jia et al., 2018), and NVIDIA's assembler takes 15 to 20 s.
MOST_CODE = 65536
# Loads on their way while others' values are used. Left alone, NVIDIA's assembler loads about 20
# instructions ahead (64 channels, 90 % zeros); with these 140, or 25 where it saves registers.
AHEAD = 16


def refuses(workload: ConvWorkload) -> str | None:
    """Why a layer's nonzeros should not become code, None where they may."""
    count = code_of(workload, pixels=1)
    if count > MOST_CODE:
        return f"{count} nonzeros are too many to be compiled in, above {MOST_CODE}"
    return None


def code_of(workload: ConvWorkload, pixels: int) -> int:
    """Multiply-adds in the code of all channels."""
    w = workload
    taps = w.in_channels // w.groups * math.prod(w.kernel)
    return round(w.sparsity.density * w.out_channels * taps) * pixels


def refuses_config(workload: ConvWorkload, config: CudaConfig, views: ConvViews) -> str | None:
    """Why a configuration can't run between these layouts, None where it can."""
    if config.chunk or config.quads:
        return "offsets and weights are in the code: nothing is staged, and no quads are loaded"
    if config.threads % WARP:
        return f"{config.threads} threads with the same code are no whole warps"
    return refuses_place(workload, config, views)


@dataclass(frozen=True)
class Code:
    """What a thread with a part of a row's columns does: loads, each with its multiply-adds.

    `offsets` of the loads in the input rise; `ends` says where in `sums` (accumulators) and
    `weights` the multiply-adds of each load end.
    """

    offsets: NDArray[np.int64]
    ends: NDArray[np.int64]
    sums: NDArray[np.int64]
    weights: NDArray[np.float32]

    def instructions(self, inputs: int) -> Iterator[str]:
        """As PTX; the operand after the `inputs` accumulators is the address of the pixel."""
        yield f"{{.reg .f32 v<{AHEAD}>; .reg .b64 p; cvta.to.global.u64 p, %{inputs};"
        loads = [
            f"ld.global.nc.f32 v{i % AHEAD}, [p+{4 * offset}];"
            for i, offset in enumerate(self.offsets.tolist())
        ]
        yield from loads[:AHEAD]
        start = 0
        for load, end in enumerate(self.ends.tolist()):
            for i in range(start, end):
                bits = struct.pack(">f", self.weights[i]).hex()
                yield f"fma.rn.f32 %{self.sums[i]}, v{load % AHEAD}, 0f{bits}, %{self.sums[i]};"
            yield from loads[load + AHEAD : load + AHEAD + 1]
            start = end
        yield "}"


def codes(k: Loops, weight: NDArray[np.float32]) -> list[Code]:
    """Of every row of blocks and every part of its columns, in this order."""
    c, layout = k.config, k.views.x.layout
    blocks = weight.reshape(k.rows, c.channels, k.taps)
    taps = tap_offsets(k.workload, layout).ravel()
    found: list[Code] = []
    steps = np.arange(c.pixels) * k.workload.strides[0] * layout.row_vectors
    for row, block in enumerate(blocks):
        group = row * c.channels // k.group_out * k.group_in * layout.channel_stride
        channel, tap = np.nonzero(block)
        offsets = (group + taps[tap][:, None] + steps).ravel()
        sums = (channel[:, None] * c.pixels + np.arange(c.pixels)).ravel()
        weights = np.repeat(block[channel, tap], c.pixels)
        order = np.argsort(offsets, kind="stable")
        found += _parts(c.split, offsets[order], sums[order], weights[order])
    return found


def _parts(
    count: int, offsets: NDArray[np.int64], sums: NDArray[np.int64], weights: NDArray[np.float32]
) -> Iterator[Code]:
    """Multiply-adds by rising offsets, cut between loads into parts of about equal size."""
    loads, first = np.unique(offsets, return_index=True)
    ends = np.append(first[1:], len(offsets))[: len(loads)]
    cost = ends + np.arange(1, len(loads) + 1)
    whole = int(cost[-1]) if len(cost) else 0
    cuts = np.searchsorted(cost, [whole * part / count for part in range(count + 1)], "right")
    cuts[0], cuts[-1] = 0, len(loads)
    for low, high in itertools.pairwise(cuts.tolist()):
        start = int(first[low]) if low < high else 0
        stop = int(ends[high - 1]) if low < high else 0
        yield Code(loads[low:high], ends[low:high] - start, sums[start:stop], weights[start:stop])


def source_of(name: str, found: list[Code], sums: int) -> str:
    """A function in CUDA C that runs one of the codes on `sums` accumulators."""
    outputs = ", ".join(f'"+f"(s[{i}])' for i in range(sums))
    lines = [
        f"__device__ __forceinline__ void {name}(const float* x, float* s, int part) {{",
        "switch (part) {",
    ]
    for part, code in enumerate(found):
        lines.append(f"case {part}: asm(")
        lines += [f'"{instruction}"' for instruction in code.instructions(sums)]
        lines.append(f': {outputs} : "l"(x)); break;')
    return "\n".join([*lines, "}", "}", ""])


def make_prim_func(k: Loops, name: str, weight: NDArray[np.float32]) -> Any:
    """f(x, bias[, residual], y) for one weight [O, C / groups, kh, kw]."""
    function = f"{name}_code"
    source = source_of(function, codes(k, weight), k.config.sums)
    with prim_func(name) as builder:
        x = argument("x", k.workload.batch * k.views.x.layout.size)
        with each_thread(k) as thread:
            pixel, first = T.address_of(x[thread.place.x]), T.address_of(thread.sums[0])
            part = thread.row * k.config.split + thread.ty
            T.evaluate(T.cuda.func_call(function, pixel, first, part, source_code=source))
    return builder.get()
