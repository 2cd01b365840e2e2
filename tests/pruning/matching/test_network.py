"""Whole networks: outputs as ONNX Runtime has them, gradients as differences."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.models import Net, random_inputs, relative_error, run_onnx
from tests.pruning.networks import small_network
from topiarist.errors import TrainingError
from topiarist.pruning.forward import with_outputs
from topiarist.pruning.matching.match import scores
from topiarist.pruning.matching.network import Network

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
SMALL = 1e-6


def _output(model):
    return [value.name for value in model.graph.output]


def _check_gradients(model, inputs):
    """Of a random sum of the outputs, along a random direction for each parameter."""
    network, rng = Network(model, _output(model), np.float64), np.random.default_rng(0)
    outputs, pull = network.run(inputs, network.parameters)
    slopes = [rng.standard_normal(y.shape) for y in outputs]
    gradients = pull(slopes)
    assert gradients.keys() == network.parameters.keys()
    for name, value in network.parameters.items():
        direction = rng.standard_normal(value.shape)
        ends = []
        for sign in (1, -1):
            moved = {**network.parameters, name: value + sign * SMALL * direction}
            outputs, _ = network.run(inputs, moved)
            ends.append(sum(float((y * s).sum()) for y, s in zip(outputs, slopes, strict=True)))
        along = float((gradients[name] * direction).sum())
        assert along == pytest.approx((ends[0] - ends[1]) / (2 * SMALL), rel=2e-5, abs=1e-5), name


def test_a_residual_network():
    model = small_network()
    inputs = random_inputs(model, batch=3)
    (found,), _ = Network(model, _output(model)).run(inputs, Network(model, []).parameters)
    assert relative_error(found, run_onnx(model, inputs)[0]) < 1e-5
    _check_gradients(model, inputs)


def test_batch_norms_that_join_no_convolution():
    net = Net()
    x = net.conv(net.input("N", 3, 6, 6), 4, 3)
    before = net.node("Relu", net.batch_norm(net.node("Relu", x), 4))  # reads no convolution
    after = net.batch_norm(x, 4)  # its convolution has another reader
    both = net.node("Concat", before, net.node("Clip", after), axis=1)
    model = net.model(net.node("Mul", both, net.node("Sigmoid", both)), x)
    _check_gradients(model, random_inputs(model, batch=2))


def test_values_that_others_read_are_not_overwritten():
    net = Net()
    x = net.conv(net.input("N", 3, 6, 6), 3, 3)
    y = net.node("Relu", x)
    z = net.node("Add", net.node("Sub", x, y), net.node("Mul", y, net.node("Identity", y)))
    model = net.model(z, x)
    inputs = random_inputs(model, batch=2)
    network = Network(model, _output(model))
    found, _ = network.run(inputs, network.parameters)
    for ours, theirs in zip(found, run_onnx(model, inputs), strict=True):
        assert relative_error(ours, theirs) < 1e-6
    _check_gradients(model, inputs)


def test_a_weight_of_two_layers_gets_the_sum_of_their_gradients():
    net = Net()
    weight, bias = net.weight(3, 3, 3, 3, name="shared"), net.weight(3, name="bias")
    alias = net.node("Identity", weight)
    x = net.node("Relu", net.node("Conv", net.input("N", 3, 6, 6), weight, bias, pads=[1] * 4))
    model = net.model(net.node("Conv", x, alias, bias, strides=[2, 2]))
    assert Network(model, _output(model)).parameters.keys() == {"shared", "bias"}
    _check_gradients(model, random_inputs(model, batch=2))


def test_what_something_else_reads_stays():
    """A tensor that is the shift of a batch norm and the mean of one, as some exporters have it."""
    net = Net()
    zeros, ones = net.constant(np.zeros(3, "f4"), "zeros"), net.constant(np.ones(3, "f4"), "ones")
    scale = net.constant(np.ones(3, "f4"), "scale")
    x = net.node("BatchNormalization", net.input("N", 3, 4, 4), scale, zeros, zeros, ones)
    model = net.model(net.node("Mul", x, net.constant(np.float32(2))))
    assert Network(model, _output(model)).parameters.keys() == {"scale"}


def test_integers_of_the_file_and_weights_in_other_dtypes():
    net = Net(opset=14)
    weight = net.constant(net.rng.standard_normal((5, 12)).astype(np.float64), "weight")
    x = net.node("Reshape", net.input("N", 3, 2, 2), net.constant(np.array([0, -1], np.int64)))
    model = net.model(net.node("Gemm", x, weight, transB=1))
    network = Network(model, _output(model))
    assert network.parameters["weight"].dtype == np.float32


def test_operators_without_a_gradient_are_named_where_they_are_needed():
    net = Net()
    x = net.conv(net.input("N", 3, 6, 6), 4, 3)
    model = net.model(net.node("Erf", x, name="strange"))
    with pytest.raises(TrainingError, match=r"Erf node 'strange': only Add, .* have a gradient"):
        Network(model, _output(model))
    assert Network(model, [x]).parameters
    net = Net()
    first, second = net.nodes_of("MaxPool", net.input(1, 2, 4, 4), count=2, kernel_shape=[2, 2])
    with pytest.raises(TrainingError, match="more than its first output"):
        Network(net.model(first, second), [first, second])


def test_scores_are_those_before_the_softmax():
    net = Net()
    x = net.node("Flatten", net.conv(net.input("N", 3, 4, 4), 2, 3))
    assert scores(net.model(net.node("Softmax", x), x)) == [x, x]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "name",
    [
        "cifar10_resnet20",
        "cifar10_mlperftiny_resnet8",
        "imagenet_mobilenet_v2_1.0_224",
        "imagenet_squeezenet1.0_pruned",
    ],
)
def test_trained_networks(name):
    path = SHARED / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    model = onnx.load(path)
    names = scores(model)
    model = with_outputs(model, names)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    inputs = random_inputs(model)
    network = Network(model, names)
    (found,), pull = network.run(inputs, network.parameters)
    assert relative_error(found, run_onnx(model, inputs)[0]) < 1e-4
    assert pull([np.ones_like(found)]).keys() == network.parameters.keys()
    weights = {t.name for t in model.graph.initializer if numpy_helper.to_array(t).ndim == 4}
    assert weights <= network.parameters.keys()
