"""Which layouts a direct convolution can work between, and why not the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.schedules.kernel_contract import CASES, ConvCase, make_problem
from topiarist.schedules.cpu.direct import refuses_views, required_halo
from topiarist.schedules.kernel import ConvViews
from topiarist.schedules.layout import Grid, LaneLayout, View, make_grid, whole


def views_of(name: str) -> ConvViews:
    """A case's buffers for vectors of 16 lanes."""
    return make_problem(CASES[name], 16).views


def reason(name: str, views: ConvViews) -> str:
    """Why the case can't run between these views."""
    workload = make_problem(CASES[name], 16).workload
    assert refuses_views(workload, views_of(name)) is None
    why = refuses_views(workload, views)
    assert why is not None
    return why


def with_input(views: ConvViews, layout: LaneLayout) -> ConvViews:
    """The views with another input layout."""
    return replace(views, x=whole(layout))


def test_lanes_have_to_be_dealt_out_alike() -> None:
    views = views_of("density_0.3")
    layout = replace(views.x.layout, grid=make_grid(13, 13, 2, 8))
    assert "2x8 in, 4x4 out" in reason("density_0.3", with_input(views, layout))


def test_sub_images_have_to_be_a_stride_apart() -> None:
    views = views_of("stride_2")
    layout = replace(views.x.layout, grid=Grid(14, 14, 2, 8, 7, 2))
    assert "are not 2x2 those of" in reason("stride_2", with_input(views, layout))


def test_taps_need_a_padded_input() -> None:
    views = views_of("density_0.3")
    layout = replace(views.x.layout, halo=(0, 0, 0, 0), tile=(1, 1))
    assert "tiled" in reason("density_0.3", with_input(views, layout))


@pytest.mark.parametrize("side", range(4))
def test_taps_need_all_of_their_halo(side: int) -> None:
    views = views_of("kernel_5x5")
    top, left, bottom, right = (1 if i == side else 2 for i in range(4))
    halo = top, left, bottom, right
    layout = replace(views.x.layout, halo=halo)
    assert f"halo {halo}, needs (2, 2, 2, 2)" in reason("kernel_5x5", with_input(views, layout))


def test_padding_has_to_be_zero() -> None:
    views = views_of("density_0.3")
    layout = replace(views.x.layout, fill=float("-inf"))
    assert "not zero" in reason("density_0.3", with_input(views, layout))


def test_residuals_have_to_lie_as_the_output_does() -> None:
    views = views_of("residual")
    residual = View(LaneLayout(8, make_grid(13, 13, 4, 4)), 0, 8)
    assert "residual" in reason("residual", replace(views, residual=residual))


@pytest.mark.parametrize(
    ("case", "halo"),
    [
        (ConvCase(), (1, 1, 1, 1)),
        (ConvCase(strides=(2, 2)), (1, 1, 0, 0)),
        (ConvCase(padding=(0, 0, 0, 0)), (0, 0, 2, 2)),
        (ConvCase(dilation=(2, 3), padding=(2, 3, 2, 3)), (2, 3, 2, 3)),
        (ConvCase(kernel=(1, 3), padding=(0, 1, 0, 1)), (0, 1, 0, 1)),
        (ConvCase(kernel=(7, 7), strides=(2, 2), padding=(3, 3, 3, 3)), (3, 3, 2, 2)),
        (ConvCase(kernel=(1, 1), padding=(2, 0, 2, 0)), (2, 0, 0, 0)),
    ],
)
def test_halo_that_taps_reach_into(case: ConvCase, halo: tuple[int, int, int, int]) -> None:
    assert required_halo(make_problem(case, 16).workload) == halo
