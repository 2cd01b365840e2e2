"""What LLVM, as TVM brings it, knows of processors."""

from __future__ import annotations

from functools import cache


@cache
def processors(triple: str) -> frozenset[str]:
    """LLVM's names of the processors of a triple; takes seconds, for TVM is imported."""
    import tvm
    from tvm.target import codegen

    target = tvm.target.Target({"kind": "llvm", "mtriple": triple})
    return frozenset(str(name) for name in codegen.llvm_get_cpu_archlist(target))
