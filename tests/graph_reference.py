"""Evaluate a layer graph in NumPy, layer by layer: what lowering has to agree with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.graph import (
    Activation,
    Add,
    Affine,
    Concat,
    Conv,
    DynamicConv,
    GlobalPool,
    Graph,
    Linear,
    Node,
    Opaque,
    Pool,
    Subsample,
    View,
)

Array = NDArray[Any]


def evaluate(graph: Graph, inputs: dict[str, Array]) -> dict[str, Array]:
    """All values of the graph by name; checks that each has the shape the graph says."""
    values = dict(inputs)
    for node in graph.nodes:
        arrays = [values[name] for name in node.inputs]
        result = _evaluate(node, arrays, graph.values[node.output].shape)
        expected = graph.values[node.output]
        assert result.shape == expected.shape, (node.name, result.shape, expected.shape)
        assert str(result.dtype) == expected.dtype, (node.name, result.dtype, expected.dtype)
        values[node.output] = result
    return values


def outputs_of(graph: Graph, inputs: dict[str, Array]) -> list[Array]:
    """The graph's results, in order."""
    values = evaluate(graph, inputs)
    return [values[name] for name in graph.outputs]


def _evaluate(node: Node, inputs: list[Array], shape: tuple[int, ...]) -> Array:
    if isinstance(node, DynamicConv):
        return _dynamic_conv(node, inputs)
    if isinstance(node, Conv):
        return _conv(node, inputs)
    if isinstance(node, Linear):
        return _activate(inputs[0] @ node.weight.T + node.bias, node.activation)
    if isinstance(node, Pool):
        return _pool(node, inputs[0], shape)
    if isinstance(node, GlobalPool):
        return np.asarray(inputs[0].mean(axis=(2, 3), keepdims=True))
    if isinstance(node, Subsample):
        return inputs[0][:, :, :: node.strides[0], :: node.strides[1]]
    if isinstance(node, Add):
        return _activate(inputs[0] + inputs[1], node.activation)
    if isinstance(node, Affine):
        return _affine(node, inputs[0])
    if isinstance(node, Concat):
        return np.concatenate(inputs, axis=1)
    if isinstance(node, View):
        return inputs[0].reshape(shape)
    assert isinstance(node, Opaque)
    return run_opaque(node, inputs)


def _activate(array: Array, activation: Activation | None) -> Array:
    if activation is None:
        return array
    low = -np.inf if activation.low is None else activation.low
    high = np.inf if activation.high is None else activation.high
    return np.minimum(np.maximum(array, np.float32(low)), np.float32(high))


def _affine(node: Affine, array: Array) -> Array:
    if node.scale is not None:
        array = array * node.scale[:, None, None]
    if node.shift is not None:
        array = array + node.shift[:, None, None]
    return _activate(array, node.activation)


def _windows(
    array: Array,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
) -> Array:
    """A view [N, C, kh, kw, oh, ow] of the padded image."""
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(array, reach, axis=(2, 3))
    view = view[:, :, :: strides[0], :: strides[1], :: dilation[0], :: dilation[1]]
    return view.transpose(0, 1, 4, 5, 2, 3)


def _padded(array: Array, padding: tuple[int, int, int, int], value: float) -> Array:
    top, left, bottom, right = padding
    widths = ((0, 0), (0, 0), (top, bottom), (left, right))
    return np.pad(array, widths, constant_values=value)


def _conv(node: Conv, inputs: list[Array]) -> Array:
    image = _padded(inputs[0], node.padding, 0.0)
    kernel = node.weight.shape[2:]
    windows = _windows(image, (kernel[0], kernel[1]), node.strides, node.dilation)
    batch, channels, _, _, height, width = windows.shape
    out = node.weight.shape[0]
    columns = windows.reshape(
        batch, node.groups, channels // node.groups * kernel[0] * kernel[1], -1
    )
    weight = node.weight.reshape(node.groups, out // node.groups, -1)
    result = np.matmul(weight[None], columns).reshape(batch, out, height, width)
    result = result + node.bias[:, None, None]
    if node.residual is not None:
        result = result + inputs[1]
    return _activate(result, node.activation)


def _dynamic_conv(node: DynamicConv, inputs: list[Array]) -> Array:
    """Image by image, each with its own kernel."""
    shares = inputs[1].reshape(len(inputs[0]), len(node.experts), -1)
    images = []
    for n, share in enumerate(shares):
        kernel = np.einsum("po,poiyx->oiyx", share, node.experts)
        assert not kernel[node.weight == 0].any()
        alone = Conv(
            name=node.name,
            inputs=("x", "residual") if node.residual else ("x",),
            output=node.output,
            weight=kernel,
            bias=node.bias,
            strides=node.strides,
            padding=node.padding,
            dilation=node.dilation,
            activation=node.activation,
        )
        images.append(_conv(alone, [value[n : n + 1] for value in (inputs[0], *inputs[2:])]))
    return np.concatenate(images)


def _pool(node: Pool, image: Array, shape: tuple[int, ...]) -> Array:
    if node.mode == "max":
        windows = _windows(_padded(image, node.padding, -np.inf), node.kernel, node.strides, (1, 1))
        return np.asarray(windows.max(axis=(2, 3)))
    windows = _windows(_padded(image, node.padding, 0.0), node.kernel, node.strides, (1, 1))
    total = windows.sum(axis=(2, 3), dtype=np.float64)
    ones = np.ones((1, 1, *image.shape[2:]))
    inside = _windows(
        _padded(ones, node.padding, float(node.count_include_pad)),
        node.kernel,
        node.strides,
        (1, 1),
    )
    return np.asarray(total / inside.sum(axis=(2, 3)), np.float32)


def run_opaque(node: Opaque, inputs: list[Array]) -> Array:
    """Build a function of the node's call alone and run it."""
    from tvm import relax

    builder = relax.BlockBuilder()
    with builder.function("main", params=list(node.arguments)):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(builder.normalize(node.call)))
        builder.emit_func_output(result)
    return run_module(builder.get(), inputs)[0]


def run_module(module: Any, inputs: list[Array]) -> list[Array]:
    """Compile a Relax module with TVM's default pipeline and run its `main`."""
    import tvm
    from tvm import relax

    target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
    executable = tvm.compile(
        module, target=target, relax_pipeline=relax.get_default_pipeline(target)
    )
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(array) for array in inputs))
    if hasattr(result, "numpy"):
        return [result.numpy()]
    return [field.numpy() for field in result]
