"""Rewrites of the layer graph leave its results as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.graph_reference import evaluate
from tests.models import Net, random_inputs, relative_error
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Conv, Linear, Subsample
from topiarist.compiler.simplify import convolutions_to_linear, simplify


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [0] * 4},
        {"pads": [0] * 4, "group": 2},
        {"pads": [1, 0, 1, 0], "strides": [9, 9]},
        {"pads": [2, 2, 1, 2], "dilations": [3, 2], "strides": [4, 9]},
    ],
)
def test_one_output_pixel_becomes_fully_connected(attributes: dict[str, Any]) -> None:
    net = Net()
    shape = (1, 4, 3, 3) if attributes["pads"] == [0] * 4 else (1, 4, 4, 4)
    model = net.model(net.node("Relu", net.conv(net.input(*shape), 6, 4, name="c", **attributes)))
    graph = extract_layers(import_model(model))
    simple = convolutions_to_linear(graph)
    (layer,) = (node for node in simple.nodes if isinstance(node, Linear))
    assert layer.name == "c" and layer.activation is not None
    inputs = random_inputs(model)
    (output,) = graph.outputs
    found, expected = evaluate(simple, inputs)[output], evaluate(graph, inputs)[output]
    assert relative_error(found, expected) < 1e-6


def test_a_residual_keeps_the_convolution() -> None:
    net = Net()
    x = net.input(1, 4, 1, 1)
    graph = simplify(extract_layers(import_model(net.model(net.node("Add", net.conv(x, 4, 4), x)))))
    assert [type(node) for node in graph.nodes] == [Conv]


def test_strided_pointwise_is_picked_first() -> None:
    net = Net()
    x = net.input(1, 4, 9, 8)
    strided = net.conv(x, 6, 4, 1, strides=[2, 3], name="s")
    padded = net.conv(x, 6, 4, 1, strides=[2, 2], pads=[1] * 4, name="p")
    graph = simplify(extract_layers(import_model(net.model(strided, padded))))
    pick, conv, other = graph.nodes
    assert isinstance(pick, Subsample) and isinstance(conv, Conv) and isinstance(other, Conv)
    assert (pick.strides, conv.strides, other.strides) == ((2, 3), (1, 1), (2, 2))
    assert graph.values[pick.output].shape == (1, 4, 5, 3)
    assert conv.name == "s" and np.shape(conv.weight) == (6, 4, 1, 1)
