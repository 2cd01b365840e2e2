"""Layer names are those that users know, and every layer has its own."""

import pytest
from onnx import TensorProto, helper

from topiarist.pruning.layers import node_names


def _graph(nodes, weights):
    tensors = [helper.make_tensor(w, TensorProto.FLOAT, [0], []) for w in weights]
    return helper.make_graph(nodes, "g", [], [], tensors)


@pytest.mark.parametrize(
    ("node", "weight", "name"),
    [
        ("Conv_12", "layer1.0.conv1.weight", "layer1.0.conv1"),
        ("", "features/conv_w_0", "features/conv"),
        ("node_conv2d_3", "stem.weight", "stem"),
        ("/layer1/conv1/Conv", "onnx::Conv_193", "/layer1/conv1/Conv"),
        ("/layer1/conv1/Conv", "layer1.conv1.weight", "/layer1/conv1/Conv"),
        ("Conv_12", "193", "Conv_12"),
        ("", "193", "conv_0"),
    ],
)
def test_names(node, weight, name):
    assert node_names(
        _graph([helper.make_node("Conv", ["x", weight], ["y"], name=node)], [weight])
    ) == [name]


def test_names_are_unique():
    nodes = [helper.make_node("Conv", ["x", "c.weight"], [str(i)]) for i in range(3)]
    assert node_names(_graph(nodes, ["c.weight"])) == ["c", "c_2", "c_3"]
    nodes = [helper.make_node("Relu", ["x"], [str(i)], name="same") for i in range(2)]
    assert node_names(_graph(nodes, [])) == ["same", "same_2"]
