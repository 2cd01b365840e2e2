"""The kernels as code for ARM processors, under QEMU, against the same float64 references."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from tests.schedules import test_elementwise, test_linear, test_pooling, test_relayout
from tests.schedules.emulation import Emulation, Test, need_tools
from tests.schedules.kernel_contract import PATTERNS, ConvKernelContract
from topiarist.schedules.kernels import CONV_KERNELS
from topiarist.targets import registry

pytestmark = pytest.mark.qemu

TARGETS = {name: registry.get(name) for name in ("rpi4",)}
# Each meets another thing that addresses, rests of blocks or the halo depend on.
CASES = (
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


def emulated_tests(target_name: str) -> dict[str, Test]:
    """The contract of the convolution kernels for some cases, and tests of other kernels."""
    target, contract = TARGETS[target_name], ConvKernelContract()
    tests: dict[str, Test] = {}
    for kernel, case in itertools.product(CONV_KERNELS, CASES):
        test = partial(contract.test_agrees_with_the_reference, kernel, target, case)
        tests[f"{kernel.name}_{case.replace('.', '_')}"] = test
    for kernel, pattern in itertools.product(CONV_KERNELS, PATTERNS):
        if kernel.sparse:
            test = partial(contract.test_patterns_of_zeros, kernel, target, pattern)
            tests[f"{kernel.name}_{pattern.replace(':', '_')}"] = test
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
        test = partial(
            test_relayout.test_strides_take_every_so_many_pixels, (2, 2), laned, target
        )
        tests[f"to_lanes_{laned}"] = test
    return tests


TESTS = {name: emulated_tests(name) for name in TARGETS}


@pytest.fixture(scope="module", params=TARGETS)
def emulation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Emulation]:
    """All kernels of a target, run."""
    name = request.param
    need_tools(TARGETS[name])
    return name, Emulation(TARGETS[name], TESTS[name], tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("name", TESTS["rpi4"])
def test_agrees_with_the_reference(name: str, emulation: tuple[str, Emulation]) -> None:
    """Poisoned padding included, as on the machine that runs the tests."""
    target, emulated = emulation
    emulated.replay(name, TESTS[target][name])
