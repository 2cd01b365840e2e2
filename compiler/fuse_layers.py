"""Fuse what follows a layer into it: bias, residual, activation.

    c = Conv(x)                                c = Conv(x, residual = r, bias, activation)
    b = Affine(c, shift = bias)
    s = Add(b, r)                     ->
    y = Affine(s, activation = relu)

A step is fused only when nothing else reads the value before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from topiarist.compiler.graph import (
    Activation,
    Add,
    Affine,
    Conv,
    DynamicConv,
    FloatArray,
    Graph,
    Linear,
    Node,
    Opaque,
    Value,
)


def fuse_layers(graph: Graph, opaque_forms: Mapping[str, Opaque]) -> Graph:
    """The graph with epilogues fused; an Affine of no image becomes the Opaque it was read from."""
    fuser = _Fuser(graph)
    for node in graph.nodes:
        fuser.add(node)
    nodes = tuple(_settled(node, graph.values, opaque_forms) for node in fuser.nodes.values())
    used = {name for node in nodes for name in (*node.inputs, node.output)}
    kept = used | set(graph.inputs) | set(graph.outputs)
    values = {name: value for name, value in graph.values.items() if name in kept}
    return Graph(nodes, values, graph.inputs, graph.outputs)


def _settled(node: Node, values: Mapping[str, Value], opaque_forms: Mapping[str, Opaque]) -> Node:
    if isinstance(node, Affine) and len(values[node.output].shape) != 4:
        return opaque_forms[node.output]
    return node


class _Fuser:
    """Keeps the nodes so far by the value each writes, in topological order."""

    def __init__(self, graph: Graph) -> None:
        self.values = graph.values
        self.nodes: dict[str, Node] = {}
        self.readers = Counter(name for node in graph.nodes for name in node.inputs)
        self.readers.update(graph.outputs)

    def add(self, node: Node) -> None:
        """Append a node, or its fusion with the node before it."""
        fused: Node | None = None
        if isinstance(node, Affine):
            fused = self._with_affine(node)
        elif isinstance(node, Add):
            fused = self._with_residual(node)
        self.nodes[node.output] = node if fused is None else fused

    def _open(self, value: str) -> Node | None:
        """The node that writes a value which nothing else reads."""
        return self.nodes.get(value) if self.readers[value] == 1 else None

    def _with_affine(self, node: Affine) -> Node | None:
        before = self._open(node.inputs[0])
        if not isinstance(before, Conv | Linear | Affine | Add):
            return None
        image = len(self.values[node.output].shape) == 4
        if isinstance(before, Affine) and not image:
            return None  # each stays as it is, to become opaque
        fused = _absorbed(before, node)
        if fused is not None:
            del self.nodes[before.output]
        return fused

    def _with_residual(self, node: Add) -> Node | None:
        order = {value: index for index, value in enumerate(self.nodes)}
        convs = [
            before
            for value in node.inputs
            if isinstance(before := self._open(value), Conv)
            and before.residual is None
            and before.activation is None
        ]
        if not convs:
            return None
        conv = max(convs, key=lambda before: order[before.output])
        other = node.inputs[1 - node.inputs.index(conv.output)]
        del self.nodes[conv.output]
        return replace(conv, inputs=(*conv.inputs, other), output=node.output)


def _absorbed(before: Conv | Linear | Affine | Add, node: Affine) -> Node | None:
    """activation(before * scale + shift) as one node, if there is such a one."""
    if node.activation is not None and node.scale is None and node.shift is None:
        activation = _composed(before.activation, node.activation)
        return replace(before, activation=activation, output=node.output)
    if before.activation is not None:
        return None
    if isinstance(before, Affine):
        return _merged(before, node)
    if isinstance(before, DynamicConv) and before.residual is None and node.scale is not None:
        return _scaled(before, node)
    if isinstance(before, Add) or node.scale is not None or node.shift is None:
        return None
    if isinstance(before, Conv) and before.residual is not None:
        return None
    return replace(before, bias=before.bias + node.shift, output=node.output)


def _scaled(before: DynamicConv, node: Affine) -> DynamicConv:
    """A scale, as of a batch norm, goes into the experts."""
    assert node.scale is not None
    bias = _product(before.bias, node.scale)
    return replace(
        before,
        experts=_product(before.experts, node.scale[:, None, None, None]),
        bias=bias if node.shift is None else _sum(bias, node.shift),
        output=node.output,
    )


def _merged(first: Affine, second: Affine) -> Affine:
    """(x * a + b) * c + d = x * (a * c) + (b * c + d), in float64."""
    shift = first.shift
    if second.scale is not None and shift is not None:
        shift = _product(shift, second.scale)
    if second.shift is not None:
        shift = second.shift if shift is None else _sum(shift, second.shift)
    scale = second.scale if first.scale is None else first.scale
    if first.scale is not None and second.scale is not None:
        scale = _product(first.scale, second.scale)
    return replace(first, scale=scale, shift=shift, output=second.output)


def _product(left: FloatArray, right: FloatArray) -> FloatArray:
    return (left.astype(np.float64) * right).astype(np.float32)


def _sum(left: FloatArray, right: FloatArray) -> FloatArray:
    return (left.astype(np.float64) + right).astype(np.float32)


def _composed(first: Activation | None, second: Activation) -> Activation:
    """The one clamp that equals a clamp after a clamp."""
    if first is None:
        return second

    def clamp(value: float) -> float:
        value = value if second.low is None else max(value, second.low)
        return value if second.high is None else min(value, second.high)

    low = second.low if first.low is None else clamp(first.low)
    high = second.high if first.high is None else clamp(first.high)
    return Activation(low, high)
