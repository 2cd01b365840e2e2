"""The knobs of the direct kernels: what is offered divides, fits the registers, and is ranked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.schedules.kernel_contract import CASES, ConvCase, make_problem
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.cpu.space import (
    Estimator,
    block_configs,
    dense_configs,
    sparse_configs,
    tiles,
)
from topiarist.schedules.kernel import ConvViews
from topiarist.schedules.layout import LaneLayout, make_grid
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

NAMES = ("x86-sse4", "x86-avx2", "x86-avx512", "rpi4", "armv7")
SPECS = [pytest.param(registry.get(name), id=name) for name in NAMES]
SPACES = ("sparse", "block", "dense")


def configs(
    space: str, workload: ConvWorkload, spec: TargetSpec, views: ConvViews
) -> list[DirectConfig]:
    """The configurations of one kernel."""
    x, y = views.x.layout, views.y.layout
    estimator = Estimator(workload, spec, x, y)
    if space == "sparse":
        return sparse_configs(estimator)
    if space == "block":
        return block_configs(estimator, 4)
    return dense_configs(estimator)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", CASES)
def test_configurations_divide_the_grid_and_fit_the_registers(
    name: str, space: str, spec: TargetSpec
) -> None:
    problem = make_problem(CASES[name], spec.lanes)
    w, grid = problem.workload, problem.views.y.layout.grid
    found = configs(space, w, spec, problem.views)
    assert found
    for config in found:
        assert grid.rows % config.rows == 0
        assert grid.cols % config.cols == 0
        accumulators = config.rows * config.cols * config.out_block
        assert accumulators + 1 < spec.registers  # one for the weight
        assert 1 <= config.in_block <= w.in_channels // w.groups


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CASES)
def test_dense_blocks_divide_the_inputs_and_fit_the_outputs(name: str, spec: TargetSpec) -> None:
    problem = make_problem(CASES[name], spec.lanes)
    w = problem.workload
    for config in configs("dense", w, spec, problem.views):
        assert w.in_channels // w.groups % config.in_block == 0
        assert config.out_block <= w.out_channels // w.groups


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("space", SPACES)
def test_best_estimate_comes_first(space: str, spec: TargetSpec) -> None:
    """Third and further blockings of a tile come after the others, ranked by themselves."""
    problem = make_problem(ConvCase(channels=256, plane=(28, 28), outputs=64), spec.lanes)
    w, views = problem.workload, problem.views
    estimator = Estimator(w, spec, views.x.layout, views.y.layout)
    cycles = estimator.dense_cycles if space == "dense" else estimator.sparse_cycles
    found = configs(space, w, spec, views)
    assert len(found) > 3
    assert cycles(found[0]) == min(map(cycles, found))
    ranked = {
        late: [c for i, c in enumerate(found) if late == (nth(found, i) >= 2)]
        for late in (False, True)
    }
    assert found == ranked[False] + ranked[True]
    for part in ranked.values():
        assert part == sorted(part, key=cycles)


def nth(found: list[DirectConfig], i: int) -> int:
    """How many configurations before the i-th have its tile."""
    tile = replace(found[i], in_block=0)
    return sum(replace(config, in_block=0) == tile for config in found[:i])


@pytest.mark.parametrize("spec", SPECS)
def test_depthwise_layers_work_on_one_channel(spec: TargetSpec) -> None:
    problem = make_problem(CASES["depthwise"], spec.lanes)
    for space in ("sparse", "dense"):
        found = configs(space, problem.workload, spec, problem.views)
        assert {(config.in_block, config.out_block) for config in found} == {(1, 1)}


def test_estimates_grow_with_the_work() -> None:
    spec = registry.get("x86-avx2")
    problem = make_problem(ConvCase(channels=64, plane=(28, 28), outputs=64), spec.lanes)
    w, views = problem.workload, problem.views
    layouts = views.x.layout, views.y.layout
    config = sparse_configs(Estimator(w, spec, *layouts))[0]
    denser = replace(w, sparsity=replace(w.sparsity, density=2 * w.sparsity.density))
    twice = replace(w, out_channels=2 * w.out_channels)
    base = Estimator(w, spec, *layouts)
    assert Estimator(denser, spec, *layouts).sparse_cycles(config) > base.sparse_cycles(config)
    assert Estimator(twice, spec, *layouts).sparse_cycles(config) > base.sparse_cycles(config)
    assert Estimator(twice, spec, *layouts).dense_cycles(config) > base.dense_cycles(config)


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_of_inputs_stay_within_16_bits(spec: TargetSpec) -> None:
    """512x512 planes: at least one channel, and no more than 65536 vectors where it is several."""
    case = ConvCase(channels=32, outputs=8, plane=(24, 24))
    problem = make_problem(case, spec.lanes)
    grid = make_grid(512, 512, 2, spec.lanes // 2)
    x = LaneLayout(32, grid, (1, 1, 1, 1))
    y = LaneLayout(8, grid)
    workload = replace(problem.workload, height=512, width=512)
    vectors = x.channel_stride // spec.lanes
    for config in sparse_configs(Estimator(workload, spec, x, y)):
        assert config.in_block == 1 or config.in_block * vectors <= 1 << 16


def test_tiles_are_the_divisors_within_the_limit() -> None:
    found = tiles(make_grid(24, 16, 4, 4), 6)
    assert set(found) == {(r, v) for r in (1, 2, 3, 6) for v in (1, 2, 4) if r * v <= 6}
    sizes = [r * v for r, v in found]
    assert sizes == sorted(sizes, reverse=True)
