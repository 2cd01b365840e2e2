"""Rewrites of the layer graph that make layers fit the kernels."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from topiarist.compiler.graph import (
    Conv,
    DynamicConv,
    FloatArray,
    Graph,
    Linear,
    Node,
    Subsample,
    Value,
    View,
)


def simplify(graph: Graph) -> Graph:
    """All rewrites, in order."""
    return compact_strided_pointwise(convolutions_to_linear(graph))


def convolutions_to_linear(graph: Graph) -> Graph:
    """A convolution with one output pixel -> flatten, fully connected, unflatten."""
    nodes: list[Node] = []
    values = dict(graph.values)
    for node in graph.nodes:
        if not isinstance(node, Conv) or not _has_one_pixel(node, graph):
            nodes.append(node)
            continue
        n, c, h, w = graph.values[node.inputs[0]].shape
        flat, out = f"{node.output}@flat", f"{node.output}@linear"
        values[flat] = Value(flat, (n, c * h * w))
        values[out] = Value(out, (n, node.weight.shape[0]))
        nodes += [
            View(name=f"{node.name}.flatten", inputs=node.inputs[:1], output=flat),
            Linear(
                name=node.name,
                inputs=(flat,),
                output=out,
                weight=unrolled_weight(node, c, h, w),
                bias=node.bias,
                activation=node.activation,
            ),
            View(name=f"{node.name}.unflatten", inputs=(out,), output=node.output),
        ]
    return replace(graph, nodes=tuple(nodes), values=values)


def _has_one_pixel(node: Conv, graph: Graph) -> bool:
    one = graph.values[node.output].shape[2:] == (1, 1)
    return one and node.residual is None and not isinstance(node, DynamicConv)


def unrolled_weight(node: Conv, channels: int, height: int, width: int) -> FloatArray:
    """[O, C * H * W] of a convolution whose window lies once over the padded [C, H, W] input."""
    o, per_group, kh, kw = node.weight.shape
    unrolled = np.zeros((o, channels, height, width), np.float32)
    group_out = o // node.groups
    for ky, kx in itertools.product(range(kh), range(kw)):
        y = ky * node.dilation[0] - node.padding[0]
        x = kx * node.dilation[1] - node.padding[1]
        if not (0 <= y < height and 0 <= x < width):
            continue
        for group in range(node.groups):
            rows = slice(group * group_out, (group + 1) * group_out)
            cols = slice(group * per_group, (group + 1) * per_group)
            unrolled[rows, cols, y, x] = node.weight[rows, :, ky, kx]
    return unrolled.reshape(o, -1)


def compact_strided_pointwise(graph: Graph) -> Graph:
    """A 1x1 convolution with strides -> pick its pixels, then a 1x1 convolution without.

    The kernel then reads a compact input, and a move to another layout moves only what is read.
    """
    nodes: list[Node] = []
    values = dict(graph.values)
    for node in graph.nodes:
        pointwise = isinstance(node, Conv) and node.weight.shape[2:] == (1, 1)
        if not isinstance(node, Conv) or not pointwise or node.strides == (1, 1):
            nodes.append(node)
            continue
        if any(node.padding):
            nodes.append(node)
            continue
        picked = f"{node.output}@picked"
        n, c = graph.values[node.inputs[0]].shape[:2]
        values[picked] = Value(picked, (n, c, *graph.values[node.output].shape[2:]))
        nodes += [
            Subsample(
                name=f"{node.name}.pick",
                inputs=node.inputs[:1],
                output=picked,
                strides=node.strides,
            ),
            replace(node, inputs=(picked, *node.inputs[1:]), strides=(1, 1)),
        ]
    return replace(graph, nodes=tuple(nodes), values=values)
