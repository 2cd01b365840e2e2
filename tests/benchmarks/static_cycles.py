"""Cycles of a kernel without running it: llvm-mca's for its loops, times how often they run.

llvm-mca reads everything from the first-level cache and predicts every branch, so these are the
fewest cycles that the code can take. A visit to a sparse row is charged a mispredicted end.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import tvm

from topiarist.schedules.kernel import ConvKernel, ConvSite

MCA = "llvm-mca-19"
ITERATIONS = 100
NAME = "kernel"
MISPREDICTED = 15.0  # cycles, of the cores looked at about the same
SUM = re.compile(r"(fmla|vfmadd\w+ps)\s")
MOVE = re.compile(r"v?f?(add|sub)(ps)?\s+(v|%)")
BRANCH = re.compile(r"[bj]\S*\s+(?:\S+,\s*)*(\.LBB\w+)$")
COMMENT = re.compile(r"\s*(//|#\s).*")


def need_mca() -> None:
    """End the program where llvm-mca is not installed."""
    if shutil.which(MCA) is None:
        raise SystemExit(f"needs {MCA}, of Debian's package llvm-19")


@dataclass(frozen=True)
class Loop:
    """An innermost loop's instructions, and those of the loop around it that are not in it."""

    inner: tuple[str, ...]
    around: tuple[str, ...]

    @property
    def sums(self) -> int:
        """Multiply-adds of whole vectors."""
        return sum(SUM.match(line) is not None for line in self.inner)

    @property
    def transforms(self) -> bool:
        """Whether it only adds and subtracts, but for a few multiplications by constants."""
        return sum(MOVE.match(line) is not None for line in self.inner) > self.sums


@dataclass(frozen=True)
class Core:
    """llvm-mca's names of a processor."""

    triple: str
    mcpu: str

    def cycles(self, lines: Sequence[str]) -> float:
        """Of one of many repetitions."""
        return _mca(self.triple, self.mcpu, tuple(lines)) if lines else 0.0


@lru_cache(maxsize=1 << 12)
def _mca(triple: str, mcpu: str, lines: tuple[str, ...]) -> float:
    text = "\n".join(line for line in lines if not BRANCH.match(line))
    command = [MCA, f"-mtriple={triple}", f"-mcpu={mcpu}", f"-iterations={ITERATIONS}"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert found is not None, done.stderr
    return int(found[1]) / ITERATIONS


def innermost(assembly: str) -> list[Loop]:
    """The innermost loops: from a label to the last branch back to it."""
    lines, labels = [], {}
    for text in assembly[assembly.index(f"{NAME}_compute_:") :].split(".Lfunc_end")[0].splitlines():
        line = COMMENT.sub("", text).rstrip()
        if line.startswith(".LBB"):
            labels[line.split(":")[0]] = len(lines)
        elif re.match(r"\s+[a-z]", line):
            lines.append(line.strip())
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        if (back := BRANCH.match(line)) and labels.get(back[1], i + 1) <= i:
            ends[labels[back[1]]] = i + 1
    found = []
    for start, end in ends.items():
        if any(start < other < end for other in ends):
            continue
        outer = [(a, b) for a, b in ends.items() if a < start and b > end]
        a, b = min(outer, key=lambda region: region[1] - region[0], default=(start, end))
        found.append(Loop(tuple(lines[start:end]), (*lines[a:start], *lines[end:b])))
    return found


@dataclass(frozen=True)
class Count:
    """What a kernel takes; `sums` are multiply-adds of vectors."""

    cycles: float
    instructions: float
    sums: int


def count(kernel: ConvKernel[Any], site: ConvSite, config: Any, weight: Any, core: Core) -> Count:
    """Cycles and instructions of a kernel; of a dense one only those of its innermost loops."""
    function = kernel.prim_func(site, config, NAME)
    target = tvm.target.Target(site.target.tvm_target)
    loops = innermost(tvm.compile(tvm.IRModule({NAME: function}), target).mod.inspect_source("asm"))
    products = [loop for loop in loops if loop.sums and not loop.transforms]
    transforms = [loop for loop in loops if loop.transforms]
    grid = site.views.y.layout.grid
    vectors = grid.rows * grid.cols
    if kernel.sparse:
        _, offsets, starts, _ = kernel.pack(site, config, weight)
        sums = (offsets.size - 1) * config.out_block * vectors
        visits = (starts.size - 1) * vectors // (config.rows * config.cols)

        def total(of: Callable[[Sequence[str]], float], end: float) -> float:
            # Blocks of channels have loops of their own, and LLVM unrolls with a rest.
            each = median(of(loop.inner) / loop.sums for loop in products)
            visit = median(of(loop.around) for loop in products if loop.around)
            return sums * each + visits * (visit + end)

    else:
        tiles, sums = 0, weight.size * vectors
        if kernel.name == "winograd_dense":
            tiles = -(-grid.rows // config.rows) * -(-grid.cols // config.cols)
            sums = (config.rows + 2) * (config.cols + 2) * tiles * weight[..., 0, 0].size

        def total(of: Callable[[Sequence[str]], float], end: float) -> float:
            each = min(of(loop.inner) / loop.sums for loop in products)
            # The transforms of input and output tiles come in this order.
            there, back = (of(transforms[i].inner) if tiles else 0.0 for i in (0, -1))
            return sums * each + tiles * (weight.shape[1] * there + weight.shape[0] * back)

    return Count(total(core.cycles, MISPREDICTED), total(len, 0.0), sums)
