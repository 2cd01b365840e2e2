"""The networks of the benchmarks: real shapes, seeded weights, zeros by magnitude.

Speed depends on shapes and on where zeros are, not on what a network has learned; so weights are
He-normal, the same for the same seed, with batch norms folded into them as an export would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.dynamic_models import draw_masks, dynamic_conv
from tests.models import Net
from topiarist.compiler.light_models import light_model
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.masks import unstructured_mask
from topiarist.pruning.one_shot import prune_model

BRANCH_GAIN = 0.5  # of the last layer of a residual branch, or sums would grow from block to block
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"  # beside the repository
PRUNED_ALEXNET = SHARED / "alexnet_pruned_convs.npz"
# CaffeNet of 57.48 % top-1, published with "Faster CNNs with Direct Sparse Convolutions and
# Guided Pruning" (Park et al., ICLR 2017): the share of weights that stay.
ALEXNET_DENSITY = {"conv2": 0.144, "conv3": 0.069, "conv4": 0.082, "conv5": 0.115}

FloatArray = NDArray[np.float32]


class _Builder(Net):
    """Layers as these networks have them, named; values keep their size on the way."""

    def __init__(self) -> None:
        super().__init__(opset=17, seed=0)

    def draw(self, *shape: int, gain: float = 1.0) -> FloatArray:
        """He-normal values for layers that ReLU follows."""
        values = self.rng.standard_normal(shape, np.float32)
        return values * np.float32(gain * math.sqrt(2 / math.prod(shape[1:])))

    def layer(
        self,
        data: str,
        name: str,
        out: int,
        into: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        gain: float = 1.0,
        relu: bool = True,
    ) -> str:
        """A convolution with bias, and its ReLU."""
        weight = self.draw(out, into // groups, kernel, kernel, gain=gain)
        done = self.node(
            "Conv",
            data,
            self.constant(weight, f"{name}.weight"),
            self.constant(self.draw(out) * np.float32(0.05), f"{name}.bias"),
            name=name,
            strides=[stride, stride],
            pads=[kernel // 2 if padding is None else padding] * 4,
            group=groups,
        )
        return self.node("Relu", done) if relu else done

    def max_pool(self, data: str, kernel: int = 2, padding: int = 0) -> str:
        """Max pooling with stride 2."""
        return self.node(
            "MaxPool", data, kernel_shape=[kernel] * 2, strides=[2, 2], pads=[padding] * 4
        )

    def linear(self, data: str, name: str, out: int, into: int, *, relu: bool = False) -> str:
        """A fully connected layer."""
        weight = self.constant(self.draw(out, into), f"{name}.weight")
        bias = self.constant(np.zeros(out, np.float32), f"{name}.bias")
        done = self.node("Gemm", data, weight, bias, name=name, transB=1)
        return self.node("Relu", done) if relu else done

    def scores(self, data: str, into: int) -> onnx.ModelProto:
        """Global pooling and the classifier: the end of the model."""
        pooled = self.node("Flatten", self.node("GlobalAveragePool", data))
        return self.model(self.linear(pooled, "fc", 1000, into))


class _DynamicBuilder(_Builder):
    """3x3 layers but the first are dynamic, with masks over about 2.9 of nine positions."""

    def __init__(self, holders: int) -> None:
        super().__init__()
        self.holders = holders
        sizes = [2] * 8 + [3] * 20 + [4] * 4
        self.unions = iter(self.rng.permutation(sizes).tolist())

    def layer(
        self,
        data: str,
        name: str,
        out: int,
        into: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        gain: float = 1.0,
        relu: bool = True,
    ) -> str:
        """A layer, mixed from four experts where it is one of those."""
        if kernel != 3:
            return super().layer(
                data, name, out, into, kernel, stride=stride, padding=padding, gain=gain, relu=relu
            )
        masks = draw_masks(self.rng, (3, 3), next(self.unions), self.holders)
        masked = masks[:, None, None] * self.draw(4, out, into, 3, 3)
        fan_in = np.count_nonzero(masks.any(axis=0)) * into
        experts = masked * np.float32(gain * math.sqrt(into * 9 * out / fan_in))
        size = 56 * 64 // out
        mixed = dynamic_conv(
            self, data, experts, (size, size), name=name, strides=[stride] * 2, pads=[1] * 4
        )
        bias = self.constant(self.draw(1, out, 1, 1) * np.float32(0.05))
        done = self.node("Add", mixed, bias)
        return self.node("Relu", done) if relu else done


def _basic_resnet(
    blocks: tuple[int, int, int, int], net: _Builder | None = None
) -> onnx.ModelProto:
    """A ResNet of two 3x3 convolutions a block."""
    net = net or _Builder()
    x = net.layer(net.input(1, 3, 224, 224), "conv1", 64, 3, 7, stride=2)
    x, into = net.max_pool(x, 3, padding=1), 64
    for stage, count in enumerate(blocks, 1):
        width = 32 << stage
        for block in range(count):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            shortcut = x
            if stride > 1:
                shortcut = net.layer(
                    x, f"{name}.downsample", width, into, 1, stride=stride, relu=False
                )
            x = net.layer(x, f"{name}.conv1", width, into, 3, stride=stride)
            x = net.layer(x, f"{name}.conv2", width, width, 3, gain=BRANCH_GAIN, relu=False)
            x, into = net.node("Relu", net.node("Add", x, shortcut)), width
    return net.scores(x, into)


def resnet18() -> onnx.ModelProto:
    """ResNet-18 (He et al., 2016)."""
    return _basic_resnet((2, 2, 2, 2))


def resnet34() -> onnx.ModelProto:
    """ResNet-34 (He et al., 2016)."""
    return _basic_resnet((3, 4, 6, 3))


def dynamic_resnet34(holders: int) -> onnx.ModelProto:
    """ResNet-34 as DPPNet, each position of a union of masks in so many of four experts.

    It has 65.6 % fewer multiply-adds, as the network of the paper.
    """
    return _basic_resnet((3, 4, 6, 3), _DynamicBuilder(holders))


def resnet50() -> onnx.ModelProto:
    """ResNet-50 as the onnx package has it, with batch norms."""
    return light_model("resnet50", seed=0)


def _vgg16_convs(net: _Builder) -> str:
    x, into = net.input(1, 3, 224, 224), 3
    for stage, (width, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), 1):
        for i in range(1, count + 1):
            x, into = net.layer(x, f"conv{stage}_{i}", width, into, 3), width
        x = net.max_pool(x)
    return x


def vgg16_convs() -> onnx.ModelProto:
    """The convolutions and poolings of VGG16 (Simonyan and Zisserman, 2015)."""
    net = _Builder()
    return net.model(_vgg16_convs(net))


def vgg16() -> onnx.ModelProto:
    """VGG16 with its fully connected layers."""
    net = _Builder()
    x = net.node("Flatten", _vgg16_convs(net))
    x = net.linear(x, "fc6", 4096, 512 * 7 * 7, relu=True)
    x = net.linear(x, "fc7", 4096, 4096, relu=True)
    return net.model(net.linear(x, "fc8", 1000, 4096))


def mobilenet_v1() -> onnx.ModelProto:
    """MobileNetV1 of full width (Howard et al., 2017), with ReLU6 as trained ones have it."""
    net = _Builder()
    low, high = net.constant(np.float32(0)), net.constant(np.float32(6))

    def relu6(data: str) -> str:
        return net.node("Clip", data, low, high)

    x = relu6(net.layer(net.input(1, 3, 224, 224), "conv1", 32, 3, 3, stride=2, relu=False))
    into = 32
    widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    for i, width in enumerate(widths, 2):
        stride = 2 if width > into and width > 64 else 1
        x = net.layer(x, f"conv{i}_dw", into, into, 3, stride=stride, groups=into, relu=False)
        x = net.layer(relu6(x), f"conv{i}_pw", width, into, 1, relu=False)
        x, into = relu6(x), width
    return net.scores(x, into)


def alexnet_convs() -> onnx.ModelProto:
    """The convolutions, ReLUs and poolings of AlexNet with its two groups, 227 x 227."""
    net = _Builder()
    x = net.layer(net.input(1, 3, 227, 227), "conv1", 96, 3, 11, stride=4, padding=0)
    x = net.layer(net.max_pool(x, 3), "conv2", 256, 96, 5, groups=2)
    x = net.layer(net.max_pool(x, 3), "conv3", 384, 256, 3)
    x = net.layer(x, "conv4", 384, 384, 3, groups=2)
    x = net.layer(x, "conv5", 256, 384, 3, groups=2)
    return net.model(net.max_pool(x, 3))


def pruned_alexnet_convs() -> onnx.ModelProto:
    """AlexNet's convolutions as the published network has them pruned, the first one dense.

    conv3 and conv4 are the published ones where their file lies beside the repository; the rest
    has the published densities.
    """
    model = alexnet_convs()
    published = _published_alexnet()
    weights = {}
    for layer in weighted_layers(model):
        if layer.name in published:
            weights[layer.weight_name] = published[layer.name].reshape(layer.stored_shape)
        elif layer.name in ALEXNET_DENSITY:
            kept = unstructured_mask(np.abs(layer.weight), ALEXNET_DENSITY[layer.name])
            weights[layer.weight_name] = np.where(kept, layer.weight, np.float32(0))
    replace_weights(model, weights)
    return model


def _published_alexnet() -> dict[str, FloatArray]:
    """[O, C / groups * kh * kw] of the layers in the published file, none without it."""
    if not PRUNED_ALEXNET.is_file():
        return {}
    with np.load(PRUNED_ALEXNET, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    parts = {name: _dense(arrays, name) for name in ("conv3", "conv4_1", "conv4_2")}
    return {"conv3": parts["conv3"], "conv4": np.vstack([parts["conv4_1"], parts["conv4_2"]])}


def _dense(arrays: dict[str, NDArray[np.generic]], name: str) -> FloatArray:
    """A CSR matrix of the file as an array."""
    matrix = np.zeros(tuple(arrays[f"{name}_shape"]), np.float32)
    rows = np.repeat(np.arange(len(matrix)), np.diff(arrays[f"{name}_indptr"]))
    matrix[rows, arrays[f"{name}_indices"]] = arrays[f"{name}_data"]
    return matrix


def pruned_alexnet_layers() -> dict[str, FloatArray]:
    """The pruned weights [O, C / groups, kh, kw] by layer."""
    return {layer.name: layer.weight for layer in weighted_layers(pruned_alexnet_convs())}


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "vgg16_convs": vgg16_convs,
    "vgg16": vgg16,
    "mobilenet_v1": mobilenet_v1,
}


def pruned(name: str, density: float) -> onnx.ModelProto:
    """A network of `NETWORKS` with this share of every layer's weights.

    Its first convolution and depthwise ones stay dense. VGG16's fully connected layers are pruned
    with the rest, for they are most of its weights; a lone classifier stays dense.
    """
    model = NETWORKS[name]()
    if density == 1:
        return model
    linear = [layer.name for layer in weighted_layers(model) if layer.kind != "Conv"]
    named = dict.fromkeys(linear if len(linear) > 1 else (), density)
    return prune_model(model, density=density, layer_density=named)[0]
