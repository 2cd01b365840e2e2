"""Which buffers share memory: two buffers may when no call needs both."""

from __future__ import annotations

from dataclasses import dataclass

from topiarist.compiler.program import Program

ALIGNMENT = 64


@dataclass(frozen=True)
class MemoryPlan:
    """`storage_of[buffer]` is an index into `sizes` (bytes); outputs share with nothing."""

    storage_of: dict[str, int]
    sizes: tuple[int, ...]


def plan_memory(program: Program) -> MemoryPlan:
    """Reuse freed storage, the smallest that is large enough first, else the largest, grown."""
    given = {ref.buffer for ref in program.inputs}
    kept = {ref.buffer for ref in program.outputs}
    size, last = _sizes_and_last_uses(program)
    storage_of: dict[str, int] = {}
    sizes: list[int] = []
    free: list[int] = []
    for i, call in enumerate(program.calls):
        name = call.output.buffer
        if name not in storage_of and name not in given:
            storage_of[name] = _take(size[name], sizes, [] if name in kept else free)
        for ref in dict.fromkeys(r.buffer for r in (*call.reads, call.output)):
            if last[ref] == i and ref in storage_of and ref not in kept:
                free.append(storage_of[ref])
    return MemoryPlan(storage_of, tuple(sizes))


def _sizes_and_last_uses(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    size: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, call in enumerate(program.calls):
        for ref in (*call.reads, call.output):
            size[ref.buffer] = max(size.get(ref.buffer, 0), ref.bytes)
            last[ref.buffer] = i
    return size, last


def _take(need: int, sizes: list[int], free: list[int]) -> int:
    need = -(-need // ALIGNMENT) * ALIGNMENT
    fitting = [s for s in free if sizes[s] >= need]
    if fitting:
        chosen = min(fitting, key=lambda s: sizes[s])
    elif free:
        chosen = max(free, key=lambda s: sizes[s])
        sizes[chosen] = need
    else:
        sizes.append(need)
        return len(sizes) - 1
    free.remove(chosen)
    return chosen
