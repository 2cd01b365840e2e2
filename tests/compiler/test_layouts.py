"""Structural facts of lattices and layouts: who reads what, and what needs no copy."""

from __future__ import annotations

import functools

import pytest

from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Conv, Graph, Subsample
from topiarist.compiler.lattice import (
    Lattice,
    assign_lattices,
    find_levels,
    laned_values,
    largest_tile,
    waste,
)
from topiarist.compiler.layouts import LayoutPlan, LayoutPlanner, halo_of
from topiarist.compiler.light_models import light_model
from topiarist.compiler.simplify import simplify
from topiarist.schedules.layout import View


@functools.cache
def planned(name: str, lanes: int) -> tuple[Graph, LayoutPlan]:
    graph = simplify(extract_layers(import_model(light_model(name))))
    (lattices, *_) = assign_lattices(find_levels(graph, lanes), 1)
    return graph, LayoutPlanner(graph, lattices, 14).plan()


@pytest.mark.parametrize("name", ["resnet50", "squeezenet", "shufflenet"])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_place_serves_its_readers(name: str, lanes: int) -> None:
    graph, plan = planned(name, lanes)
    for node in graph.nodes:
        if not isinstance(node, Conv):
            continue
        x, y = plan.reads[node.name][0].view, plan.places[node.output].view
        assert isinstance(x, View) and isinstance(y, View)
        a, b = x.layout.grid, y.layout.grid
        assert a.lanes == b.lanes == lanes and b.covers
        assert (a.rows, a.cols) == (b.rows * node.strides[0], b.cols * node.strides[1])
        if node.weight.shape[2:] != (1, 1):
            assert all(h >= n for h, n in zip(x.layout.halo, halo_of(node), strict=True))
        if node.residual is not None:
            r = plan.reads[node.name][1].view
            assert isinstance(r, View) and r.layout.grid == b


def test_resnet50_moves_little_and_adds_in_place() -> None:
    graph, plan = planned("resnet50", 16)
    assert len(plan.copies) <= 6
    residuals = [n for n in graph.nodes if isinstance(n, Conv) and n.residual is not None]
    in_place = [n for n in residuals if plan.reads[n.name][1] == plan.places[n.output]]
    assert len(residuals) == len(in_place) == 16


def test_fire_modules_write_into_their_concatenations() -> None:
    graph, plan = planned("squeezenet", 16)
    for node in graph.nodes:
        if type(node).__name__ == "Concat":
            assert {plan.places[name].buffer for name in node.inputs} == {
                plan.places[node.output].buffer
            }


def test_strided_pointwise_layers_are_compacted() -> None:
    graph, _ = planned("resnet50", 16)
    assert sum(isinstance(node, Subsample) for node in graph.nodes) >= 3
    assert not any(
        isinstance(n, Conv) and n.weight.shape[2:] == (1, 1) and n.strides != (1, 1)
        for n in graph.nodes
    )


def test_tiles_and_waste() -> None:
    assert largest_tile(7, 7, 14) == (2, 7) or largest_tile(7, 7, 14) == (1, 7)
    assert waste(Lattice(4, 4, 14, 14), (56, 56)) < waste(Lattice(4, 4, 15, 15), (56, 56))
    assert Lattice(4, 4, 7, 7).times((2, 1)) == Lattice(4, 4, 14, 7)


def test_scores_are_not_laned() -> None:
    graph, _ = planned("resnet50", 16)
    assert not set(graph.outputs) & laned_values(graph)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_each_thread_has_a_tile_where_that_leaves_enough(threads: int) -> None:
    graph, _ = planned("resnet50", 16)
    (lattices, *_) = assign_lattices(find_levels(graph, 16), 1)
    plan = LayoutPlanner(graph, lattices, 14, threads).plan()
    layouts = [p.view.layout for p in plan.places.values() if isinstance(p.view, View)]
    tiles = {(v.grid.rows * v.grid.cols, v.tile[0] * v.tile[1]) for v in layouts if v.tile}
    assert len(tiles) > 2
    for vectors, tile in tiles:
        assert tile <= max(7, min(14, vectors // threads))
        assert tile >= min(4, vectors)
