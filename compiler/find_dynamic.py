"""Find dynamic convolutions: one kernel for each image, mixed from experts that all images share.

    c = Conv(x, [P * O, I, kh, kw])
    v = View(c)                          # [N, P, O, H, W]
    m = multiply(v, shares)              # [N, P, O, 1, 1]
    y = sum(m, axis=1)            ->     y = DynamicConv(x, shares, experts [P, O, I, kh, kw])

It doesn't matter where the shares come from. A step counts only when nothing else reads the value
before it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from topiarist.compiler.graph import Conv, DynamicConv, Graph, Node, Opaque, View
from topiarist.compiler.relax_calls import operator_of


def find_dynamic(graph: Graph) -> Graph:
    """The graph with dynamic convolutions in place of the layers that make them up."""
    finder = _Finder(graph)
    found = {node.output: finder.match(node) for node in graph.nodes}
    made = {output: layers for output, layers in found.items() if layers is not None}
    gone = {node.output for layers in made.values() for node in layers[1:]}
    nodes = tuple(
        made[node.output][0] if node.output in made else node
        for node in graph.nodes
        if node.output not in gone
    )
    values = {name: value for name, value in graph.values.items() if name not in gone}
    return replace(graph, nodes=nodes, values=values)


class _Finder:
    """Matches from the last layer back to the convolution."""

    def __init__(self, graph: Graph) -> None:
        self.values = graph.values
        self.producer = {node.output: node for node in graph.nodes}
        self.readers = Counter(name for node in graph.nodes for name in node.inputs)
        self.readers.update(graph.outputs)

    def match(self, last: Node) -> tuple[Node, ...] | None:
        """The dynamic convolution that ends with a layer, and the layers before it that go."""
        if not _sums_experts(last):
            return None
        product = self._before(last.inputs[0])
        if not isinstance(product, Opaque) or operator_of(product.call) != "multiply":
            return None
        if len(product.inputs) != 2:
            return None
        for value, shares in (product.inputs, product.inputs[::-1]):
            view = self._before(value)
            if not isinstance(view, View):
                continue
            conv = self._before(view.inputs[0])
            if isinstance(conv, Conv) and self._fit(conv, value, shares, last.output):
                return _made(conv, shares, self.values[shares].shape[1], last), product, view, conv
        return None

    def _before(self, value: str) -> Node | None:
        """The layer that writes a value which nothing else reads."""
        return self.producer.get(value) if self.readers[value] == 1 else None

    def _fit(self, conv: Conv, value: str, shares: str, output: str) -> bool:
        """Whether shapes are those of above."""
        n, o, h, w = self.values[output].shape
        p = len(conv.weight) // o
        return (
            conv.groups == 1
            and self.values[value].shape == (n, p, o, h, w)
            and self.values[shares].shape == (n, p, o, 1, 1)
        )


def _sums_experts(node: Node) -> bool:
    if not isinstance(node, Opaque) or operator_of(node.call) != "sum":
        return False
    attributes = node.call.attrs
    if attributes.axis is None or attributes.keepdims or len(node.inputs) != 1:
        return False
    return [int(axis) for axis in attributes.axis] == [1] and len(node.arguments[0].ty.shape) == 5


def _made(conv: Conv, shares: str, experts: int, last: Node) -> DynamicConv:
    kernels = conv.weight.reshape(experts, -1, *conv.weight.shape[1:])
    return DynamicConv(
        name=conv.name,
        inputs=(*conv.inputs, shares),
        output=last.output,
        weight=(kernels != 0).any(axis=0).astype(np.float32),
        bias=np.zeros(kernels.shape[1], np.float32),
        strides=conv.strides,
        padding=conv.padding,
        dilation=conv.dilation,
        experts=kernels,
    )
