"""What LLVM makes of the kernels' inner loops, for instruction sets that need not be here."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.schedules.assembly import assembly_of, innermost
from tests.schedules.building import NAME
from tests.schedules.kernel_contract import ConvCase, fitting, make_problem, site_of
from topiarist.schedules.cpu.linear import (
    LinearShape,
    dense_linear_prim_func,
    sparse_linear_prim_func,
)
from topiarist.schedules.kernel import ConvKernel
from topiarist.schedules.kernels import CPU_KERNELS
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

TARGETS = [registry.get(name) for name in ("x86-avx2", "x86-avx512")]
REGISTER = {8: "ymm", 16: "zmm"}
LAYER = ConvCase(channels=32, outputs=32, density=0.1)
DEPTHWISE = ConvCase(channels=32, outputs=32, groups=32, density=1.0)


def inner_loops(function: Any, target: TargetSpec) -> list[list[str]]:
    """The instructions of each innermost loop with fused multiply-adds of whole vectors."""
    multiply = re.compile(rf"vfmadd\w+ps\s.*%{REGISTER[target.lanes]}")
    return [
        loop
        for loop in innermost(assembly_of(function, target), "j")
        if any(multiply.match(line) for line in loop)
    ]


def multiplications(loop: list[str]) -> list[str]:
    """The fused multiply-adds."""
    return [line for line in loop if line.startswith("vfmadd")]


def additions(loop: list[str]) -> list[str]:
    """Vector additions and subtractions."""
    return [line for line in loop if re.match(r"v(add|sub)ps\s", line)]


def spills(loop: list[str]) -> list[str]:
    """Vectors that go to the stack; reading a weight from there is as good as from anywhere."""
    return [line for line in loop if re.match(r"vmov\w+\s+%[xyz]mm.*\(%rsp", line)]


def conv_loops(kernel: ConvKernel[Any], case: ConvCase, target: TargetSpec) -> list[list[str]]:
    """The inner loops of the kernel's most promising configuration."""
    problem = make_problem(case, target.lanes)
    site = site_of(problem, target)
    return inner_loops(kernel.prim_func(site, fitting(kernel, problem, target)[0], NAME), target)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
def test_accumulators_stay_in_registers(kernel: ConvKernel[Any], target: TargetSpec) -> None:
    case = DEPTHWISE if kernel.name == "depthwise" else LAYER
    # Loops that also add are Winograd's transforms, which have no sums to keep.
    loops = [loop for loop in conv_loops(kernel, case, target) if not additions(loop)]
    assert loops
    for loop in loops:
        assert not spills(loop), "\n".join(loop)
        stores = [line for line in loop if re.match(rf"vmov\w+\s+%{REGISTER[target.lanes]}", line)]
        assert len(stores) < len(multiplications(loop)) / 4, "\n".join(loop)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nonzeros_multiply_into_memory_operands(target: TargetSpec) -> None:
    """One broadcast for a tile's multiply-adds, each of which reads its input itself."""
    sparse = next(kernel for kernel in CPU_KERNELS if kernel.name == "direct_sparse")
    for loop in conv_loops(sparse, LAYER, target):
        found = multiplications(loop)
        assert all("(" in line for line in found), "\n".join(loop)
        broadcasts = [line for line in loop if line.startswith("vbroadcastss")]
        assert len(found) >= 4 * len(broadcasts), "\n".join(loop)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_sparse_fully_connected_layers_gather(target: TargetSpec) -> None:
    shape = LinearShape(1, 512, 256)
    (main, *rest) = inner_loops(sparse_linear_prim_func(NAME, shape, target.lanes, 1), target)
    for loop in (main, *rest):
        assert any(line.startswith("vgatherdps") for line in loop), "\n".join(loop)
        assert not spills(loop)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_dense_fully_connected_layers_read_weights_once(target: TargetSpec, batch: int) -> None:
    shape = LinearShape(batch, 512, 256)
    for loop in inner_loops(dense_linear_prim_func(NAME, shape, target.lanes, 1), target):
        assert not spills(loop), "\n".join(loop)
