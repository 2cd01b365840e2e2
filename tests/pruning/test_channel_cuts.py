"""Smaller copies of a network, by channels."""

import numpy as np
import pytest

from tests.models import Net, run_onnx
from topiarist.pruning.calibration import check_images
from topiarist.pruning.channel_cuts import ChannelCuts
from topiarist.pruning.layers import weighted_layers


def _network(width):
    net = Net(seed=2)
    x = net.node("Relu", net.conv(net.input("N", 3, 6, 6), width, 3, name="stem"))
    x = net.node("Relu", net.conv(x, width, width, name="middle"))
    return net.model(net.node("Flatten", net.conv(x, 4, width, 1, name="last")))


@pytest.fixture
def images():
    return {"x": np.random.default_rng(0).standard_normal((24, 3, 6, 6)).astype(np.float32)}


def test_a_share_of_the_time_goes_and_no_more(images):
    model = _network(16)
    dense_us = {"stem": 10.0, "middle": 80.0, "last": 10.0}
    cuts = ChannelCuts(model, check_images(model, images), dense_us)
    (expected,) = run_onnx(model, images)
    errors = []
    for share in (0.2, 0.5):
        smaller = cuts.without(share)
        sizes = {layer.name: layer.weight.size for layer in weighted_layers(smaller)}
        whole = {layer.name: layer.weight.size for layer in weighted_layers(model)}
        left = sum(dense_us[name] * sizes[name] / whole[name] for name in whole)
        assert (1 - share) * 100 - 15 <= left <= (1 - share) * 100
        (found,) = run_onnx(smaller, images)
        errors.append(float(np.square(found - expected).mean()))
    assert 0 < errors[0] < errors[1]


def test_there_may_be_nothing_to_cut(images):
    model = _network(1)
    cuts = ChannelCuts(model, check_images(model, images), {"middle": 1.0})
    assert cuts.without(0.3) is None
