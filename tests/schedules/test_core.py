"""Cores from the data of targets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.schedules.kernel_contract import ConvCase, make_problem, site_of
from topiarist.schedules.cpu.core import core_of
from topiarist.schedules.kernels import conv_kernel
from topiarist.targets import registry

WIDE, IN_ORDER, OLD = (registry.get(name) for name in ("rpi5", "phone-a55", "armv7"))


def test_code_follows_the_instruction_set_and_the_pipeline() -> None:
    wide, in_order, old = core_of(WIDE), core_of(IN_ORDER), core_of(OLD)
    assert wide.lane_fma and in_order.lane_fma and not old.lane_fma
    assert wide.tile_vectors > in_order.tile_vectors > old.tile_vectors
    for target, core in ((WIDE, wide), (IN_ORDER, in_order), (OLD, old)):
        assert core.tile_vectors + core.operands == target.registers


def test_code_for_x86_depends_on_no_data_of_a_machine() -> None:
    cores = {core_of(registry.get(name)) for name in ("x86-sse4", "x86-avx2", "x86-avx512")}
    measured = replace(registry.get("x86-avx2"), peak_gflops=50.0, bandwidth_gbs=3.0)
    assert cores == {core_of(measured)}


@pytest.mark.parametrize("name", ["direct_sparse", "direct_dense", "winograd_dense"])
def test_estimates_follow_the_clock(name: str) -> None:
    kernel = conv_kernel(name)
    problem = make_problem(ConvCase(channels=32, outputs=32, density=0.1, plane=(28, 28)), 4)
    cluster = WIDE.clusters[0]
    assert cluster.clock_ghz is not None and WIDE.bandwidth_gbs is not None
    doubled = replace(cluster, clock_ghz=2 * cluster.clock_ghz)
    fast = replace(WIDE, clusters=(doubled,), bandwidth_gbs=2 * WIDE.bandwidth_gbs)
    config = kernel.knobs(site_of(problem, WIDE))[0]
    slow_us, fast_us = (kernel.estimate_us(site_of(problem, t), config) for t in (WIDE, fast))
    assert slow_us == pytest.approx(2 * fast_us)


def test_nothing_need_be_known_of_a_core() -> None:
    unknown = replace(WIDE, clusters=(), bandwidth_gbs=None)
    assert core_of(unknown).cycles_per_us > 0
    assert core_of(unknown).lane_fma
