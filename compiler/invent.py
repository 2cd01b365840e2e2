"""Invented work for the latency model: chains of convolutions, and zeros for any network."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from topiarist.compiler.graph import Activation, Conv, FloatArray, Graph, Linear, Node, Value
from topiarist.pruning.masks import block_mask, unstructured_mask
from topiarist.pruning.saliency import magnitude
from topiarist.schedules.workload import BLOCKS

Random = np.random.Generator

DENSE_SHARE = 0.2  # of the layers keeps all weights
DENSITIES = (0.01, 0.7)
PATTERNS = {"unstructured": 0.7, "block4x1": 0.15, "block8x1": 0.15}
ROW_SPREAD = 0.3  # of the logarithm of a filter's size: pruned filters differ in nonzeros

CHAIN_LAYERS = 8
CHAIN_MACS = (3e5, 2e9)
CHAIN_WEIGHTS = 2_400_000
CHANNELS = (16, 2048)
IMAGE_SHARE = 0.1  # of the chains begins with an image of three channels
SIDES = (7, 8, 10, 13, 14, 16, 20, 27, 28, 32, 40, 56, 64, 80, 112, 224)
KERNELS = {1: 0.5, 3: 0.42, 5: 0.06, 7: 0.02}
STRIDED_SHARE = 0.12
DEPTHWISE_SHARE = 0.2  # of the layers with windows
HARD_SHARE = 0.5  # of the layers, where some are known that a model gets wrong
NEARBY = 0.25  # standard deviation of the logarithm of channels
TRIES = 50
RESIDUAL_SHARE = 0.3  # of the layers, where there is an earlier value of their size to add
ACTIVATION_SHARE = 0.7


@dataclass(frozen=True)
class Geometry:
    """A layer of a chain: square planes, odd square windows whose padding keeps the plane."""

    side: int
    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def out_side(self) -> int:
        """Rows and columns of the output."""
        return math.ceil(self.side / self.stride)

    @property
    def reasonable(self) -> bool:
        """Whether the layer is neither too quick to be timed nor too slow for what it teaches."""
        weights = self.in_channels // self.groups * self.out_channels * self.kernel**2
        macs = weights * self.out_side**2
        return CHAIN_MACS[0] <= macs <= CHAIN_MACS[1] and weights <= CHAIN_WEIGHTS

    @staticmethod
    def of(workload: Mapping[str, Any]) -> Geometry | None:
        """That of a recorded convolution, None for one that no chain has."""
        kernel, strides = workload.get("kernel", ()), workload.get("strides", ())
        square = workload.get("height") == workload.get("width")
        if not square or len({*kernel}) != 1 or len({*strides}) != 1 or kernel[0] % 2 == 0:
            return None
        found = Geometry(
            side=workload["height"],
            in_channels=workload["in_channels"],
            out_channels=workload["out_channels"],
            kernel=kernel[0],
            stride=strides[0],
            groups=workload["groups"],
        )
        usual = found.groups == 1 and workload.get("padding") == [found.kernel // 2] * 4
        return found if usual and found.reasonable else None

    def near(self, random: Random) -> Geometry:
        """One with other numbers of channels."""
        into, out = (
            _multiple(count * math.exp(random.normal(0, NEARBY)))
            for count in (self.in_channels, self.out_channels)
        )
        return replace(self, in_channels=into, out_channels=out)


def chain(random: Random, hard: Sequence[Geometry] = ()) -> Graph:
    """Convolutions one after the other, some like those in `hard`; all weights are there."""
    wanted = [one.near(random) for one in hard if random.random() < HARD_SHARE]
    order = [wanted[i] for i in random.permutation(len(wanted))]
    builder = _Chain(random, order[0].side if order else int(random.choice(SIDES)))
    for geometry in order:
        if geometry.side == builder.side and len(builder.nodes) < CHAIN_LAYERS - 1:
            builder.add(Geometry(builder.side, builder.channels, geometry.in_channels, 1))
            builder.add(geometry)
    while len(builder.nodes) < CHAIN_LAYERS:
        builder.add(builder.any_layer())
    return builder.graph()


class _Chain:
    """Adds layers at the end."""

    def __init__(self, random: Random, side: int) -> None:
        self.random = random
        self.side = side
        self.channels = 3 if random.random() < IMAGE_SHARE else _channels(random)
        self.values = {"x": Value("x", (1, self.channels, side, side))}
        self.nodes: list[Node] = []

    def graph(self) -> Graph:
        return Graph(tuple(self.nodes), self.values, ("x",), (self.nodes[-1].output,))

    def any_layer(self) -> Geometry:
        """A random layer that is reasonable, or the last one tried."""
        for _ in range(TRIES):
            kernel = int(self.random.choice(list(KERNELS), p=list(KERNELS.values())))
            strided = self.side > SIDES[0] and self.random.random() < STRIDED_SHARE
            stride = 2 if strided else 1
            out, groups = self._out_channels(stride), 1
            if kernel > 1 and self.random.random() < DEPTHWISE_SHARE:
                out = groups = self.channels
            found = Geometry(self.side, self.channels, out, kernel, stride, groups)
            if found.reasonable:
                break
        return found

    def _out_channels(self, stride: int) -> int:
        """Any number, or that of an earlier value that then can be added."""
        side = math.ceil(self.side / stride)
        earlier = [v.shape[1] for v in [*self.values.values()][:-1] if v.shape[2] == side]
        if earlier and self.random.random() < RESIDUAL_SHARE:
            return int(self.random.choice(earlier))
        return _channels(self.random)

    def add(self, layer: Geometry) -> None:
        """Append a layer, with a residual where one fits."""
        name, before = f"conv{len(self.nodes)}", self.nodes[-1].output if self.nodes else "x"
        side, out = layer.out_side, layer.out_channels
        shape = (out, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
        total = max((layer.out_side - 1) * layer.stride + layer.kernel - layer.side, 0)
        inputs = [before]
        same = (1, out, side, side)
        fitting = [v.name for v in self.values.values() if v.shape == same and v.name != before]
        inputs += fitting[-1:]
        self.nodes.append(
            Conv(
                name=name,
                inputs=tuple(inputs),
                output=name,
                weight=_normal(self.random, shape),
                bias=_normal(self.random, (out,)),
                strides=(layer.stride, layer.stride),
                padding=(total // 2, total // 2, total - total // 2, total - total // 2),
                groups=layer.groups,
                activation=Activation(0.0) if self.random.random() < ACTIVATION_SHARE else None,
            )
        )
        self.values[name] = Value(name, (1, out, side, side))
        self.side, self.channels = side, out


def with_zeros(graph: Graph, random: Random, names: Collection[str]) -> Graph:
    """The graph with new weights in the named layers, of random density and pattern for each."""
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.name in names and isinstance(node, Conv):
            node = replace(node, weight=_some_zeros(node.weight.shape, node.groups, random))
        elif node.name in names and isinstance(node, Linear):
            weight = _some_zeros((*node.weight.shape, 1, 1), 1, random)
            node = replace(node, weight=weight[:, :, 0, 0])
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _some_zeros(shape: tuple[int, ...], groups: int, random: Random) -> FloatArray:
    """Normal weights [O, C / groups, kh, kw], all of them or the largest of a random density."""
    weight = _normal(random, shape)
    if shape[1] == 1 or random.random() < DENSE_SHARE:
        return weight
    rows = np.exp(random.normal(0, ROW_SPREAD, shape[0])).astype(np.float32)
    weight *= rows[:, None, None, None]
    density = math.exp(random.uniform(math.log(DENSITIES[0]), math.log(DENSITIES[1])))
    pattern = str(random.choice(list(PATTERNS), p=list(PATTERNS.values())))
    scores = magnitude(weight)
    if pattern in BLOCKS:
        kept = block_mask(scores, density, groups, BLOCKS[pattern])
    else:
        kept = unstructured_mask(scores, density)
    return np.where(kept, weight, np.float32(0))


def _channels(random: Random) -> int:
    low, high = map(math.log, CHANNELS)
    return _multiple(math.exp(random.uniform(low, high)))


def _multiple(channels: float) -> int:
    """Most layers have a multiple of eight."""
    return max(1, round(channels / 8)) * 8


def _normal(random: Random, shape: tuple[int, ...]) -> FloatArray:
    return random.standard_normal(shape, np.float32)
