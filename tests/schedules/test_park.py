"""The kernel of Park et al. against the facts that its paper and its code give."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from tvm.script.ir_builder import tirx as T

from tests.schedules import references
from tests.schedules.building import (
    TARGETS,
    FloatArray,
    bits,
    distinct_nans,
    pack_view,
    random_image,
    relative_error,
    run_all,
)
from topiarist.schedules.cpu import emit
from topiarist.schedules.cpu.park import ParkSparse, column_block
from topiarist.schedules.cpu.park_loops import ParkConfig, Plane, padded_plane
from topiarist.schedules.kernel import ConvSite, ConvViews
from topiarist.schedules.layout import LaneLayout, make_grid, whole
from topiarist.schedules.workload import ConvWorkload, signature
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

KERNEL = ParkSparse()
RELU = (0.0, None)


@dataclass(frozen=True)
class Layer:
    """A convolution with random numbers; `pad` on all four sides."""

    channels: int = 6
    outputs: int = 5
    height: int = 13
    width: int = 13
    kernel: tuple[int, int] = (3, 3)
    pad: int = 1
    groups: int = 1
    batch: int = 1
    density: float = 0.4
    activation: tuple[float | None, float | None] = (None, None)
    in_block: int | None = None  # None: as the authors' rule has it
    x_halo: int = 0

    def weight(self) -> FloatArray:
        """[O, C / groups, kh, kw]."""
        rng = np.random.default_rng(3)
        weight = random_image(rng, self.outputs, self.channels // self.groups, *self.kernel)
        return np.where(rng.random(weight.shape) < self.density, weight, np.float32(0))


@dataclass(frozen=True)
class Problem:
    """A layer in its place, its numbers and its configuration."""

    site: ConvSite
    config: ParkConfig
    x: FloatArray
    weight: FloatArray
    bias: FloatArray

    def wanted(self) -> Any:
        """The reference, in float64."""
        return references.conv(self.site.workload, self.x, self.weight, self.bias, None)

    def arguments(self, *packed: Any) -> list[Any]:
        """Of the function; everything but pixels is NaN."""
        views, batch = self.site.views, self.site.workload.batch
        packed = packed or KERNEL.pack(self.site, self.config, self.weight)
        return [
            pack_view(views.x, self.x),
            *packed,
            self.bias,
            distinct_nans(batch * views.y.layout.size),
        ]

    def check(self, result: FloatArray) -> None:
        """The result against the reference; nothing beside the pixels was written."""
        view = self.site.views.y
        before = distinct_nans(result.size)
        got = view.layout.unpack(result)
        assert np.isfinite(got).all(), "a pixel was not written, or garbage reached it"
        pixels = np.zeros(view.layout.size, bool)
        at = np.arange(view.count) * view.layout.channel_stride
        pixels[at[:, None, None] + view.layout.pixel_offsets()] = True
        outside = ~np.tile(pixels, self.site.workload.batch)
        assert np.array_equal(bits(result)[outside], bits(before)[outside])
        assert relative_error(got, self.wanted()) < 1e-5


def plane(channels: int, height: int, width: int, halo: int = 0) -> LaneLayout:
    """Rows of pixels, channel by channel."""
    return LaneLayout(channels, make_grid(height, width, 1, 1), (halo,) * 4)


def problem(layer: Layer, target: TargetSpec, threads: int = 1, **arrays: FloatArray) -> Problem:
    """The layer between row-major planes."""
    weight = arrays.get("weight", layer.weight())
    workload = ConvWorkload(
        batch=layer.batch,
        in_channels=layer.channels,
        height=layer.height,
        width=layer.width,
        out_channels=layer.outputs,
        kernel=layer.kernel,
        strides=(1, 1),
        padding=(layer.pad,) * 4,
        dilation=(1, 1),
        groups=layer.groups,
        sparsity=signature(weight, "unstructured"),
        activation=layer.activation,
    )
    x_plane = plane(layer.channels, layer.height, layer.width, layer.x_halo)
    y_plane = plane(layer.outputs, workload.out_height, workload.out_width)
    site = ConvSite(workload, ConvViews(whole(x_plane), whole(y_plane)), target, threads)
    config = KERNEL.knobs(site)[0]
    if layer.in_block is not None:
        config = replace(config, in_block=layer.in_block)
    rng = np.random.default_rng(4)
    x = random_image(rng, layer.batch, layer.channels, layer.height, layer.width)
    return Problem(site, config, arrays.get("x", x), weight, random_image(rng, layer.outputs))


def run(problems: dict[str, Problem]) -> dict[str, FloatArray]:
    """All of them, built as one module."""
    target = next(iter(problems.values())).site.target
    return run_all(
        {n: KERNEL.prim_func(p.site, p.config, n) for n, p in problems.items()},
        target,
        {n: p.arguments() for n, p in problems.items()},
    )


SHAPES = {
    **{
        f"pad{pad}_kernel{kernel}_width{width}": Layer(
            pad=pad, kernel=(kernel, kernel), width=width, height=9
        )
        for pad, kernel, width in [
            *[(0, 1, 16), (0, 1, 7), (0, 2, 17), (0, 3, 18), (0, 5, 13)],
            *[(1, 1, 6), (1, 2, 15), (1, 3, 3), (1, 3, 14), (1, 3, 32), (2, 3, 7), (2, 5, 27)],
        ]
    },
    "rectangle": Layer(height=5, width=20, kernel=(1, 3)),
    "one_pixel": Layer(height=1, width=1),
    "groups": Layer(groups=2, outputs=6),
    "batch": Layer(batch=3, activation=RELU),
    "outputs_40": Layer(outputs=40, channels=16, in_block=4, activation=RELU),
    "groups_blocks": Layer(groups=2, outputs=34, channels=12, in_block=2, batch=2),
    "two_blocks": Layer(channels=8, in_block=4),
    "no_weights": Layer(density=0),
    "all_weights": Layer(density=1),
    "halo_before": Layer(x_halo=2),
    "pointwise_halo_before": Layer(x_halo=1, kernel=(1, 1), pad=0, width=16),
}


@pytest.mark.parametrize("target", TARGETS)
class TestKernel:
    """The code, with vectors of 4, 8 and 16 lanes."""

    def test_agrees_with_the_reference(self, target: TargetSpec) -> None:
        """Every padding, kernel size and width; everything around the pixels is poison."""
        problems = {name: problem(layer, target) for name, layer in SHAPES.items()}
        for name, result in run(problems).items():
            problems[name].check(result)

    def test_no_weights_leave_the_bias(self, target: TargetSpec) -> None:
        """To the bit."""
        empty = problem(SHAPES["no_weights"], target)
        layout = empty.site.views.y.layout
        got = layout.unpack(run({"kernel": empty})["kernel"])
        assert (got == empty.bias[:, None, None]).all()

    def test_poison_behind_the_padded_copy_stays_there(self, target: TargetSpec) -> None:
        """The copy's memory is full of NaN before; garbage lanes read what nobody has written."""
        layers = {"kernel": Layer(), "same_size": Layer(pad=0, width=15, height=15, kernel=(1, 1))}
        problems = {name: problem(layer, target) for name, layer in layers.items()}
        for name, p in problems.items():
            size = padded_plane(p.site.workload, target.lanes).size
            results = run_all(
                {
                    "poison": workspace(size, "poison", poisons=True),
                    "left_over": workspace(size, "left_over", poisons=False),
                    name: KERNEL.prim_func(p.site, p.config, name),
                },
                target,
                {
                    "poison": [np.zeros(size, np.float32)],
                    "left_over": [np.zeros(size, np.float32)],
                    name: p.arguments(),
                },
            )
            assert np.isnan(results["left_over"]).all()
            p.check(results[name])

    def test_known_result(self, target: TargetSpec) -> None:
        """1..9 under [[1, 0], [0, -1]]: indices 0 and 4, all results -4."""
        weight = np.array([[[[1, 0], [0, -1]]]], np.float32)
        x = np.arange(1, 10, dtype=np.float32).reshape(1, 1, 3, 3)
        layer = Layer(channels=1, outputs=1, height=3, width=3, kernel=(2, 2), pad=0)
        known = replace(problem(layer, target, weight=weight, x=x), bias=np.zeros(1, np.float32))
        values, indices, starts = KERNEL.pack(known.site, known.config, weight)
        assert values[:2].tolist() == [1, -1]
        assert indices[:2].tolist() == [0, 4]
        assert starts.tolist() == [0, 2]
        assert (known.wanted() == -4).all()
        known.check(run({"kernel": known})["kernel"])

    def test_blocks_change_only_rounding(self, target: TargetSpec) -> None:
        """Column blocks have all nonzeros, and their number changes no result beyond 1e-5."""
        layers = {f"block_{b}": Layer(channels=24, in_block=b) for b in (24, 12, 8, 1)}
        problems = {name: problem(layer, target) for name, layer in layers.items()}
        for p in problems.values():
            packed = KERNEL.pack(p.site, p.config, p.weight)
            assert packed[2][-1] == np.count_nonzero(p.weight)
            assert np.array_equal(np.sort(packed[0][:-1]), np.sort(p.weight[p.weight != 0]))
        one, *more = run(problems).values()
        layout = problems["block_24"].site.views.y.layout
        want = layout.unpack(one).astype(np.float64)
        assert all(relative_error(layout.unpack(other), want) < 1e-5 for other in more)

    def test_the_order_of_nonzeros_changes_only_rounding(self, target: TargetSpec) -> None:
        """Reversed within every row."""
        p = problem(Layer(channels=8), target)
        values, indices, starts = KERNEL.pack(p.site, p.config, p.weight)
        order = np.concatenate([np.arange(a, b)[::-1] for a, b in itertools.pairwise(starts)])
        packed = values[np.append(order, -1)], indices[np.append(order, -1)], starts
        function = KERNEL.prim_func(p.site, p.config, "kernel")
        p.check(run_all({"kernel": function}, target, {"kernel": p.arguments(*packed)})["kernel"])

    def test_the_number_of_threads_changes_no_bit(self, target: TargetSpec) -> None:
        """They share out channels."""
        layer = SHAPES["groups_blocks"]
        one, *more = run(
            {f"threads_{n}": problem(layer, target, threads=n) for n in (1, 2, 3)}
        ).values()
        assert all(np.array_equal(bits(one), bits(other)) for other in more)


def workspace(size: int, name: str, poisons: bool) -> Any:
    """f(y): memory as the kernel's copy gets it, filled with NaN, or copied to y as it is."""
    with emit.prim_func(name) as builder:
        y = emit.argument("y", size)
        memory = T.alloc_buffer((size,), scope="global")
        with T.serial(0, size) as i:
            if poisons:
                T.buffer_store(memory, T.float32(np.nan), [i])
        with T.serial(0, size) as i:
            T.buffer_store(y, memory[i], [i])
    return builder.get()


AVX2, AVX512 = registry.get("x86-avx2"), registry.get("x86-avx512")


def test_stretched_index() -> None:
    """Padding 1, 3x3: (c=1, r=2, s=1) is (1 * 4 + 2) * 4 + 1."""
    workload = problem(Layer(channels=2, height=3, width=3), AVX2).site.workload
    padded = padded_plane(workload, 8)
    assert padded.stretched(2, (3, 3))[1, 2, 1] == 25
    assert padded == Plane(row=4, channel=16, size=2 * 16 + 1 * (3 + 2) + 7)


@pytest.mark.parametrize(
    ("nonzeros", "outputs", "channels", "block"),
    [(72184, 384, 256, 32), (35342, 128, 48, 8), (33199, 192, 192, 32), (43245, 384, 256, 64)],
)
def test_column_block(nonzeros: int, outputs: int, channels: int, block: int) -> None:
    """The authors' rule on AlexNet's matrices."""
    assert column_block(nonzeros, outputs, channels) == block


def test_column_block_divides_the_channels() -> None:
    """Of empty, odd and small matrices, too."""
    assert column_block(0, 8, 24) == 24
    assert column_block(8 * 13 * 9, 8, 13) == 13
    assert column_block(8 * 30 * 9, 8, 30) == 10
    assert column_block(8 * 3 * 9, 8, 3) == 3


def test_register_tiles() -> None:
    """13x13 on AVX2 is 7 rows of 2 vectors, 56x56 2 of 7; on AVX-512 13 of 1 and 7 of 4."""
    for width, target, rows in ((13, AVX2, 7), (56, AVX2, 2), (13, AVX512, 13), (56, AVX512, 7)):
        assert problem(Layer(width=width, height=width), target).config.rows == rows


def test_padding_is_shared_by_neighbours() -> None:
    """The stretched product reads right padding from the next row's left, and there only."""
    p = problem(Layer(channels=2, outputs=3), AVX512)
    workload = p.site.workload
    padded = padded_plane(workload, 16)
    values, indices, starts = KERNEL.pack(p.site, replace(p.config, in_block=2), p.weight)
    image = np.zeros(padded.size)
    pixels = image[: 2 * padded.channel].reshape(2, 14, 14)
    pixels[:, 1:, 1:] = p.x[0]

    def product() -> Any:
        at = np.arange(13)[:, None] * padded.row + np.arange(13)
        rows = [slice(a, b) for a, b in itertools.pairwise(starts)]
        return np.stack(
            [np.tensordot(values[r], image[indices[r][:, None, None] + at], 1) for r in rows]
        )

    want = p.wanted()[0] - p.bias[:, None, None]
    assert relative_error(product(), want) < 1e-12
    before = product()
    pixels[:, 7, 0] = 100
    changed = np.any(product() != before, axis=0)
    assert changed[4:7, 12].any() and changed[5:8, 0].any()
    assert not changed[:, 1:12].any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strides": (2, 2)}, "strides"),
        ({"dilation": (2, 1)}, "dilation"),
        ({"padding": (1, 0, 1, 0)}, "padding"),
        ({"residual": True}, "residual"),
        ({"width": 256, "height": 256}, "row of 256"),
    ],
)
def test_refuses_what_the_paper_does_not_serve(change: dict[str, Any], reason: str) -> None:
    """With a reason."""
    workload = problem(Layer(), AVX2).site.workload
    assert KERNEL.refuses(workload, AVX2) is None
    why = KERNEL.refuses(replace(workload, **change), AVX2)
    assert why is not None and reason in why


def test_fits_planes_only() -> None:
    """Neither the layouts of networks nor blocks that do not divide."""
    p = problem(Layer(), AVX2)
    assert KERNEL.fits(p.site, p.config)
    lanes = whole(LaneLayout(6, make_grid(13, 13, 2, 4), (1, 1, 1, 1)))
    views = p.site.views
    for site, config in (
        (replace(p.site, views=replace(views, x=lanes)), p.config),
        (replace(p.site, views=replace(views, y=whole(plane(5, 13, 13, halo=1)))), p.config),
        (p.site, replace(p.config, in_block=4)),
    ):
        assert not KERNEL.fits(site, config)
        with pytest.raises(ValueError, match="does not fit"):
            KERNEL.prim_func(site, config, "kernel")


def test_more_nonzeros_take_longer() -> None:
    """By the estimate."""
    few, many = (problem(Layer(density=d, in_block=6), AVX2) for d in (0.1, 0.8))
    assert 0 < KERNEL.estimate_us(few.site, few.config) < KERNEL.estimate_us(many.site, many.config)
