"""Invented networks: they run, are neither too quick nor too slow, and get the zeros asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.graph_reference import outputs_of
from topiarist.compiler.choose import Chooser
from topiarist.compiler.graph import Conv, Graph, Linear, Value
from topiarist.compiler.invent import (
    CHAIN_LAYERS,
    DENSITIES,
    PATTERNS,
    Geometry,
    chain,
    with_zeros,
)
from topiarist.compiler.lower import lower
from topiarist.compiler.parts import Parts
from topiarist.compiler.trial import Trial
from topiarist.pruning.patterns import find_pattern
from topiarist.targets import registry


def convs(graph: Graph) -> list[Conv]:
    return [node for node in graph.nodes if isinstance(node, Conv)]


def geometries(graph: Graph) -> list[Geometry]:
    return [
        Geometry(
            graph.values[node.inputs[0]].shape[2],
            graph.values[node.inputs[0]].shape[1],
            *(node.weight.shape[0], node.weight.shape[2], node.strides[0], node.groups),
        )
        for node in convs(graph)
    ]


def test_one_seed_one_chain() -> None:
    first, second = (chain(np.random.default_rng(5)) for _ in range(2))
    assert geometries(first) == geometries(second)
    assert all(
        np.array_equal(a.weight, b.weight) for a, b in zip(convs(first), convs(second), strict=True)
    )
    assert geometries(chain(np.random.default_rng(6))) != geometries(first)


def test_chains_have_all_kinds_of_layers_of_reasonable_size() -> None:
    found = [chain(np.random.default_rng(seed)) for seed in range(40)]
    layers = [layer for graph in found for layer in geometries(graph)]
    assert all(len(graph.nodes) == CHAIN_LAYERS for graph in found)
    assert np.mean([layer.reasonable for layer in layers]) > 0.95
    assert {layer.kernel for layer in layers} == {1, 3, 5, 7}
    assert {layer.stride for layer in layers} == {1, 2}
    assert any(layer.groups == layer.in_channels > 1 for layer in layers)
    nodes = [node for graph in found for node in convs(graph)]
    assert 0.05 < np.mean([node.residual is not None for node in nodes]) < 0.6
    assert all(np.count_nonzero(node.weight) > 0.999 * node.weight.size for node in nodes)


def test_a_chain_is_a_sound_graph() -> None:
    """Every layer's shape is that of its value, residuals included."""
    for seed in range(3):
        graph = _smaller(chain(np.random.default_rng(seed)))
        x = np.random.default_rng(0).standard_normal(graph.values["x"].shape, np.float32)
        (y,) = outputs_of(graph, {"x": x})
        assert np.isfinite(y).all()


def _smaller(graph: Graph) -> Graph:
    """Up to the first layer that the slow reference would take long for."""
    names = []
    for node, layer in zip(convs(graph), geometries(graph), strict=True):
        names.append(node.name)
        if layer.in_channels * layer.out_channels * layer.kernel**2 * layer.out_side**2 > 3e7:
            break
    nodes = graph.nodes[: len(names)]
    return Graph(nodes, graph.values, graph.inputs, (nodes[-1].output,))


def test_a_chain_compiles_and_runs() -> None:
    """A lowered chain computes what the graph says."""
    graph = next(
        found
        for found in map(_smaller, (chain(np.random.default_rng(seed)) for seed in range(20)))
        if len(found.nodes) > 2 and any(node.residual for node in convs(found))
    )
    graph = with_zeros(graph, np.random.default_rng(0), [node.name for node in graph.nodes])
    parts = Parts(registry.get("host"), 1)
    (plan,) = Chooser(graph, parts, dense=False, mode="estimate", progress=_quiet).plans()
    runnable = Trial(parts).prepare(lower(graph, plan, parts))
    for function, args in runnable.calls:
        function(*args)
    x = np.random.default_rng(0).standard_normal(graph.values["x"].shape).astype(np.float32)
    (expected,) = outputs_of(graph, {"x": x})
    found = runnable.calls[-1][1][-1].numpy().reshape(expected.shape)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def _quiet(stage: str, done: int, total: int) -> None:
    pass


def test_hard_layers_are_drawn_again_with_other_channels() -> None:
    hard = [Geometry(14, 128, 96, 3), Geometry(14, 64, 256, 1)]
    drawn = [geometries(chain(np.random.default_rng(seed), hard)) for seed in range(12)]
    alike = [
        layer
        for layers in drawn
        for layer in layers
        if (layer.side, layer.kernel, layer.stride) == (14, 3, 1)
        and 128 / 2.5 < layer.in_channels < 128 * 2.5
        and 96 / 2.5 < layer.out_channels < 96 * 2.5
    ]
    assert len(alike) >= 3
    assert len({(layer.in_channels, layer.out_channels) for layer in alike}) >= 3
    assert all(len(layers) == CHAIN_LAYERS for layers in drawn)


def test_the_geometry_of_a_recorded_layer() -> None:
    workload = {
        "in_channels": 64, "height": 14, "width": 14, "out_channels": 128, "kernel": [3, 3],
        "strides": [2, 2], "padding": [1, 1, 1, 1], "groups": 1,
    }  # fmt: skip
    assert Geometry.of(workload) == Geometry(14, 64, 128, 3, 2)
    for change in (
        {"width": 7},
        {"kernel": [1, 3]},
        {"kernel": [2, 2]},
        {"strides": [1, 2]},
        {"groups": 64},
        {"padding": [0, 0, 0, 0]},
        {"out_channels": 1},
        {"out_channels": 60_000},
    ):
        assert Geometry.of({**workload, **change}) is None
    assert Geometry.of({"kind": "linear", "inputs": 3}) is None


def one_conv(out: int = 64, into: int = 64, kernel: int = 3, groups: int = 1) -> Graph:
    weight = np.ones((out, into // groups, kernel, kernel), np.float32)
    node = Conv(
        name="conv", inputs=("x",), output="y", weight=weight,
        bias=np.zeros(out, np.float32), padding=(kernel // 2,) * 4, groups=groups,
    )  # fmt: skip
    values = {"x": Value("x", (1, into, 8, 8)), "y": Value("y", (1, out, 8, 8))}
    return Graph((node,), values, ("x",), ("y",))


def test_zeros_have_the_patterns_and_densities_that_were_asked_for() -> None:
    random = np.random.default_rng(0)
    weights = [convs(with_zeros(one_conv(), random, ["conv"]))[0].weight for _ in range(150)]
    found = [find_pattern(weight) for weight in weights]
    kinds = [pattern.kind for pattern in found]
    assert {*kinds} == {*PATTERNS, "dense"}
    assert 0.1 < kinds.count("dense") / len(kinds) < 0.35
    assert kinds.count("unstructured") > kinds.count("block4x1")
    densities = [pattern.density for pattern in found if pattern.kind != "dense"]
    assert DENSITIES[0] * 0.9 <= min(densities) and max(densities) <= DENSITIES[1] * 1.05
    middle = math.exp(sum(map(math.log, DENSITIES)) / 2)
    assert 0.3 < np.mean([density < middle for density in densities]) < 0.7


def test_only_the_named_layers_change() -> None:
    graph = chain(np.random.default_rng(0))
    changed = with_zeros(graph, np.random.default_rng(0), ["conv1"])
    for before, after in zip(convs(graph), convs(changed), strict=True):
        assert (before is after) == (before.name != "conv1")
        assert after.weight.shape == before.weight.shape and after.weight.dtype == np.float32


def test_depthwise_layers_keep_all_weights() -> None:
    graph = one_conv(32, 32, groups=32)
    for seed in range(10):
        (node,) = convs(with_zeros(graph, np.random.default_rng(seed), ["conv"]))
        assert np.count_nonzero(node.weight) == node.weight.size


def test_fully_connected_layers_get_zeros_too() -> None:
    node = Linear(
        name="fc", inputs=("x",), output="y",
        weight=np.ones((10, 64), np.float32), bias=np.zeros(10, np.float32),
    )  # fmt: skip
    graph = Graph((node,), {"x": Value("x", (1, 64)), "y": Value("y", (1, 10))}, ("x",), ("y",))
    densities = set()
    for seed in range(10):
        (found,) = with_zeros(graph, np.random.default_rng(seed), ["fc"]).nodes
        assert isinstance(found, Linear) and found.weight.shape == (10, 64)
        densities.add(np.count_nonzero(found.weight))
    assert len(densities) > 4


@pytest.mark.parametrize("stride", [1, 2])
def test_the_plane_after_a_layer(stride: int) -> None:
    assert Geometry(27, 8, 8, 3, stride).out_side == (27 if stride == 1 else 14)
