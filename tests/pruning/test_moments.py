"""Moments of what convolutions read, against ONNX Runtime's own convolution."""

import numpy as np
import pytest

from tests.models import Net, random_inputs, run_onnx
from topiarist.errors import CalibrationError
from topiarist.pruning.calibration import check_images
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.moments import damped, gather_moments, unfold


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 0, 2, 1]},
        {"strides": [2, 3], "pads": [0, 0, 0, 0]},
        {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
        {"group": 2},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {"auto_pad": "VALID"},
    ],
)
def test_weights_times_unfolded_inputs_is_the_convolution(attributes):
    net = Net()
    groups = attributes.get("group", 1)
    weight = net.weight(6, 4 // groups, 3, 3)
    attributes = {"pads": [1] * 4, **attributes} if "auto_pad" not in attributes else attributes
    model = net.model(net.node("Conv", net.input(2, 4, 9, 8), weight, **attributes))
    inputs = random_inputs(model)
    (layer,) = weighted_layers(model)
    columns = unfold(layer, inputs["x"])
    rows = layer.weight.reshape(groups, -1, columns.shape[1]).astype(np.float64)
    (expected,) = run_onnx(model, inputs)
    found = (rows @ columns).reshape(6, 2, *expected.shape[2:]).swapaxes(0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_dimension():
    net = Net()
    model = net.model(net.node("Conv", net.input(2, 3, 9), net.weight(4, 3, 3), pads=[1, 1]))
    inputs = random_inputs(model)
    (layer,) = weighted_layers(model)
    found = layer.weight.reshape(4, 9) @ unfold(layer, inputs["x"])[0]
    expected = run_onnx(model, inputs)[0]
    np.testing.assert_allclose(found.reshape(4, 2, 9).swapaxes(0, 1), expected, atol=1e-5)


def _classifier(batch):
    net = Net()
    x = net.node("Relu", net.conv(net.input(batch, 3, 6, 6), 8, 3, name="conv"))
    x = net.node("Relu", net.conv(x, 8, 8, name="deep"))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.model(net.node("Gemm", x, net.weight(5, 8, name="fc.weight"), name="fc", transB=1))


@pytest.mark.parametrize("batch", ["N", 1, 4])
def test_moments_don_t_depend_on_how_many_images_go_at_once(batch):
    images = np.random.default_rng(0).standard_normal((12, 3, 6, 6)).astype(np.float32)
    model = _classifier(batch)
    layers = weighted_layers(model)
    found = gather_moments(model, layers, check_images(model, {"x": images}))
    whole = _classifier("N")
    expected = gather_moments(whole, layers, check_images(whole, {"x": images}))
    for one, other in zip(found, expected, strict=True):
        assert one.places == other.places
        np.testing.assert_allclose(one.matrix, other.matrix, rtol=1e-4, atol=1e-6)
    assert [m.places for m in found] == [432, 432, 12]
    columns = unfold(layers[0], images)[0]
    np.testing.assert_allclose(found[0].matrix[0], columns @ columns.T / 432, rtol=1e-6, atol=1e-9)


def test_a_batch_larger_than_the_images_is_refused():
    model = _classifier(16)
    images = check_images(model, {"x": np.ones((12, 3, 6, 6), np.float32)})
    with pytest.raises(CalibrationError, match="16 images at once, there are 12"):
        gather_moments(model, weighted_layers(model), images)


def test_inputs_that_are_always_zero_are_named():
    model = _classifier("N")
    bias = next(t for t in model.graph.initializer if t.name == model.graph.node[0].input[2])
    bias.CopyFrom(type(bias).FromString(bias.SerializeToString()))
    bias.raw_data = np.full(8, -1e4, np.float32).tobytes()
    images = check_images(model, {"x": np.ones((8, 3, 6, 6), np.float32)})
    with pytest.raises(CalibrationError, match="deep: its inputs are zero for all images"):
        gather_moments(model, weighted_layers(model), images)


def test_inputs_that_overflow_are_named():
    model = _classifier("N")
    images = check_images(model, {"x": np.full((8, 3, 6, 6), 3e38, np.float32)})
    with pytest.raises(CalibrationError, match="deep: its inputs overflow or are NaN"):
        gather_moments(model, weighted_layers(model), images)


def test_damping_grows_until_there_is_an_inverse():
    x = np.random.default_rng(0).standard_normal((30, 3))
    matrix = x @ x.T  # rank 3
    matrix[0] = matrix[:, 0] = 0  # never anything else
    regular, inverse = damped("layer", matrix)
    np.testing.assert_allclose(regular @ inverse, np.eye(30), atol=1e-6)
    assert regular[0, 0] == 1


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.array([[1.0, 9.0], [9.0, 1.0]])])
def test_what_no_damping_helps_is_refused(matrix):
    with pytest.raises(CalibrationError, match=r"conv5: .* singular; calibrate with more"):
        damped("conv5", matrix)
