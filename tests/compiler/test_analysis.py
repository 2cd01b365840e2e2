"""The report per layer: shapes, FLOPs, zeros."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from topiarist.compiler.analysis import analyse
from topiarist.compiler.light_models import light_model
from topiarist.compiler.onnx_normalise import normalise

RNG = np.random.default_rng(0)


def _model(nodes, weights, x_shape, y_shape, ir_version=8):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
        [numpy_helper.from_array(np.asarray(w, np.float32), n) for n, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 13)]
    return helper.make_model(graph, ir_version=ir_version, opset_imports=opsets)


def _conv(weight, x_shape, **attributes):
    node = helper.make_node("Conv", ["x", "layer1.conv.weight"], ["y"], **attributes)
    return _model([node], {"layer1.conv.weight": weight}, x_shape, None)


@pytest.mark.parametrize("batch", [1, 3, "N", None])
def test_conv_with_an_open_batch(batch):
    weight = RNG.standard_normal((8, 6, 3, 3))
    weight[2] = 0
    weight[:, 1] = 0
    pads = [1, 1, 1, 1]
    (report,) = analyse(_conv(weight, [batch, 6, 9, 11], strides=[2, 2], pads=pads))
    n = batch if isinstance(batch, int) else 1
    assert report.layer == "layer1.conv"
    assert report.weight_shape == (8, 6, 3, 3)
    assert report.output_shape == (n, 8, 5, 6)
    assert report.strides == (2, 2)
    assert (report.pattern, report.dead_filters, report.dead_channels) == ("filter", 1, 1)
    assert report.flops_dense == 2 * 8 * 6 * 9 * 30 * n
    assert report.flops_nonzero == 2 * 7 * 5 * 9 * 30 * n
    assert report.density == pytest.approx(7 * 5 / 48)
    assert report.note == ""


def test_declared_open_output_batch():
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    weight = {"w": RNG.standard_normal((4, 4, 1, 1))}
    (report,) = analyse(_model([node], weight, ["N", 4, 5, 5], ["N", 4, 5, 5]))
    assert report.output_shape == (1, 4, 5, 5)


def test_groups():
    weight = RNG.standard_normal((6, 1, 3, 3))
    (report,) = analyse(_conv(weight, [1, 6, 8, 8], group=6))
    assert (report.groups, report.note) == (6, "depthwise")
    assert report.flops_dense == 2 * 6 * 9 * 36


def test_fully_connected_layers():
    weights = {"fc1.weight": RNG.standard_normal((10, 20)), "fc2": np.eye(10)}
    nodes = [
        helper.make_node("Gemm", ["x", "fc1.weight"], ["h"], transB=1, name="head"),
        helper.make_node("MatMul", ["h", "fc2"], ["y"]),
    ]
    first, second = analyse(_model(nodes, weights, ["N", 20], None))
    assert (first.layer, first.kind, first.weight_shape) == ("head", "Gemm", (10, 20))
    assert (first.flops_dense, first.output_shape) == (400, (1, 10))
    assert (second.layer, second.kind, second.flops_nonzero) == ("matmul_1", "MatMul", 20)


def test_shared_and_variable_weights():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["b"]),
        helper.make_node("Conv", ["b", "x"], ["y"]),
    ]
    reports = analyse(_model(nodes, {"w": np.ones((4, 4, 1, 1))}, [4, 4, 5, 5], None))
    assert [(r.layer, r.note) for r in reports] == [
        ("conv_0", ""),
        ("conv_1", "shares its weight with conv_0"),
    ]


def test_open_image_size_is_said():
    (report,) = analyse(_conv(np.ones((4, 4, 3, 3)), [1, 4, "H", "W"]))
    assert (report.output_shape, report.flops_dense) == ((), 0)
    assert "output size" in report.note


def test_json():
    (report,) = analyse(_conv(np.ones((4, 4, 3, 3)), [1, 4, 5, 5]))
    assert json.loads(json.dumps(report.to_json()))["output_shape"] == [1, 4, 3, 3]


def test_contradicting_shapes_are_an_open_size():
    (report,) = analyse(_conv(np.ones((4, 4, 3, 3)), [1, 5]))
    assert report.output_shape == ()


def test_not_finite_weights_are_noted():
    (report,) = analyse(_conv(np.full((4, 4, 3, 3), np.nan), [1, 4, 5, 5]))
    assert "NaN" in report.note


def test_light_models_have_no_constant_weights():
    path = onnx.__path__[0] + "/backend/test/data/light/light_resnet50.onnx"
    assert analyse(onnx.load(path)) == []


@pytest.mark.parametrize("name", ["resnet50", "squeezenet", "shufflenet", "inception_v1"])
def test_layers_have_the_names_that_the_compiler_uses(name):
    model = light_model(name)
    compiled = {node.name for node in normalise(model, None).graph.node}
    reports = analyse(model)
    assert len(reports) > 20
    assert {report.layer for report in reports} <= compiled
