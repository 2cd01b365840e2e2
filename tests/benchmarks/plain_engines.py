"""What pruned networks are usually run with: CSR convolutions, and PyTorch, which sees no zeros."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from tests.benchmarks.measure import Feeds
from topiarist.compiler.choose import workload_of
from topiarist.compiler.engines import Engine
from topiarist.compiler.graph import (
    Activation,
    Add,
    Conv,
    GlobalPool,
    Graph,
    Linear,
    Node,
    Opaque,
    Pool,
    Subsample,
    View,
)
from topiarist.compiler.relax_calls import operator_of
from topiarist.schedules.formats.convolution import sparse_dense_prim_func
from topiarist.schedules.formats.tensors import SparseWeight
from topiarist.schedules.workload import ConvWorkload, SparsitySignature
from topiarist.targets import registry

ANY_ZEROS = SparsitySignature(1.0, "", (0, 0, 0))  # one function serves all of them


class CsrConvolutions:
    """The convolutions of a network with naive CSR weights, and nothing else of it: one thread."""

    def __init__(self, graph: Graph) -> None:
        workloads = dict.fromkeys(w for _, w in _convolutions(graph))
        self._names = {workload: f"conv{i}" for i, workload in enumerate(workloads)}
        functions = {n: sparse_dense_prim_func(n, w, 1) for w, n in self._names.items()}
        target = tvm.target.Target(registry.get(registry.HOST).tvm_target)
        self._executable = tvm.compile(tvm.IRModule(functions), target=target)

    def engine(self, name: str, graph: Graph) -> Engine:
        """A network of the same shapes, whatever its zeros. Layers read inputs of their own."""
        calls = [
            (self._executable[self._names[workload]], _arguments(node, workload))
            for node, workload in _convolutions(graph)
        ]

        def run() -> None:
            for function, arguments in calls:
                function(*arguments)

        return Engine(name, 1, tvm.__version__, run)


def _convolutions(graph: Graph) -> list[tuple[Conv, ConvWorkload]]:
    """In order; sums of residuals are left out."""
    convolutions = [node for node in graph.nodes if isinstance(node, Conv)]
    return [
        (node, replace(workload_of(node, graph), residual=False, sparsity=ANY_ZEROS))
        for node in convolutions
    ]


def _arguments(node: Conv, w: ConvWorkload) -> list[Any]:
    x = np.random.default_rng(0).standard_normal((w.in_channels, w.height, w.width), np.float32)
    y = np.empty(w.out_channels * w.out_height * w.out_width, np.float32)
    constants = SparseWeight.from_dense(node.weight).constants
    return [tvm.runtime.tensor(array) for array in (x.ravel(), *constants, node.bias, y)]


def has_torch() -> bool:
    """Whether PyTorch is installed (the extra `train`)."""
    return importlib.util.find_spec("torch") is not None


def torch_engine(graph: Graph, feeds: Feeds, threads: int) -> Engine:
    """The network in PyTorch, dense, batch norms folded."""
    import torch

    torch.set_num_threads(threads)
    run = torch_function(graph)
    return Engine("pytorch", threads, torch.__version__, lambda: run(feeds))


def torch_function(graph: Graph) -> Callable[[Feeds], list[NDArray[np.float32]]]:
    """inputs -> outputs of the graph, by PyTorch."""
    import torch

    layers = [(node, _torch_layer(node, graph)) for node in graph.nodes]

    def run(feeds: Feeds) -> list[NDArray[np.float32]]:
        values = {name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()}
        with torch.inference_mode():
            for node, layer in layers:
                values[node.output] = layer(*(values[name] for name in node.inputs))
        return [values[name].numpy() for name in graph.outputs]

    return run


def _torch_layer(node: Node, graph: Graph) -> Callable[..., Any]:
    """A layer as a function of tensors. Raises ValueError for one that no network here has."""
    import torch

    functional = torch.nn.functional
    if isinstance(node, Conv):
        return _torch_convolution(node)
    if isinstance(node, Linear):
        weight, bias = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
        return lambda x: _clamped(functional.linear(x, weight, bias), node.activation)
    if isinstance(node, Pool) and node.mode == "max":
        padding = _symmetrical(node.padding)
        return lambda x: functional.max_pool2d(x, node.kernel, node.strides, padding)
    if isinstance(node, GlobalPool):
        return lambda x: x.mean((2, 3), keepdim=True)
    if isinstance(node, Subsample):
        down, right = node.strides
        return lambda x: x[:, :, ::down, ::right]
    if isinstance(node, Add):
        return lambda a, b: _clamped(a + b, node.activation)
    if isinstance(node, View):
        shape = graph.values[node.output].shape
        return lambda x: x.reshape(shape)
    if isinstance(node, Opaque) and operator_of(node.call) == "nn.softmax":
        axis = int(node.call.attrs.axis)
        return lambda x: functional.softmax(x, axis)
    raise ValueError(f"{node.name}: no {type(node).__name__} in PyTorch here")


def _torch_convolution(node: Conv) -> Callable[..., Any]:
    import torch

    weight, bias = torch.from_numpy(node.weight), torch.from_numpy(node.bias)
    padding = _symmetrical(node.padding)
    rest = (node.strides, padding, node.dilation, node.groups)

    def run(x: Any, *residual: Any) -> Any:
        y = torch.nn.functional.conv2d(x, weight, bias, *rest)
        for other in residual:
            y.add_(other)
        return _clamped(y, node.activation)

    return run


def _symmetrical(padding: tuple[int, int, int, int]) -> tuple[int, int]:
    """What PyTorch takes: the same on both sides."""
    if padding[2:] != padding[:2]:
        raise ValueError(f"padding {padding} differs from side to side")
    return padding[:2]


def _clamped(y: Any, activation: Activation | None) -> Any:
    if activation is None:
        return y
    low = -math.inf if activation.low is None else activation.low
    if activation.high is None and low == 0:
        return y.relu_()
    return y.clamp_(low, math.inf if activation.high is None else activation.high)
