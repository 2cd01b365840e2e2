"""A small network that is pruned again and again, and its images."""

import numpy as np

from tests.models import Net
from topiarist.pruning.level import levels_of


def small_network(batch="N", seed=0):
    """Two convolutions with batch norms and one of two groups; a depthwise one; a classifier."""
    net = Net(seed=seed)
    x = net.node("Relu", net.conv(net.input(batch, 3, 8, 8), 16, 3, name="stem"))
    weight = net.weight(16, 16, 3, 3, name="conv1.weight")
    y = net.node("Conv", x, weight, name="conv1", pads=[1] * 4)
    y = net.node("Relu", net.batch_norm(y, 16))
    y = net.node("Add", x, net.conv(y, 16, 16, name="conv2"))
    y = net.node("Relu", net.batch_norm(y, 16))
    y = net.node("Relu", net.conv(y, 16, 16, name="depthwise", group=16))
    y = net.node("Relu", net.conv(y, 24, 16, name="grouped", group=2, strides=[2, 2]))
    y = net.node("Relu", net.conv(y, 16, 24, 1, name="point"))
    y = net.node("Flatten", net.node("GlobalAveragePool", y))
    return net.model(net.node("Gemm", y, net.weight(10, 16, name="fc.weight"), name="fc", transB=1))


def small_images(count=24, seed=1):
    """Images whose pixels depend on each other."""
    noise = np.random.default_rng(seed).standard_normal((count, 3, 9, 9)).astype(np.float32)
    return noise[:, :, 1:, 1:] + noise[:, :, :-1, :-1] + 0.5


def near(pattern, density):
    """The level of a pattern with about this density."""
    return min(levels_of(pattern), key=lambda level: abs(level.density - density))
