"""The kernels as code for ARM processors, under QEMU, against the same float64 references."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cache, partial

import pytest

from tests.schedules import test_elementwise, test_linear, test_pooling, test_relayout
from tests.schedules.emulation import Emulation, Test, need_tools
from tests.schedules.kernel_contract import (
    CASES,
    PATTERNS,
    ConvKernelContract,
    make_problem,
    sparse_enough,
)
from topiarist.schedules.kernels import CPU_KERNELS
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

pytestmark = pytest.mark.qemu

# Each meets another thing that addresses, rests of blocks or the halo depend on.
SOME = (
    "density_0.05",
    "density_1",
    "stride_2_odd",
    "padding_asymmetric",
    "groups_2",
    "depthwise_5x5",
    "depthwise_stride_2",
    "many_inputs",
    "in_place_overlapping",
    "batch_2_threads_operand",
    "odd_outputs",
    "threads_batch",
    "part_tiled",
    "pointwise_stride_2_tiled",
)


def conv_tests(target: TargetSpec, cases: Iterable[str]) -> dict[str, Test]:
    """The contract of the convolution kernels, for what they don't refuse."""
    contract = ConvKernelContract()
    tests: dict[str, Test] = {}
    for kernel, case in itertools.product(CPU_KERNELS, cases):
        workload = sparse_enough(make_problem(CASES[case], target.lanes).workload)
        if kernel.refuses(workload, target) is None:
            test = partial(contract.test_agrees_with_the_reference, kernel, target, case)
            tests[f"{kernel.name}_{case.replace('.', '_')}"] = test
    return tests


def pattern_tests(target: TargetSpec) -> dict[str, Test]:
    """The sparse kernels on zeros with a structure."""
    contract = ConvKernelContract()
    sparse = [kernel for kernel in CPU_KERNELS if kernel.sparse]
    return {
        f"{kernel.name}_{pattern.replace(':', '_')}": partial(
            contract.test_patterns_of_zeros, kernel, target, pattern
        )
        for kernel, pattern in itertools.product(sparse, PATTERNS)
    }


def other_tests(target: TargetSpec) -> dict[str, Test]:
    """Kernels that are no convolutions."""
    tests: dict[str, Test] = {}
    for case in ("3x3_ceil", "threads"):
        tests[f"maximum_{case}"] = partial(test_pooling.test_maximum, case, target)
        tests[f"average_{case}"] = partial(test_pooling.test_average, case, target)
    for case in ("odd", "tiled"):
        tests[f"mean_{case}"] = partial(test_pooling.test_global_average, case, 1, target)
    for case in ("padded", "to_tiled"):
        tests[f"affine_{case}"] = partial(test_elementwise.test_affine, case, target)
        tests[f"add_{case}"] = partial(test_elementwise.test_add, case, target)
    for kind, case in itertools.product(test_linear.KINDS, ("37_outputs", "batch_9")):
        test = partial(test_linear.test_agrees_with_the_reference, case, kind, target)
        tests[f"linear_{kind}_{case}"] = test
    for laned in (False, True):
        test = partial(test_relayout.test_strides_take_every_so_many_pixels, (2, 2), laned, target)
        tests[f"to_lanes_{laned}"] = test
    return tests


WIDE, NARROW = registry.get("rpi4"), registry.get("armv7")
TESTS = {
    WIDE.name: conv_tests(WIDE, SOME) | pattern_tests(WIDE) | other_tests(WIDE),
    NARROW.name: conv_tests(NARROW, SOME[::4]) | other_tests(NARROW),
}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Emulation]:
    """The kernels of a target's tests, run once."""

    @cache
    def run(name: str) -> Emulation:
        target = registry.get(name)
        need_tools(target)
        return Emulation(target, TESTS[name], tmp_path_factory.mktemp(name))

    return run


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, tests in TESTS.items() for name in tests]
)
def test_agrees_with_the_reference(
    target: str, name: str, emulated: Callable[[str], Emulation]
) -> None:
    """Poisoned padding included, as on the machine that runs the tests."""
    emulated(target).replay(name, TESTS[target][name])
