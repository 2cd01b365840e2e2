"""Pieces of TIR that all CPU kernels are written with.

Kernels work on flat one-dimensional buffers whose layout is known when they are generated, and on
whole aligned vectors. Two rules come from the compiler and are kept everywhere: what is to stay in
registers over a loop lives in `accumulators`, and serial loops start at zero (TVM 0.27 drops the
lower bound of an outer loop around a loop with a dynamic bound).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.layout import View, halo_fixes

Clamp = tuple[float | None, float | None]


@contextmanager
def prim_func(name: str) -> Iterator[IRBuilder]:
    """The frame of a kernel; `builder.get()` yields the PrimFunc after the block."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        yield builder


def argument(name: str, size: int | tirx.Var, dtype: str = "float32") -> Any:
    """A flat buffer argument; a symbolic size lets layers of other density share the kernel."""
    return T.arg(name, tirx.decl_buffer((size,), dtype, name))


def symbol(name: str) -> tirx.Var:
    """A buffer size that is known only at run time."""
    return tirx.Var(name, "int32")


def ramp(at: Any, lanes: int) -> Any:
    """The index of `lanes` consecutive values."""
    return T.ramp(at, 1, lanes)


def splat(value: Any, lanes: int) -> Any:
    """One value in all lanes."""
    return T.broadcast(T.float32(value) if isinstance(value, float | int) else value, lanes)


def splats(buffer: Any, at: Any, count: int, lanes: int, by_lane: bool) -> list[Any]:
    """`count` consecutive values, each in all lanes.

    `by_lane`: whole vectors are read at once, and each use picks one of their lanes, which 64-bit
    ARM's multiply-adds do by themselves.
    """
    if not by_lane:
        return [splat(buffer[at + a], lanes) for a in range(count)]
    whole = count - count % lanes
    read = [T.bind(buffer[ramp(at + first, lanes)]) for first in range(0, whole, lanes)]
    picked = [tirx.Shuffle([read[a // lanes]], [a % lanes]) for a in range(whole)]
    return [splat(value, lanes) for value in picked + [buffer[at + a] for a in range(whole, count)]]


def gather(buffer: Any, base: Any, index: Any, lanes: int, fill: float = 0.0) -> Any:
    """buffer[base + index] for a vector of int32; `fill` in lanes with a negative index.

    TVM would read lane by lane; AVX-512 (16 lanes) and AVX2 (8 lanes) have an instruction.
    """
    other = splat(fill, lanes)
    inside = index >= splat(T.int32(0), lanes)
    at = T.address_of(buffer[base])
    if lanes == 16:
        name = "llvm.x86.avx512.mask.gather.dps.512"
        return T.call_llvm_intrin("float32x16", name, other, at, index, inside, T.int32(4))
    if lanes == 8:
        name = "llvm.x86.avx2.gather.d.ps.256"
        mask = tirx.Select(inside, splat(-1.0, lanes), splat(0.0, lanes))  # the sign bit counts
        return T.call_llvm_intrin("float32x8", name, other, at, index, mask, T.int8(4))
    read = buffer[splat(base, lanes) + T.max(index, splat(T.int32(0), lanes))]
    return tirx.Select(inside, read, other)


def clamp(value: Any, bounds: Clamp, lanes: int) -> Any:
    """min(max(value, low), high) on a vector."""
    low, high = bounds
    if low is not None:
        value = T.max(value, splat(low, lanes))
    if high is not None:
        value = T.min(value, splat(high, lanes))
    return value


def accumulators(count: int, lanes: int) -> list[Any]:
    """Vectors that LLVM keeps in registers.

    They are small allocations of global scope, which TVM puts on the stack when they have less
    than a kilobyte, and each is a buffer of its own, so that stores to one do not make LLVM reload
    another. In the scope `local` they would come from the heap.
    """
    return [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(count)]


def value_of(accumulator: Any) -> Any:
    """The vector that an accumulator holds."""
    return accumulator[ramp(0, int(accumulator.shape[0]))]


def assign(accumulator: Any, value: Any) -> None:
    """Set an accumulator."""
    T.buffer_store(accumulator, value, [ramp(0, int(accumulator.shape[0]))])


def prefetch(buffer: Any, at: Any, level: int = 1) -> None:
    """Ask for the cache line of buffer[at], which may lie past the end, into a cache's level."""
    read, locality, data = T.int32(0), T.int32(4 - level), T.int32(1)
    address = T.address_of(buffer[at])
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, read, locality, data))


def loop(extent: Any, threads: int = 1) -> Any:
    """A loop, over threads when there are several."""
    return T.parallel(0, extent) if threads > 1 else T.serial(0, extent)


def peeled(count: int, body: Callable[[Any, bool, bool], None]) -> None:
    """body(index, first, last) in turn; the first and the last are code of their own."""
    if count == 1:
        body(0, True, True)
        return
    body(0, True, False)
    if count > 2:
        with T.serial(0, count - 2) as i:
            body(i + 1, False, False)
    body(count - 1, False, True)


def masked_store(buffer: Any, at: Any, value: Any, count: int, lanes: int) -> None:
    """Store the first `count` lanes of a vector."""
    inside = T.ramp(0, 1, lanes) < splat(T.int32(count), lanes)
    address = T.address_of(buffer[at])
    T.evaluate(T.call_llvm_intrin("void", "llvm.masked.store", value, address, inside))


def write_halo(y: Any, view: View, batch: int, threads: int) -> None:
    """Set the halo and the lanes past the picture of the view's channels (padded layouts)."""
    layout = view.layout
    fixes = halo_fixes(layout)
    if not fixes:
        return
    lanes = layout.grid.lanes
    column = layout.offset(0, 1) - layout.offset(0, 0)
    row = layout.offset(1, 0) - layout.offset(0, 0)
    fill = splat(layout.fill, lanes)
    with loop(batch * view.count, threads) as p:
        base = view.at(p // view.count, p % view.count)
        for fix in fixes:
            target = base + layout.offset(fix.row, fix.col)
            source = base + layout.offset(fix.source_row, fix.source_col)
            with T.serial(0, fix.rows) as r, T.serial(0, fix.cols) as c:
                step = r * row + c * column
                if all(pick < 0 for pick in fix.pick):
                    value = fill
                else:
                    picked = [pick if pick >= 0 else lanes for pick in fix.pick]
                    value = tirx.Shuffle([y[ramp(source + step, lanes)], fill], picked)
                T.buffer_store(y, value, [ramp(target + step, lanes)])
