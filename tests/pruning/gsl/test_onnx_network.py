"""ONNX files as modules: the same outputs as ONNX Runtime's, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "topiarist[train]"')

from onnx import numpy_helper

from tests.models import Net, run_onnx
from topiarist.errors import TrainingError
from topiarist.pruning.gsl.onnx_network import OnnxNetwork
from topiarist.pruning.layers import weighted_layers

SHARED = Path(__file__).parents[4] / "shared" / "data"


def _image(model, batch=2):
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)


def _compare(model, batch=2):
    x = _image(model, batch)
    network = OnnxNetwork(model).eval()
    with torch.no_grad():
        found = network(torch.from_numpy(x)).numpy()
    (expected,) = run_onnx(model, {model.graph.input[0].name: x})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def _windows(net, x):
    x = net.conv(x, 8, 3, name="a", pads=[0, 1, 2, 1])
    x = net.node("Clip", x, net.constant(np.float32(0)), net.constant(np.float32(6)))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])
    x = net.conv(x, 8, 8, name="b", group=2, auto_pad="SAME_LOWER", strides=[2, 2])
    return net.node("AveragePool", x, kernel_shape=[2, 2], pads=[1, 0, 0, 1])


def _branches(net, x):
    x = net.conv(x, 8, 3, name="a")
    y = net.node("LeakyRelu", x, alpha=0.2)
    z = net.node("Pad", net.node("Sigmoid", x), net.constant(np.array([0, 2, 0, 0, 0, 0, 0, 0])))
    ends = [net.constant(np.array(v)) for v in ([1, -9], [10, 99], [1, 3], [1, 2])]
    z = net.node("Slice", z, *ends)
    z = net.node("MaxPool", net.node("Concat", y, y, axis=1), kernel_shape=[1, 1])
    return net.node("ReduceMean", net.node("Sum", z, z, z), axes=[2], keepdims=1)


def _head(net, x):
    x = net.node("GlobalAveragePool", net.conv(x, 8, 3, name="a"))
    x = net.node("Flatten", x)
    matrix = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
    x = net.node("MatMul", x, net.constant(matrix), name="matrix")
    return net.node(
        "Gemm", x, net.constant(matrix[:4].T.copy()[:, :4]), net.constant(matrix[0, :4])
    )


@pytest.mark.parametrize("build", [_windows, _branches, _head])
def test_operators_agree_with_onnx_runtime(build):
    net = Net(seed=5)
    _compare(net.model(build(net, net.input(2, 3, 13, 11))))


def test_weights_go_back_under_their_names_and_zeros_stay_zeros():
    net = Net(seed=6)
    model = net.model(_head(net, net.input(1, 3, 8, 8)))
    network = OnnxNetwork(model)
    for one, other in zip(
        network.to_onnx().graph.initializer, model.graph.initializer, strict=True
    ):
        assert one.name == other.name
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    with torch.no_grad():
        for module in network.layers.values():
            module.weight[::2] = 0
    pruned = network.to_onnx()
    assert [n.output[0] for n in pruned.graph.node] == [n.output[0] for n in model.graph.node]
    for layer, before in zip(weighted_layers(pruned), weighted_layers(model), strict=True):
        np.testing.assert_array_equal(layer.weight[1::2], before.weight[1::2])
        assert not layer.weight[::2].any()
    _compare(pruned, 1)


def test_a_copy_is_a_network_of_its_own():
    net = Net(seed=7)
    network = OnnxNetwork(net.model(net.conv(net.input(1, 3, 8, 8), 4, 3, name="a")))
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.layers["a"].weight.zero_()
    assert network.layers["a"].weight.any()
    (weight,) = [layer.weight for layer in weighted_layers(other.to_onnx())]
    assert not weight.any()


def test_scores_are_those_before_the_softmax():
    net = Net(seed=8)
    x = net.node("Flatten", net.conv(net.input(1, 3, 4, 4), 4, 3, name="a"))
    model = net.model(net.node("Softmax", x))
    found = OnnxNetwork(model)(torch.from_numpy(_image(model)))
    assert not np.allclose(found.detach().sum(dim=1), 1)


def test_what_can_not_be_trained_is_named():
    net = Net(seed=9)
    x = net.node("Softplus", net.conv(net.input(1, 3, 4, 4), 4, 3, name="a"), name="odd")
    with pytest.raises(TrainingError, match="Softplus node 'odd'"):
        OnnxNetwork(net.model(x))


@pytest.mark.shared_data
def test_resnet_trains_its_batch_norms_too():
    path = SHARED / "cifar10_resnet20.onnx"
    if not path.exists():
        pytest.skip(f"needs {path.name} of the data beside the repository")
    model = onnx.load(path)
    _compare(model)
    network = OnnxNetwork(model).train()
    network(torch.randn(8, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    changed = {
        t.name
        for t, old in zip(network.to_onnx().graph.initializer, model.graph.initializer, strict=True)
        if not np.array_equal(numpy_helper.to_array(t), numpy_helper.to_array(old))
    }
    assert len(changed) == 38
    assert all("running" in name for name in changed)
