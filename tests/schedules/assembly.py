"""The loops in what LLVM makes of a kernel."""

from __future__ import annotations

import re
from typing import Any

import tvm

from tests.schedules.building import NAME
from topiarist.targets.spec import TargetSpec

COMMENT = re.compile(r"\s*(//|@|#).*")


def assembly_of(function: Any, target: TargetSpec) -> str:
    """The assembly of the function called NAME."""
    module = tvm.IRModule({NAME: function})
    built = tvm.compile(module, target=tvm.target.Target(target.tvm_target))
    assembly: str = built.mod.inspect_source("asm")
    return assembly[assembly.index(f"{NAME}_compute_:") :].split(".Lfunc_end")[0]


def innermost(assembly: str, branch: str) -> list[list[str]]:
    """The instructions of each innermost loop; branches begin with `branch`."""
    loops = []
    for block in re.split(r"^(?=\.LBB)", assembly, flags=re.MULTILINE):
        label, *rest = block.splitlines()
        lines = [COMMENT.sub("", line).strip() for line in rest if re.match(r"\s+[a-z]", line)]
        back = re.compile(rf"{branch}.*\s{re.escape(label.split(':')[0])}$")
        end = next((i for i, line in enumerate(lines) if back.match(line)), 0)
        if end:
            loops.append(lines[:end])
    return loops
