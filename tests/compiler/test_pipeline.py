"""Whole compilations of small models, against ONNX Runtime: every layer form, sparse and dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.models import Net, random_inputs, run_onnx, worst_error
from topiarist.compiler.compiled import CompiledModel
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.session import Session
from topiarist.errors import TargetError
from topiarist.schedules.cpu.kernels import BlockSparse, DirectSparse
from topiarist.schedules.kernel import ConvKernel
from topiarist.targets import registry
from topiarist.targets.detect import runs_here

Build = Callable[[Net], tuple[str, ...]]
TOLERANCE = 1e-5
DENSITY = 0.1
CASES: dict[str, Build] = {}


def case(build: Build) -> Build:
    """A model by the name of its function."""
    CASES[build.__name__] = build
    return build


def sparsified(model: onnx.ModelProto, density: float = DENSITY) -> onnx.ModelProto:
    """The model with the smallest weights of each convolution and matrix at zero."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim in (2, 4) and array.dtype == np.float32 and array.size > 4:
            kept = np.quantile(np.abs(array), 1 - density)
            pruned = np.where(np.abs(array) >= kept, array / density**0.5, 0)
            tensor.CopyFrom(numpy_helper.from_array(pruned.astype(np.float32), tensor.name))
    return model


def build_model(build: Build, density: float = DENSITY) -> onnx.ModelProto:
    net = Net()
    return sparsified(net.model(*build(net)), density)


def opened(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[CompiledModel, Session]:
    """Compile, by estimate unless told otherwise, and open the bundle."""
    onnx.save(model, folder / "model.onnx")
    options = {"measure": False, **options}
    compiled = compile_model(folder / "model.onnx", output=folder / "model.topi", **options)
    return compiled, Session(folder / "model.topi")


def check(model: onnx.ModelProto, session: Session, seed: int = 1) -> None:
    """A run agrees with ONNX Runtime, whatever an earlier one left in memory."""
    inputs = random_inputs(model, seed=seed)
    expected = run_onnx(model, inputs)
    for poison in (np.nan, 1e30):
        session.run(None, {name: np.full_like(a, poison) for name, a in inputs.items()})
        assert worst_error(session.run(None, inputs), expected) < TOLERANCE


def relu(net: Net, data: str) -> str:
    return net.node("Relu", data)


# Convolutions


@case
def strides(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 3, 29, 23), 8, 3, strides=[2, 2])
    x = relu(net, net.conv(x, 12, 8, 5, strides=[2, 1]))
    return (net.conv(x, 8, 12, 3, strides=[3, 3]),)


@case
def dilation(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 20, 20), 8, 4, dilations=[2, 2], pads=[2] * 4)
    return (net.conv(x, 8, 8, dilations=[3, 2], strides=[2, 1], pads=[3, 2, 3, 2]),)


@case
def groups(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 12, 14, 14), 8, 12, group=4)
    return (net.conv(relu(net, x), 12, 8, 1, group=2, pads=[0] * 4),)


@case
def depthwise(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 16, 14, 14), 16, 16, group=16)
    x = net.node("Clip", x, net.constant(np.float32(0)), net.constant(np.float32(6)))
    x = net.conv(x, 24, 16, 1)
    return (net.conv(x, 24, 24, 3, group=24, strides=[2, 2]),)


@case
def channel_multiplier(net: Net) -> tuple[str, ...]:
    return (net.conv(net.input(1, 6, 9, 9), 12, 6, group=6),)


@case
def asymmetric_pads(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 13, 11), 8, 4, pads=[0, 2, 3, 0])
    x = net.conv(x, 8, 8, strides=[2, 2], pads=[1, 0, 0, 1])
    return (net.conv(x, 8, 8, 4, auto_pad="SAME_LOWER"),)


@case
def wide_pads(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 6, 6), 8, 4, 1, pads=[2, 3, 2, 3])
    return (net.conv(x, 8, 8, 3, pads=[4, 4, 4, 4]),)


@case
def kernels_that_are_no_square(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 12, 17)
    for kernel, pads in (((1, 7), [0, 3, 0, 3]), ((5, 1), [2, 0, 2, 0]), ((2, 4), [0, 1, 1, 2])):
        weight = net.weight(8, 4 if x == "x" else 8, *kernel)
        x = net.node("Conv", x, weight, pads=pads)
    return (x,)


@case
def strided_pointwise(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 8, 14, 14), 16, 8))
    one = net.conv(x, 8, 16, 1, strides=[2, 2])
    other = net.conv(x, 8, 16, 1, strides=[3, 2], pads=[0] * 4)
    return net.conv(one, 8, 8), other


@case
def strided_pointwise_of_an_input(net: Net) -> tuple[str, ...]:
    return (net.conv(net.conv(net.input(1, 8, 15, 15), 8, 8, 1, strides=[2, 2]), 8, 8),)


@case
def one_output_pixel(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 3, 7, 5), 8, 3))
    grouped = net.node("Conv", x, net.weight(12, 4, 7, 5), net.weight(12), group=2)
    return (net.node("Relu", grouped),)


@case
def one_output_pixel_with_padding(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 3, 5, 5), 8, 3))
    return (net.conv(x, 8, 8, 3, dilations=[2, 3], pads=[0, 1, 0, 1], strides=[2, 2]),)


@case
def one_pixel_planes(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 8, 1, 1), 16, 8, 1)
    y = relu(net, net.conv(x, 16, 16, 3))
    return (net.node("Add", net.conv(y, 16, 16, 1), x),)


@case
def squeeze_and_excite(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 3, 10, 10), 16, 3))
    gate = relu(net, net.conv(net.node("GlobalAveragePool", x), 8, 16, 1))
    gate = net.node("Sigmoid", net.conv(gate, 16, 8, 1))
    return (net.conv(net.node("Mul", x, gate), 8, 16),)


@case
def one_row(net: Net) -> tuple[str, ...]:
    return (net.conv(net.conv(net.input(1, 4, 1, 40), 8, 4), 8, 8, 3, strides=[1, 2]),)


@case
def an_all_zero_convolution(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 8, 8)
    zeros = net.constant(np.zeros((8, 4, 3, 3), np.float32))
    silent = net.node("Conv", x, zeros, net.weight(8), pads=[1] * 4)
    return (net.node("Add", net.conv(x, 8, 4), silent),)


# Concatenations


@case
def fire(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 8, 13, 13), 8, 8, 1))
    parts = relu(net, net.conv(x, 12, 8, 1)), relu(net, net.conv(x, 20, 8, 3))
    return (net.conv(net.node("Concat", *parts, axis=1), 8, 32, 1),)


@case
def nested_concats(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 12, 12), 8, 4)
    for _ in range(3):
        x = net.node("Concat", x, net.conv(relu(net, x), 4, 8 + 4 * _, 3), axis=1)
    return (net.conv(x, 8, 20, 3, strides=[2, 2]),)


@case
def a_part_used_elsewhere(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 12, 12)
    part = relu(net, net.conv(x, 8, 4))
    whole = net.node("Concat", part, net.conv(x, 8, 4, 1), axis=1)
    later = net.conv(part, 16, 8, 3)
    pooled = net.node("MaxPool", part, kernel_shape=[2, 2], strides=[2, 2])
    return net.node("Add", later, whole), pooled


@case
def a_part_in_two_concats(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 12, 12)
    a, b = net.conv(x, 8, 4), net.conv(x, 4, 4)
    return (
        net.conv(net.node("Concat", a, b, axis=1), 8, 12),
        net.conv(net.node("Concat", b, a, axis=1), 8, 12),
    )


@case
def a_part_twice(net: Net) -> tuple[str, ...]:
    part = net.conv(net.input(1, 4, 9, 9), 8, 4)
    return (net.conv(net.node("Concat", part, part, axis=1), 8, 16, 3),)


@case
def an_input_in_a_concat(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 9, 9)
    return (net.conv(net.node("Concat", x, net.conv(x, 8, 4), x, axis=1), 8, 16, 3),)


@case
def pooled_parts(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 8, 14, 14), 8, 8)
    pool = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    parts = net.conv(x, 8, 8, 3, strides=[2, 2]), pool
    joined = net.node("Concat", *parts, axis=1)
    mean = net.node("AveragePool", joined, kernel_shape=[3, 3], pads=[1] * 4)
    return (net.conv(mean, 8, 16, 1),)


@case
def a_concat_that_is_an_output(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 9, 9)
    part = net.conv(x, 8, 4)
    return net.node("Concat", part, net.conv(part, 4, 8), axis=1), part


# Residuals


@case
def residual_chain(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 8, 14, 14), 16, 8))
    for _ in range(3):
        y = relu(net, net.conv(x, 8, 16, 1))
        y = net.conv(relu(net, net.conv(y, 8, 8)), 16, 8, 1)
        x = relu(net, net.node("Add", y, x))
    return (net.node("GlobalAveragePool", x),)


@case
def a_residual_read_again_later(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 8, 10, 10), 8, 8))
    y = net.node("Add", net.conv(relu(net, net.conv(x, 8, 8)), 8, 8), x)
    return (net.node("Add", net.conv(y, 8, 8), x),)


@case
def a_residual_that_is_an_output(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 8, 10, 10), 8, 8))
    return net.node("Add", net.conv(relu(net, net.conv(x, 8, 8)), 8, 8), x), x


@case
def a_residual_that_the_convolution_reads(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 8, 10, 10), 8, 8))
    return (net.conv(net.node("Add", net.conv(x, 8, 8), x), 8, 8),)


@case
def a_residual_that_is_an_input(net: Net) -> tuple[str, ...]:
    x = net.input(1, 8, 10, 10)
    return (net.conv(net.node("Add", net.conv(relu(net, x), 8, 8), x), 8, 8),)


@case
def a_residual_seen_through_a_view(net: Net) -> tuple[str, ...]:
    """The flattened residual is read after the addition."""
    x = relu(net, net.conv(net.input(1, 8, 6, 6), 8, 8))
    flat = net.node("Flatten", x)
    y = net.node("Add", net.conv(relu(net, net.conv(x, 8, 8)), 8, 8), x)
    return net.conv(y, 8, 8), net.node("Gemm", flat, net.weight(10, 288), transB=1)


@case
def a_residual_that_is_part_of_a_concat(net: Net) -> tuple[str, ...]:
    x = net.input(1, 8, 10, 10)
    part = relu(net, net.conv(x, 8, 8))
    whole = net.node("Concat", part, net.conv(x, 8, 8), axis=1)
    y = net.node("Add", net.conv(relu(net, net.conv(part, 8, 8)), 8, 8), part)
    return net.conv(y, 8, 8), net.conv(whole, 8, 16)


@case
def a_strided_shortcut(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 8, 14, 14), 8, 8))
    y = net.conv(relu(net, net.conv(x, 8, 8, 3, strides=[2, 2])), 16, 8)
    y = relu(net, net.node("Add", y, net.conv(x, 16, 8, 1, strides=[2, 2])))
    return (net.node("Add", net.conv(relu(net, net.conv(y, 16, 16)), 16, 16), y),)


@case
def additions_without_a_convolution(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 8, 10, 10), 8, 8)
    pooled = net.node("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4)
    total = relu(net, net.node("Add", pooled, net.node("Add", x, x)))
    return (net.conv(total, 8, 8),)


# Pooling


@case
def max_pool_of_negative_values(net: Net) -> tuple[str, ...]:
    shift = net.constant(np.full((8, 1, 1), -9, np.float32))
    x = net.node("Add", net.conv(net.input(1, 4, 11, 13), 8, 4), shift)
    both = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    return net.conv(both, 8, 8), net.conv(x, 8, 8)


@case
def max_pool_of_an_input(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 11, 13)
    x = net.node("MaxPool", x, kernel_shape=[2, 3], strides=[1, 2], pads=[1, 0, 0, 1])
    return (net.conv(x, 8, 4),)


@case
def average_pools(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 11, 13), 8, 4)
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    counted = net.node("AveragePool", x, count_include_pad=1, **window)
    return net.conv(net.node("AveragePool", x, **window), 8, 8), counted


@case
def ceil_mode(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 14, 12), 8, 4)
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}
    return net.conv(net.node("MaxPool", x, **window), 8, 8), net.node("AveragePool", x, **window)


@case
def global_pool(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 4, 9, 7), 12, 4))
    flat = net.node("Flatten", net.node("GlobalAveragePool", x))
    return (net.node("Gemm", flat, net.weight(10, 12), net.weight(10), transB=1),)


@case
def global_max_pool(net: Net) -> tuple[str, ...]:
    return (net.node("GlobalMaxPool", net.conv(net.input(1, 4, 9, 7), 12, 4)),)


# Other operators between the layers


@case
def channel_shuffle(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 8, 10, 10), 12, 8, 1))
    apart = net.node("Reshape", x, net.constant(np.array([1, 3, 4, 10, 10])))
    mixed = net.node("Transpose", apart, perm=[0, 2, 1, 3, 4])
    x = net.node("Reshape", mixed, net.constant(np.array([1, 12, 10, 10])))
    return (net.conv(x, 12, 12, 3, group=3),)


@case
def local_response_norm(net: Net) -> tuple[str, ...]:
    x = net.node("LRN", net.conv(net.input(1, 4, 9, 9), 8, 4), size=5, alpha=0.1, beta=0.75)
    return (net.conv(x, 8, 8),)


@case
def sigmoid_and_softmax(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 9, 9), 8, 4)
    x = net.conv(net.node("Mul", x, net.node("Sigmoid", x)), 8, 8)
    return (net.node("Softmax", x, axis=1),)


@case
def batch_norm_after_a_pool(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 12, 12), 8, 4)
    x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    return (net.conv(relu(net, net.batch_norm(x, 8)), 8, 8),)


@case
def resize(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 6, 6), 8, 4)
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    mode = {"mode": "nearest", "nearest_mode": "floor"}
    x = net.node("Resize", x, "", scales, coordinate_transformation_mode="asymmetric", **mode)
    return (net.conv(x, 8, 8),)


@case
def padding_and_slices(net: Net) -> tuple[str, ...]:
    x = net.conv(net.input(1, 4, 12, 12), 8, 4)
    pads = net.constant(np.array([0, 2, 1, 0, 0, 1, 0, 2]))
    wider = net.node("Pad", x, pads)
    bounds = [net.constant(np.array(b)) for b in ([0, 0], [12, 12], [2, 3], [2, 2])]
    return net.conv(wider, 8, 11), net.conv(net.node("Slice", x, *bounds), 8, 8)


@case
def fully_connected(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 4, 8, 8), 8, 4))
    x = net.node("Gemm", net.node("Flatten", x), net.weight(20, 512), net.weight(20), transB=1)
    return (net.node("MatMul", relu(net, x), net.weight(20, 7)),)


# Inputs and outputs


@case
def several_outputs(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(1, 4, 10, 10), 8, 4))
    y = net.conv(x, 8, 8)
    return x, y, net.node("Flatten", y), net.node("Concat", x, y, axis=1)


@case
def several_inputs(net: Net) -> tuple[str, ...]:
    a, b = net.input(1, 4, 10, 10, name="a"), net.input(1, 8, 5, 5, name="b")
    small = net.conv(a, 8, 4, 3, strides=[2, 2])
    return (net.conv(net.node("Add", small, b), 8, 8),)


@case
def an_output_that_is_an_input(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 10, 10)
    return net.conv(x, 8, 4), net.node("Identity", x)


@case
def an_output_that_is_an_input_flattened(net: Net) -> tuple[str, ...]:
    x = net.input(1, 4, 10, 10)
    return net.node("Flatten", x), net.conv(x, 8, 4)


@case
def an_output_given_twice(net: Net) -> tuple[str, ...]:
    y = net.conv(net.input(1, 4, 10, 10), 8, 4)
    return net.node("Identity", y), y, net.node("Flatten", y)


@case
def an_output_that_is_a_view(net: Net) -> tuple[str, ...]:
    y = net.conv(net.input(1, 4, 10, 10), 8, 4)
    flat = net.node(
        "Reshape", net.node("ReduceMean", y, axes=[1]), net.constant(np.array([1, 100]))
    )
    return flat, net.conv(relu(net, y), 8, 8)


@case
def batch_of_three(net: Net) -> tuple[str, ...]:
    x = relu(net, net.conv(net.input(3, 4, 11, 11), 8, 4))
    y = net.conv(relu(net, net.conv(x, 8, 8, 3, group=4)), 8, 8, 1)
    x = net.node("Concat", net.node("Add", y, x), net.conv(x, 4, 8), axis=1)
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    flat = net.node("Flatten", net.node("GlobalAveragePool", net.conv(x, 16, 12, 1)))
    return net.node("Gemm", flat, net.weight(10, 16), net.weight(10), transB=1), x


# A few that together have every kernel, in-place writes and moves between layouts.
TYPICAL = (
    "strides",
    "dilation",
    "depthwise",
    "one_output_pixel_with_padding",
    "squeeze_and_excite",
    "nested_concats",
    "residual_chain",
    "a_strided_shortcut",
    "max_pool_of_negative_values",
    "ceil_mode",
    "channel_shuffle",
    "fully_connected",
    "batch_of_three",
)
ALL = [
    pytest.param(name, marks=() if name in TYPICAL else pytest.mark.slow, id=name) for name in CASES
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_by_estimate(name: str, dense: bool, tmp_path: Path) -> None:
    model = build_model(CASES[name])
    compiled, session = opened(model, tmp_path, dense=dense)
    check(model, session)
    if dense:
        assert not any("sparse" in layer.kernel for layer in compiled.layers)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2", "x86-sse4"])
def test_each_target(name: str, target: str, tmp_path: Path) -> None:
    spec = registry.get(target)
    if reason := runs_here(spec):
        pytest.skip(reason)
    model = build_model(CASES[name])
    compiled, session = opened(model, tmp_path, target=spec)
    assert compiled.target == spec
    check(model, session)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kernel", [DirectSparse, BlockSparse])
def test_each_sparse_kernel(
    name: str, kernel: type[ConvKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel takes every layer that it doesn't refuse."""
    monkeypatch.setattr(kernel, "estimate_us", lambda *_: 0.0)
    model = build_model(CASES[name])
    compiled, session = opened(model, tmp_path)
    convs = [layer for layer in compiled.layers if layer.kind == "conv"]
    assert all(layer.kernel == kernel.name or kernel.name in layer.reason for layer in convs)
    check(model, session)


@pytest.mark.parametrize("name", ["strides", "nested_concats", "batch_of_three"])
def test_two_threads(name: str, tmp_path: Path) -> None:
    model = build_model(CASES[name])
    _, session = opened(model, tmp_path, threads=2)
    assert session.threads == 2
    check(model, session)


def test_batch_override(tmp_path: Path) -> None:
    net = Net()
    x = relu(net, net.conv(net.input("n", 4, 9, 9), 8, 4))
    model = sparsified(net.model(net.node("Add", net.conv(x, 8, 8), x)))
    _, session = opened(model, tmp_path, batch=2)
    assert session.inputs[0].shape == (2, 4, 9, 9)
    inputs = random_inputs(model, batch=6)
    assert worst_error(session.run(None, inputs), run_onnx(model, inputs)) < TOLERANCE


def test_dense_weights(tmp_path: Path) -> None:
    """Nothing pruned: the sparse kernels refuse, with the reason."""
    model = build_model(residual_chain, density=1.0)
    compiled, session = opened(model, tmp_path)
    check(model, session)
    assert {layer.kernel for layer in compiled.layers} == {"direct_dense"}
    assert all("density 1.00 is above" in layer.reason for layer in compiled.layers)


@pytest.mark.parametrize("name", ["residual_chain", "nested_concats", "strided_pointwise"])
def test_runs_do_not_depend_on_each_other(name: str, tmp_path: Path) -> None:
    model = build_model(CASES[name])
    _, session = opened(model, tmp_path)
    one, other = (random_inputs(model, seed=seed) for seed in (1, 2))
    first = session.run(None, one)
    second = session.run(None, other)
    for inputs, expected in ((one, first), (other, second), (one, first)):
        for found, wanted in zip(session.run(None, inputs), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_sessions_of_one_bundle(tmp_path: Path) -> None:
    model = build_model(residual_chain)
    _, one = opened(model, tmp_path)
    other = Session(tmp_path / "model.topi")
    check(model, one, seed=1)
    check(model, other, seed=2)
    check(model, one, seed=3)


def test_a_replaced_bundle_is_loaded_anew(tmp_path: Path) -> None:
    """The loader knows libraries by their paths, and this path has a new library."""
    _, old = opened(build_model(strides), tmp_path)
    model = build_model(fire)
    _, new = opened(model, tmp_path)
    check(model, new)
    check(build_model(strides), old)


def test_measured(tmp_path: Path) -> None:
    """Every layer says what was timed, a dense kernel among it, and why the fastest was taken."""
    net = Net()
    x = relu(net, net.conv(net.input(1, 3, 12, 12), 8, 3, name="first"))
    x = net.node("Add", net.conv(x, 8, 8, name="second"), x)
    flat = net.node("Flatten", net.node("GlobalAveragePool", x))
    model = net.model(
        net.node("Gemm", flat, net.weight(10, 8), net.weight(10), name="last", transB=1)
    )
    model = sparsified(model)
    stages = []
    compiled, session = opened(
        model, tmp_path, measure=True, progress=lambda stage, *_: stages.append(stage)
    )
    check(model, session)
    assert [layer.layer for layer in compiled.layers] == ["first", "second", "last"]
    for layer in compiled.layers:
        assert layer.run_us is not None and layer.run_us > 0
        assert layer.reason and "estimate" not in layer.reason
        assert any("dense" in name for name, _ in layer.candidates)
        assert any("sparse" in name for name, _ in layer.candidates)
    assert stages[0] == "import"


def test_stages_are_dumped(tmp_path: Path) -> None:
    opened(build_model(fire), tmp_path, dump_dir=tmp_path / "dump")
    found = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert [name[0] for name in found] == ["1", "2", "3", "4", "5"]
    assert all((tmp_path / "dump" / name).stat().st_size for name in found)


def test_timing_needs_a_target_that_runs_here(tmp_path: Path) -> None:
    spec = dataclasses.replace(registry.get("x86-avx2"), required_features=("avx1024",))
    with pytest.raises(TargetError, match=r"avx1024.*--no-measure"):
        opened(build_model(fire), tmp_path, target=spec, measure=True)


def test_wrong_threads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        opened(build_model(fire), tmp_path, threads=0)
