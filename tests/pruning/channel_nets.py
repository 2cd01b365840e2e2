"""Networks whose channels hang together in different ways, and how to make channels useless."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.models import Net
from topiarist.pruning.channels import ChannelMap
from topiarist.pruning.layers import replace_weights


def residual() -> onnx.ModelProto:
    """Two blocks with batch norm, the second with a projection; classifier."""
    net = Net()
    x = net.node("Relu", _conv_bn(net, net.input("N", 3, 8, 8), 8, 3, "stem"))
    y = net.node("Relu", _conv_bn(net, x, 12, 8, "one"))
    x = net.node("Relu", net.node("Add", _conv_bn(net, y, 8, 12, "two"), x))
    y = net.node("Relu", _conv_bn(net, x, 16, 8, "three", strides=[2, 2]))
    skip = net.conv(x, 16, 8, 1, strides=[2, 2], name="skip")
    x = net.node("Relu", net.node("Add", _conv_bn(net, y, 16, 16, "four"), skip))
    return net.model(_classifier(net, x, 16))


def padded_shortcut() -> onnx.ModelProto:
    """The shortcut of a CIFAR ResNet: every second pixel, and channels of zeros on both sides."""
    net = Net()
    x = net.node("Relu", net.conv(net.input("N", 3, 8, 8), 8, 3, name="stem"))
    y = net.node("Relu", net.conv(x, 16, 8, strides=[2, 2], name="one"))
    y = net.conv(y, 16, 16, name="two")
    ends = [net.constant(np.array(v)) for v in ([0, 0], [8, 8], [2, 3], [2, 2])]
    skip = net.node("Slice", x, *ends)
    skip = net.node("Pad", skip, net.constant(np.array([0, 4, 0, 0, 0, 4, 0, 0])))
    return net.model(_classifier(net, net.node("Relu", net.node("Add", skip, y)), 16))


def mobile() -> onnx.ModelProto:
    """Inverted residuals, squeeze and excitation, and a depthwise layer that doubles."""
    net = Net(opset=14)
    x = net.conv(net.input("N", 3, 8, 8), 8, 3, name="stem")
    y = net.node("Clip", net.conv(x, 24, 8, 1, name="expand"), *_scalars(net, 0, 6))
    y = net.node("HardSwish", net.conv(y, 24, 24, group=24, name="depthwise"))
    gate = net.conv(net.node("GlobalAveragePool", y), 6, 24, 1, name="squeeze")
    gate = net.node("Sigmoid", net.conv(net.node("Relu", gate), 24, 6, 1, name="excite"))
    x = net.node("Add", x, net.conv(net.node("Mul", y, gate), 8, 24, 1, name="project"))
    x = net.node("PRelu", x, net.weight(8, 1, 1))
    x = net.conv(x, 16, 8, group=8, name="double")
    return net.model(_classifier(net, net.node("Mul", x, net.weight(1, 16, 1, 1)), 16))


def concatenated() -> onnx.ModelProto:
    """A fire module, then a dense block whose scales are separate nodes."""
    net = Net(opset=11)
    x = net.node("Relu", net.conv(net.input("N", 3, 8, 8), 8, 3, name="squeeze"))
    left = net.node("Relu", net.conv(x, 8, 8, 1, name="left"))
    right = net.node("Relu", net.conv(x, 12, 8, 3, name="right"))
    x = net.node("MaxPool", net.node("Concat", left, right, axis=1), kernel_shape=[2, 2])
    scale = net.node("Unsqueeze", net.weight(20), axes=[1, 2])
    y = net.conv(net.node("Relu", net.node("Mul", x, scale)), 6, 20, 3, name="grow")
    x = net.node("Concat", x, y, x, axis=1)
    return net.model(_classifier(net, x, 46))


def plain(reshape: bool = False) -> onnx.ModelProto:
    """Convolutions, then fully connected layers on all pixels."""
    net = Net()
    x = net.node("Relu", net.conv(net.input(1, 3, 8, 8), 8, 3, name="one"))
    x = net.node("MaxPool", net.conv(x, 12, 8, name="two"), kernel_shape=[2, 2], strides=[2, 2])
    if reshape:
        x = net.node("Reshape", x, net.constant(np.array([1, 192])))
    else:
        x = net.node("Flatten", x)
    x = net.node("MatMul", x, net.weight(192, 10, name="hidden.weight"))
    x = net.node("Relu", net.node("Add", x, net.weight(10)))
    return net.model(
        net.node("Gemm", x, net.weight(5, 10, name="fc.weight"), net.weight(5), transB=1)
    )


NETWORKS = {
    "residual": residual,
    "padded_shortcut": padded_shortcut,
    "mobile": mobile,
    "concatenated": concatenated,
    "plain": plain,
    "reshaped": lambda: plain(reshape=True),
}


def silence(
    model: onnx.ModelProto, channels: ChannelMap, mask: NDArray[np.bool_]
) -> onnx.ModelProto:
    """A copy in which no layer reads the channels that are not in the mask."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for item in channels.layers:
        if not item.depthwise and not mask[item.inputs].all():
            weight = item.layer.weight.copy()
            weight[:, ~mask[item.inputs]] = 0
            replace_weights(copy, {item.layer.weight_name: item.layer.as_stored(weight)})
    return copy


def some_kept(channels: ChannelMap, seed: int = 0) -> dict[str, NDArray[np.intp]]:
    """About half of each group that can be cut."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.permutation(group.size)[: (group.size + 1) // 2])
        for group in channels.groups
        if group.reason_kept is None
    }


def _conv_bn(net: Net, x: str, out: int, into: int, name: str, **attributes: Any) -> str:
    return net.batch_norm(net.conv(x, out, into, name=name, **attributes), out)


def _classifier(net: Net, x: str, channels: int) -> str:
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.node("Gemm", x, net.weight(channels, 10, name="fc.weight"), net.weight(10))


def _scalars(net: Net, *values: float) -> list[str]:
    return [net.constant(np.float32(value)) for value in values]
