"""What LLVM makes of the kernels' inner loops for ARM; nothing of it is run."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from tests.schedules.assembly import assembly_of, innermost
from tests.schedules.building import NAME
from tests.schedules.kernel_contract import ConvCase, make_problem, site_of, sparse_enough
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.kernels import CPU_KERNELS, conv_kernel
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

NAMES = ("rpi4", "rpi5", "phone-a55", "armv7")  # Cortex-A72, A76, A55, 32 bits
TARGETS = [registry.get(name) for name in NAMES]
WIDE = TARGETS[:2]  # these reorder instructions
LAYER = ConvCase(channels=32, outputs=32, density=0.1, plane=(28, 28))
DEPTHWISE = ConvCase(channels=32, outputs=32, groups=32, density=1.0)
SUM = re.compile(r"(fmla|vfma\S*)\s")
SPILL = re.compile(r"(st|ld)[rpu]+\s+q.*\[sp|v(st|ld)\S+\s+.*\[sp")


def site(case: ConvCase, target: TargetSpec) -> ConvSite:
    """The layer with zeros that every sparse kernel takes."""
    problem = make_problem(case, target.lanes)
    found = site_of(problem, target)
    return ConvSite(sparse_enough(problem.workload), found.views, target)


def loops_of(name: str, where: ConvSite, config: Any = None) -> list[list[str]]:
    """The inner loops with multiply-adds of a configuration, by default the best by estimate."""
    kernel = conv_kernel(name)
    if config is None:
        config = next(c for c in kernel.knobs(where) if kernel.fits(where, c))
    found = innermost(assembly_of(kernel.prim_func(where, config, NAME), where.target), "b")
    return [loop for loop in found if any(map(SUM.match, loop))]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("name", [kernel.name for kernel in CPU_KERNELS])
def test_accumulators_stay_in_registers(name: str, target: TargetSpec) -> None:
    where = site(DEPTHWISE if name == "depthwise" else LAYER, target)
    if why := conv_kernel(name).refuses(where.workload, target):
        pytest.skip(why)
    for loop in loops_of(name, where):
        sums = [line for line in loop if SUM.match(line)]
        transforms = [line for line in loop if re.match(r"v?f?(add|sub)\S*\s+[vq]", line)]
        moved = [line for line in loop if SPILL.match(line)]
        # What works in order is unrolled four times, and some sums then move in between.
        most = 0 if target in WIDE or target.registers < 32 else len(sums) / 4
        assert transforms or len(moved) <= most, "\n".join(loop)


@pytest.mark.parametrize("target", WIDE, ids=lambda target: target.name)
def test_nonzeros_read_their_inputs_in_pairs(target: TargetSpec) -> None:
    """One weight in all lanes; in every block of input channels, the first and the last too."""
    where = site(LAYER, target)
    best = next(c for c in conv_kernel("direct_sparse").knobs(where) if c.rows * c.cols >= 14)
    loops = loops_of("direct_sparse", where, replace(best, in_block=8))
    assert len(loops) >= 3
    for loop in loops:
        sums = [line for line in loop if SUM.match(line)]
        pairs = [line for line in loop if re.match(r"ldp\s+q", line)]
        weights = [line for line in loop if line.startswith("ld1r")]
        assert len(sums) == best.rows * best.cols, "\n".join(loop)
        assert len(pairs) == len(sums) // 2, "\n".join(loop)
        assert len(weights) == 1, "\n".join(loop)


@pytest.mark.parametrize("target", WIDE, ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("block_sparse", (1, 7, 4)),
        ("block8_sparse", (1, 2, 8)),
        ("direct_dense", (2, 2, 4)),
        ("direct_dense", (1, 2, 8)),
        ("direct_dense", (1, 2, 12)),
    ],
)
def test_blocks_take_weights_from_lanes(
    name: str, tile: tuple[int, int, int], target: TargetSpec
) -> None:
    """Multiply-adds use all lanes of vectors of weights, none of them spread before."""
    for loop in loops_of(name, site(LAYER, target), DirectConfig(*tile, in_block=32)):
        sums = [line for line in loop if SUM.match(line)]
        lanes = [line[-2] for line in sums if line.endswith("]")]
        assert len(lanes) == len(sums), "\n".join(loop)
        assert all(lanes.count(lane) == len(sums) / 4 for lane in "0123"), "\n".join(loop)
        assert not any(re.match(r"dup|ld1r|mov\s+v", line) for line in loop), "\n".join(loop)
        assert not any(map(SPILL.match, loop)), "\n".join(loop)


def test_in_order_cores_load_one_by_one() -> None:
    """So that loads stay apart from the multiply-adds that wait for them."""
    for loop in loops_of("block_sparse", site(LAYER, registry.get("phone-a55"))):
        assert not any(re.match(r"ldp\s+q", line) for line in loop), "\n".join(loop)


def test_32_bit_code_fuses_multiplication_and_addition() -> None:
    for loop in loops_of("direct_sparse", site(LAYER, registry.get("armv7"))):
        assert not any(re.match(r"v(mul|add|mla)\.f32\s+q", line) for line in loop)
