"""What every convolution kernel has to do, whatever it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.schedules import references
from tests.schedules.building import (
    TARGETS,
    FloatArray,
    bits,
    check_written,
    distinct_nans,
    lane_splits,
    pack_view,
    part_of,
    pixels_of,
    random_image,
    relative_error,
    run_all,
)
from topiarist.pruning.masks import block_mask, n_m_mask
from topiarist.pruning.patterns import Mask, find_pattern
from topiarist.schedules.cpu.direct import refuses_views, required_halo
from topiarist.schedules.cpu.space import tiles
from topiarist.schedules.kernel import ConvKernel, ConvSite, ConvViews, KernelConfig
from topiarist.schedules.layout import Grid, Halo, LaneLayout, make_grid
from topiarist.schedules.workload import ConvWorkload, signature
from topiarist.targets.spec import TargetSpec

TOLERANCE = 1e-5
RELU = (0.0, None)
RELU6 = (0.0, 6.0)
OTHERS = 2  # channels of somebody else before and after the part of a buffer that is used


@dataclass(frozen=True)
class ConvCase:
    """A convolution, the buffers it works between, and what its weight looks like.

    `split` picks how a vector's lanes are dealt out, `first` says that input and output are
    parts of bigger buffers, `residual` is None, "operand" or "in_place".
    """

    channels: int = 12
    outputs: int = 8
    plane: tuple[int, int] = (13, 13)
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: Halo = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 1
    threads: int = 1
    activation: tuple[float | None, float | None] = (None, None)
    residual: str | None = None
    density: float = 0.3
    empty_outputs: bool = False
    empty_inputs: bool = False
    split: int = 1
    tiled_input: bool = False
    tiled_output: bool = False
    halo: Halo = (1, 1, 1, 1)
    part: bool = False


POINTWISE = ConvCase(kernel=(1, 1), padding=(0, 0, 0, 0))
CASES = {
    "density_0": ConvCase(density=0.0),
    "density_0.05": ConvCase(density=0.05, activation=RELU),
    "density_0.3": ConvCase(split=2),
    "density_1": ConvCase(density=1.0, split=0),
    "empty_outputs": ConvCase(empty_outputs=True, activation=RELU6),
    "empty_inputs": ConvCase(empty_inputs=True),
    "plane_5x7": ConvCase(plane=(5, 7), split=2),
    "plane_1_wide": ConvCase(plane=(9, 1), halo=(2, 2, 2, 2)),
    "plane_1_high": ConvCase(plane=(1, 9), split=2, halo=(0, 0, 0, 0)),
    "plane_1x1": ConvCase(plane=(1, 1)),
    "stride_2": ConvCase(strides=(2, 2), plane=(14, 14)),
    "stride_2_odd": ConvCase(strides=(2, 2)),
    "stride_3": ConvCase(strides=(3, 3), kernel=(5, 5), padding=(2, 2, 2, 2)),
    "stride_2x1": ConvCase(strides=(2, 1), plane=(11, 6), halo=(0, 1, 2, 3)),
    "stride_1x3": ConvCase(strides=(1, 3), kernel=(1, 3), padding=(0, 1, 0, 1), split=0),
    "stride_beyond_kernel": ConvCase(strides=(3, 2), kernel=(1, 1), padding=(1, 1, 0, 0)),
    "padding_asymmetric": ConvCase(padding=(0, 2, 1, 0), plane=(9, 8)),
    "padding_none": ConvCase(padding=(0, 0, 0, 0)),
    "padding_of_1x1": ConvCase(kernel=(1, 1), padding=(1, 0, 1, 2)),
    "padding_beyond_sub_image": ConvCase(
        plane=(7, 7), kernel=(5, 5), padding=(4, 4, 4, 4), split=2, halo=(3, 3, 3, 3)
    ),
    "dilation_2": ConvCase(dilation=(2, 2), padding=(2, 2, 2, 2)),
    "dilation_1x3": ConvCase(dilation=(1, 3), padding=(1, 3, 1, 3), strides=(1, 2)),
    "groups_2": ConvCase(groups=2, outputs=16),
    "depthwise": ConvCase(groups=12, outputs=12, density=0.6),
    "depthwise_times_4": ConvCase(groups=3, channels=3, outputs=12, density=0.6),
    "depthwise_5x5": ConvCase(
        groups=6, channels=6, outputs=6, kernel=(5, 5), padding=(2, 2, 2, 2), density=1.0, part=True
    ),
    "depthwise_stride_2": ConvCase(
        groups=5, channels=5, outputs=10, strides=(2, 2), residual="operand", activation=RELU6
    ),
    "depthwise_threads": ConvCase(
        groups=7, channels=7, outputs=7, threads=2, batch=2, tiled_output=True, density=1.0
    ),
    "depthwise_in_place": ConvCase(
        groups=4, channels=4, outputs=4, dilation=(2, 1), padding=(2, 1, 2, 1), residual="in_place"
    ),
    "kernel_7x7": ConvCase(channels=4, kernel=(7, 7), padding=(3, 3, 3, 3), plane=(9, 10)),
    "kernel_7x7_stride_2": ConvCase(
        channels=3, kernel=(7, 7), padding=(3, 3, 3, 3), strides=(2, 2), activation=RELU
    ),
    "kernel_11x11_stride_4": ConvCase(
        channels=3, kernel=(11, 11), padding=(2, 2, 2, 2), strides=(4, 4), plane=(35, 31)
    ),
    "kernel_5x1": ConvCase(kernel=(5, 1), padding=(2, 0, 2, 0), plane=(11, 5), batch=2),
    "kernel_2x5_dilated": ConvCase(
        kernel=(2, 5), padding=(1, 4, 2, 4), dilation=(3, 2), groups=2, outputs=16
    ),
    "primes": ConvCase(
        channels=13, outputs=17, plane=(11, 7), batch=3, padding=(1, 2, 2, 0), residual="operand"
    ),
    "groups_3_stride_2": ConvCase(groups=3, outputs=24, strides=(2, 2), batch=2, threads=2),
    "kernel_1x3": ConvCase(kernel=(1, 3), padding=(0, 1, 0, 1)),
    "kernel_5x5": ConvCase(kernel=(5, 5), padding=(2, 2, 2, 2), channels=5),
    "odd_outputs": ConvCase(outputs=7),
    "odd_outputs_threads": ConvCase(outputs=7, plane=(4, 4), residual="in_place", threads=2),
    "odd_inputs": ConvCase(channels=7),
    "many_inputs": ConvCase(channels=70, plane=(8, 8), density=0.1, activation=RELU),
    "residual": ConvCase(residual="operand", activation=RELU),
    "residual_pointwise": replace(
        POINTWISE, residual="operand", tiled_input=True, tiled_output=True, part=True
    ),
    "in_place_overlapping": ConvCase(residual="in_place", plane=(15, 14), split=2, part=True),
    "batch_2_threads_operand": ConvCase(
        batch=2, threads=2, residual="operand", plane=(20, 28), activation=RELU, split=2
    ),
    "in_place": ConvCase(residual="in_place", activation=RELU, part=True),
    "in_place_tiled": replace(
        POINTWISE, residual="in_place", tiled_output=True, batch=3, channels=70
    ),
    "relu6": ConvCase(activation=RELU6, density=1.0),
    "batch_3": ConvCase(batch=3, part=True, plane=(6, 6)),
    "threads": ConvCase(threads=2, residual="operand", part=True),
    "threads_batch": ConvCase(threads=2, batch=3, groups=2, plane=(7, 7), halo=(2, 1, 0, 1)),
    "threads_one_tile": ConvCase(threads=2, plane=(4, 4), outputs=32, residual="in_place"),
    "part": ConvCase(part=True, halo=(3, 2, 1, 0)),
    "part_tiled": replace(POINTWISE, part=True, tiled_input=True, tiled_output=True, batch=3),
    "pointwise": POINTWISE,
    "pointwise_to_tiled": replace(POINTWISE, tiled_output=True, split=2),
    "pointwise_from_tiled": replace(POINTWISE, tiled_input=True, halo=(1, 0, 2, 1)),
    "pointwise_stride_2": replace(POINTWISE, strides=(2, 2), tiled_output=True),
    "pointwise_stride_2_tiled": replace(
        POINTWISE, strides=(2, 2), tiled_input=True, tiled_output=True, plane=(14, 14)
    ),
    "to_tiled": ConvCase(tiled_output=True, part=True),
}


def one_of_three_supports(scores: FloatArray) -> Mask:
    """Four taps of each kernel [3, 3], in one of three patterns."""
    rows = ("110110000", "010101010", "000001111")
    supports = np.array([[int(tap) for tap in row] for row in rows])
    chosen = np.random.default_rng(2).integers(0, len(supports), scores.shape[:2])
    return supports[chosen].reshape(scores.shape) != 0


PATTERNS: dict[str, Callable[[FloatArray], Mask]] = {
    "1:4": lambda scores: n_m_mask(scores, 1, 4),
    "kernel": one_of_three_supports,
    "block4x1": lambda scores: block_mask(scores, 0.3),
    "block8x1": lambda scores: block_mask(scores, 0.3, block=8),
    "block16x1": lambda scores: block_mask(scores, 0.3, block=16),
}


@dataclass(frozen=True)
class Problem:
    """A case for one vector width: what is computed, from what, between which buffers."""

    workload: ConvWorkload
    views: ConvViews
    x: FloatArray
    weight: FloatArray
    bias: FloatArray
    residual: FloatArray | None


def make_problem(case: ConvCase, lanes: int) -> Problem:
    """The case with random numbers."""
    rng = np.random.default_rng(7)
    weight = make_weight(case, rng)
    workload = make_workload(case, weight)
    x = random_image(rng, case.batch, case.channels, *case.plane)
    bias = random_image(rng, case.outputs)
    residual = None
    if case.residual is not None:
        extent = workload.out_height, workload.out_width
        residual = random_image(rng, case.batch, case.outputs, *extent)
    return Problem(workload, make_views(case, workload, lanes), x, weight, bias, residual)


def make_weight(case: ConvCase, rng: np.random.Generator) -> FloatArray:
    """A weight [O, C / groups, kh, kw] with zeros anywhere."""
    shape = case.outputs, case.channels // case.groups, *case.kernel
    weight = random_image(rng, *shape)
    weight[rng.random(shape) >= case.density] = 0
    if case.empty_outputs:
        weight[:5] = 0
    if case.empty_inputs:
        weight[:, ::2] = 0
    return weight


def make_workload(case: ConvCase, weight: FloatArray) -> ConvWorkload:
    """The case as a workload."""
    return ConvWorkload(
        batch=case.batch,
        in_channels=case.channels,
        height=case.plane[0],
        width=case.plane[1],
        out_channels=case.outputs,
        kernel=case.kernel,
        strides=case.strides,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
        sparsity=signature(weight, "unstructured"),
        activation=case.activation,
        residual=case.residual is not None,
    )


def make_views(case: ConvCase, workload: ConvWorkload, lanes: int) -> ConvViews:
    """The case's buffers."""
    splits = lane_splits(lanes)
    sy, sx = splits[case.split % len(splits)]
    y_grid = make_grid(workload.out_height, workload.out_width, sy, sx)
    rows, cols = y_grid.rows * case.strides[0], y_grid.cols * case.strides[1]
    x_grid = Grid(*case.plane, sy, sx, rows, cols)
    tile = tiles(y_grid, 14)[0]
    x_tile = tile[0] * case.strides[0], tile[1] * case.strides[1]
    x = lane_layout(case.channels, x_grid, x_tile, case.tiled_input, required_halo(workload))
    y = lane_layout(case.outputs, y_grid, tile, case.tiled_output, case.halo)
    residual = None
    if case.residual == "operand":
        residual = replace(y, halo=(0, 0, 0, 0) if y.tile else (0, 1, 1, 0))
    around = (OTHERS, OTHERS + 1) if case.part else (0, 0)
    return ConvViews(
        part_of(x, *around),
        part_of(y, *around),
        None if residual is None else part_of(residual, *around),
        case.residual == "in_place",
    )


def lane_layout(
    channels: int, grid: Grid, tile: tuple[int, int], tiled: bool, halo: Halo
) -> LaneLayout:
    """A tiled or padded layout."""
    return LaneLayout(channels, grid, (0, 0, 0, 0) if tiled else halo, tile if tiled else None)


def y_before(problem: Problem) -> FloatArray:
    """The output buffer before the call: NaN, but for a residual to add in place."""
    view, batch = problem.views.y, problem.workload.batch
    before = distinct_nans(batch * view.layout.size)
    if problem.views.in_place:
        assert problem.residual is not None
        packed = pack_view(view, problem.residual).reshape(batch, -1)
        before = np.where(pixels_of(view), packed, before.reshape(batch, -1)).ravel()
    return before


def site_of(problem: Problem, target: TargetSpec, threads: int = 1) -> ConvSite:
    """The problem's layer in its place."""
    return ConvSite(problem.workload, problem.views, target, threads)


def arguments(
    kernel: ConvKernel[Any], problem: Problem, config: KernelConfig, site: ConvSite
) -> list[Any]:
    """x, constants, bias, residual, y."""
    views = problem.views
    packed = kernel.pack(site, config, problem.weight)
    args = [pack_view(views.x, problem.x), *packed, problem.bias]
    if views.residual is not None:
        assert problem.residual is not None
        args.append(pack_view(views.residual, problem.residual))
    return [*args, y_before(problem)]


def check(
    kernel: ConvKernel[Any],
    problem: Problem,
    configs: list[Any],
    target: TargetSpec,
    threads: int = 1,
) -> None:
    """Run the configurations and compare each with the reference."""
    w, views = problem.workload, problem.views
    site = site_of(problem, target, threads)
    named = {f"config_{i}": config for i, config in enumerate(configs)}
    results = run_all(
        {n: kernel.prim_func(site, config, n) for n, config in named.items()},
        target,
        {n: arguments(kernel, problem, config, site) for n, config in named.items()},
    )
    want = references.conv(w, problem.x, problem.weight, problem.bias, problem.residual)
    before = y_before(problem)
    for name, config in named.items():
        got = check_written(views.y, before, results[name])
        error = relative_error(got, want)
        allowed = TOLERANCE + kernel.added_error(w, config)
        assert error < allowed, f"{kernel.name} {config}: relative error {error:.2g}"


def sparse_enough(workload: ConvWorkload) -> ConvWorkload:
    """The workload as if most weights were zero in blocks, so that only its shape is refused."""
    sparsity = replace(workload.sparsity, density=0.1, pattern="block8x1")
    return replace(workload, sparsity=sparsity)


def fitting(kernel: ConvKernel[Any], problem: Problem, target: TargetSpec) -> list[Any]:
    """The configurations that fit; skips what the kernel refuses for its shape."""
    w, views = problem.workload, problem.views
    why = kernel.refuses(sparse_enough(w), target)
    if why is not None:
        assert why.strip(), "a refusal without a reason"
        pytest.skip(f"{kernel.name} refuses: {why}")
    assert refuses_views(w, views) is None
    site = site_of(problem, target)
    found = [c for c in kernel.knobs(site) if kernel.fits(site, c)]
    assert found, f"{kernel.name} accepts the layer but offers no configuration that fits"
    return found


def spread(configs: list[Any]) -> list[Any]:
    """The first, the middle and the last."""
    return [configs[0], configs[len(configs) // 2], configs[-1]]


def wide_problem(channels: int, lanes: int) -> Problem:
    """So many input channels that they are far apart in memory; the last weight is not zero."""
    sy, sx = lane_splits(lanes)[1]
    case = ConvCase(channels=channels, outputs=4, plane=(6 * sy, 6 * sx), density=0.05)
    problem = make_problem(case, lanes)
    problem.weight[:, -1, -1, -1] = 1
    return problem


def addressable_channels(lanes: int) -> int:
    """Input channels of a `wide_problem` whose vectors 16 bits can number."""
    layout = wide_problem(4, lanes).views.x.layout
    last_tap = 2 * layout.row_vectors + 2
    return ((1 << 16) - 1 - last_tap) // (layout.channel_stride // lanes) + 1


@pytest.mark.parametrize("target", TARGETS)
class ConvKernelContract:
    """Subclass it and parametrise `kernel`."""

    @pytest.mark.parametrize("name", CASES)
    def test_agrees_with_the_reference(
        self, kernel: ConvKernel[Any], target: TargetSpec, name: str
    ) -> None:
        """Poison around the input and in the output is neither read nor left behind.

        Over the three vector widths a case meets the first, the middle and the last configuration.
        """
        problem = make_problem(CASES[name], target.lanes)
        turn = list(CASES).index(name) + lane_splits(target.lanes).index((target.lanes, 1))
        config = spread(fitting(kernel, problem, target))[turn % 3]
        check(kernel, problem, [config], target, CASES[name].threads)

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_patterns_of_zeros(
        self, kernel: ConvKernel[Any], target: TargetSpec, pattern: str
    ) -> None:
        """N:M, kernel patterns and blocks, for kernels made for them and all others."""
        problem = make_problem(ConvCase(channels=16, outputs=16, density=1.0), target.lanes)
        kept = PATTERNS[pattern](np.abs(problem.weight))
        weight = np.where(kept, problem.weight, np.float32(0))
        assert str(find_pattern(weight)) == pattern
        workload = replace(problem.workload, sparsity=signature(weight, pattern))
        pruned = replace(problem, weight=weight, workload=workload)
        check(kernel, pruned, fitting(kernel, pruned, target)[:1], target)

    @pytest.mark.parametrize("residual", [None, "in_place"])
    @pytest.mark.parametrize("name", ["many_inputs", "in_place_tiled"])
    def test_blocks_of_every_size(
        self, kernel: ConvKernel[Any], target: TargetSpec, name: str, residual: str | None
    ) -> None:
        """Also those that do not divide the channels, and with more threads than tiles."""
        case = replace(CASES[name], outputs=20, plane=(4, 4), batch=1, residual=residual)
        problem = make_problem(case, target.lanes)
        by_block = {c.out_block: c for c in fitting(kernel, problem, target)}
        check(kernel, problem, list(by_block.values()), target, threads=2)

    @pytest.mark.parametrize("name", ["threads_one_tile", "threads", "depthwise_threads"])
    def test_the_number_of_threads_changes_no_bit(
        self, kernel: ConvKernel[Any], target: TargetSpec, name: str
    ) -> None:
        """However tiles and channels are shared out."""
        problem = make_problem(CASES[name], target.lanes)
        config = fitting(kernel, problem, target)[0]
        sites = {f"threads_{n}": site_of(problem, target, n) for n in (1, 2, 3)}
        results = run_all(
            {n: kernel.prim_func(site, config, n) for n, site in sites.items()},
            target,
            {n: arguments(kernel, problem, config, site) for n, site in sites.items()},
        )
        one, *more = (bits(result) for result in results.values())
        assert all(np.array_equal(one, other) for other in more)

    def test_known_result(self, kernel: ConvKernel[Any], target: TargetSpec) -> None:
        """1..9 under the kernel [[1, 0], [0, -1]]: each pixel minus its neighbour four on."""
        case = ConvCase(channels=1, outputs=4, plane=(3, 3), kernel=(2, 2), padding=(0, 0, 0, 0))
        problem = make_problem(case, target.lanes)
        weight = np.zeros_like(problem.weight)
        weight[:, 0] = [[1, 0], [0, -1]]
        x = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3)
        known = replace(problem, x=x, weight=weight, bias=np.zeros(4, np.float32))
        want = references.conv(known.workload, x, weight, known.bias, None)
        assert (want == -4).all()
        check(kernel, known, fitting(kernel, known, target)[:1], target)

    @pytest.mark.parametrize("name", CASES)
    def test_packs_every_nonzero_once(
        self, kernel: ConvKernel[Any], target: TargetSpec, name: str
    ) -> None:
        """The constants hold the nonzeros of the weight; what else they hold is zero."""
        problem = make_problem(CASES[name], target.lanes)
        want = np.sort(problem.weight[problem.weight != 0])
        for config in spread(fitting(kernel, problem, target)):
            if kernel.added_error(problem.workload, config):
                pytest.skip(f"{kernel.name} transforms the weight")
            packed = kernel.pack(site_of(problem, target), config, problem.weight)
            values = np.concatenate([part for part in packed if part.dtype == np.float32])
            assert np.array_equal(np.sort(values[values != 0]), want), config

    @pytest.mark.parametrize("beyond", [0, 1])
    def test_far_channels_are_reached_or_refused(
        self, kernel: ConvKernel[Any], target: TargetSpec, beyond: int
    ) -> None:
        """The last block of channels that 16 bits can address, and the first that they can't."""
        channels = addressable_channels(target.lanes) + beyond
        problem = wide_problem(channels, target.lanes)
        config = fitting(kernel, problem, target)[0]
        if not hasattr(config, "in_block"):
            pytest.skip(f"{kernel.name} numbers no channels")
        config = replace(config, in_block=channels)
        try:
            check(kernel, problem, [config], target)
        except ValueError as error:
            assert beyond, "refused an offset that fits"
            assert "16 bits" in str(error)

    @pytest.mark.parametrize("kernel_size", [1, 3])
    def test_large_planes_have_configurations(
        self, kernel: ConvKernel[Any], target: TargetSpec, kernel_size: int
    ) -> None:
        """64 channels of 224x224: all that is offered can be packed, however full the weight."""
        pad = kernel_size // 2
        case = ConvCase(
            channels=64,
            outputs=8,
            plane=(224, 224),
            kernel=(kernel_size, kernel_size),
            padding=(pad, pad, pad, pad),
        )
        weight = np.ones((8, 64, kernel_size, kernel_size), np.float32)
        workload = sparse_enough(make_workload(case, weight))
        why = kernel.refuses(workload, target)
        if why is not None:
            pytest.skip(f"{kernel.name} refuses: {why}")
        site = ConvSite(workload, make_views(case, workload, target.lanes), target)
        found = kernel.knobs(site)
        assert found
        for config in spread(found):
            kernel.pack(site, config, weight)

    @pytest.mark.parametrize("name", ["density_0.3", "depthwise_times_4", "many_inputs"])
    def test_most_promising_knobs_come_first(
        self, kernel: ConvKernel[Any], target: TargetSpec, name: str
    ) -> None:
        """By the estimate, in microseconds; nothing comes twice."""
        problem = make_problem(CASES[name], target.lanes)
        fitting(kernel, problem, target)
        site = site_of(problem, target)
        found = kernel.knobs(site)
        estimates = [kernel.estimate_us(site, config) for config in found]
        assert all(0 < us < math.inf for us in estimates)
        assert estimates[0] == min(estimates)
        assert len(set(found)) == len(found)

    def test_sparse_kernels_refuse_full_weights(
        self, kernel: ConvKernel[Any], target: TargetSpec
    ) -> None:
        """With the density as the reason."""
        workload = make_problem(CASES["density_1"], target.lanes).workload
        why = kernel.refuses(workload, target)
        if kernel.sparse:
            assert why is not None
            assert "density 1.00" in why
        else:
            assert why is None or "density" not in why

    def test_tiles_that_do_not_divide_are_refused(
        self, kernel: ConvKernel[Any], target: TargetSpec
    ) -> None:
        """`fits` says so, and nothing is built."""
        problem = make_problem(CASES["density_0.3"], target.lanes)
        fitting(kernel, problem, target)
        site = site_of(problem, target)
        rows = problem.views.y.layout.grid.rows
        config = replace(kernel.knobs(site)[0], rows=rows + 1)
        assert not kernel.fits(site, config)
        with pytest.raises(ValueError, match="does not fit"):
            kernel.pack(site, config, problem.weight)
        with pytest.raises(ValueError, match="does not fit"):
            kernel.prim_func(site, config, "kernel")
