"""LLVM knows the levels that the profiles name, and uses their vectors and fused multiply-add."""

from __future__ import annotations

import re

import pytest
import tvm
from tvm.script import from_source
from tvm.script import tirx as T

from topiarist.targets import registry

SOURCE = """
@T.prim_func
def k(a: T.handle, b: T.handle, c: T.handle):
    T.func_attr({{"global_symbol": "k"}})
    A = T.match_buffer(a, (256,), "float32")
    B = T.match_buffer(b, (256,), "float32")
    C = T.match_buffer(c, (256,), "float32")
    for i in T.serial({count}):
        C[T.ramp(i * {lanes}, 1, {lanes})] = C[T.ramp(i * {lanes}, 1, {lanes})] + A[
            T.ramp(i * {lanes}, 1, {lanes})
        ] * T.broadcast(B[i], {lanes})
"""


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("x86-sse4", r"mulps\s.*%xmm"),
        ("x86-avx2", r"vfmadd\w+ps\s.*%ymm"),
        ("x86-avx512", r"vfmadd\w+ps\s.*%zmm"),
        ("rpi4", r"fmla\s+v\d+\.4s"),
        ("armv7", r"v(fma|mla)\.f32\s+q"),
    ],
)
def test_explicit_vectors_reach_the_assembly(name: str, instruction: str) -> None:
    spec = registry.get(name)
    source = SOURCE.format(lanes=spec.lanes, count=256 // spec.lanes)
    module = tvm.IRModule({"k": from_source(source, extra_vars={"T": T})})
    built = tvm.compile(module, target=tvm.target.Target(spec.tvm_target))
    assembly = built.mod.inspect_source("asm")
    assert re.search(instruction, assembly), assembly
