"""Which sub-images the lanes of a vector hold, for each part of the network.

Values linked by convolutions, pools and additions of stride 1 share one lattice; they form a
level. Between levels lies a stride: where the lattice of the finer level is the stride times that
of the coarser one the kernel reads it as it is, elsewhere the value is moved to another layout.
The choice weighs the lanes that a lattice wastes against those moves.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from topiarist.compiler.graph import (
    Add,
    Affine,
    Concat,
    Conv,
    GlobalPool,
    Graph,
    Node,
    Pool,
    Subsample,
)
from topiarist.schedules.layout import Grid

LANE_NODES = (Conv, Pool, Subsample, GlobalPool, Add, Affine, Concat)
LANES_ONLY = (Conv, Pool, Subsample, Concat)
# First estimates that only rank lattices; the kernels themselves are measured afterwards.
MACS_PER_US = 4.0e4
MOVED_VALUES_PER_US = 1.2e3
MAX_SWEEPS = 8


class Lattice(NamedTuple):
    """`sy * sx` lanes over `rows * cols` vectors, for planes of up to sy*rows by sx*cols."""

    sy: int
    sx: int
    rows: int
    cols: int

    def grid(self, height: int, width: int) -> Grid:
        """The lattice over a plane."""
        return Grid(height, width, self.sy, self.sx, self.rows, self.cols)

    def times(self, strides: tuple[int, int]) -> Lattice:
        """The lattice that a layer of these strides reads to write this one."""
        return Lattice(self.sy, self.sx, self.rows * strides[0], self.cols * strides[1])


def strides_of(node: Node) -> tuple[int, int]:
    """Distance of neighbouring output pixels on the input."""
    return node.strides if isinstance(node, Conv | Pool | Subsample) else (1, 1)


def laned_values(graph: Graph) -> set[str]:
    """4-D values that lane kernels read or write.

    One-pixel planes stay row-major, but where a layer that has only lane kernels touches them.
    """
    touched: set[str] = set()
    for node in graph.nodes:
        if not isinstance(node, LANE_NODES):
            continue
        for name in (*node.inputs, node.output):
            shape = graph.values[name].shape
            one_pixel = len(shape) == 4 and shape[2:] == (1, 1)
            if len(shape) == 4 and (not one_pixel or isinstance(node, LANES_ONLY)):
                touched.add(name)
    return touched


@dataclass(frozen=True)
class Edge:
    """A layer that reads `value` of one level with a stride to write another level."""

    value: str  # what has to move where the lattices differ
    fine: str
    coarse: str
    strides: tuple[int, int]


@dataclass(frozen=True)
class Levels:
    """The levels by representative value: who belongs, extents, work, edges, possible lattices."""

    level_of: dict[str, str]
    extent: dict[str, tuple[int, int]]
    work_us: dict[str, float]
    edges: tuple[Edge, ...]
    options: dict[str, list[Lattice]]
    sizes: dict[str, int]  # values in each tensor


def find_levels(graph: Graph, lanes: int) -> Levels:
    """Group the laned values and list the lattices that each level could have."""
    laned = laned_values(graph)
    level_of = _union(graph, laned)
    extent: dict[str, tuple[int, int]] = {}
    for name in laned:
        h, w = graph.values[name].shape[2:]
        old = extent.get(level_of[name], (0, 0))
        extent[level_of[name]] = max(old[0], h), max(old[1], w)
    edges = tuple(
        Edge(
            node.output if isinstance(node, Subsample) else node.inputs[0],
            level_of[node.inputs[0]],
            level_of[node.output],
            strides_of(node),
        )
        for node in graph.nodes
        if isinstance(node, Conv | Pool | Subsample)
        and strides_of(node) != (1, 1)
        and node.output in laned
        and node.inputs[0] in laned
    )
    sizes = {}
    for name in laned:
        n, c, h, w = graph.values[name].shape
        sizes[name] = n * c * h * w
    work = _work(graph, level_of)
    return Levels(level_of, extent, work, edges, _options(extent, edges, lanes), sizes)


def _union(graph: Graph, laned: set[str]) -> dict[str, str]:
    parent = {name: name for name in laned}

    def find(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for node in graph.nodes:
        if not isinstance(node, LANE_NODES) or node.output not in laned:
            continue
        tied = [node.output]
        if strides_of(node) == (1, 1):
            tied += [name for name in node.inputs if name in laned]
        else:
            tied += [name for name in node.inputs[1:] if name in laned]
        for name in tied[1:]:
            parent[find(name)] = find(tied[0])
    return {name: find(name) for name in laned}


def _work(graph: Graph, level_of: dict[str, str]) -> dict[str, float]:
    work: dict[str, float] = defaultdict(float)
    for node in graph.nodes:
        if node.output not in level_of:
            continue
        n, _, h, w = graph.values[node.output].shape
        if isinstance(node, Conv):
            nonzero = float((node.weight != 0).sum())
            work[level_of[node.output]] += (
                n * h * w * min(nonzero, node.weight.size / 2) / MACS_PER_US
            )
        else:
            size = graph.values[node.output].shape[1] * n * h * w
            work[level_of[node.output]] += size / MACS_PER_US
    return work


def _options(
    extent: dict[str, tuple[int, int]], edges: tuple[Edge, ...], lanes: int
) -> dict[str, list[Lattice]]:
    """Lattices per level: the smallest ones, and the multiples of those of coarser levels."""
    pairs = [(sy, lanes // sy) for sy in range(1, lanes + 1) if lanes % sy == 0]
    options: dict[str, list[Lattice]] = {}

    def visit(level: str) -> list[Lattice]:
        if level in options:
            return options[level]
        options[level] = []  # a cycle of levels can't add anything
        height, width = extent[level]
        found = {Lattice(sy, sx, -(-height // sy), -(-width // sx)) for sy, sx in pairs}
        for edge in edges:
            if edge.fine == level:
                for coarse in visit(edge.coarse):
                    tied = coarse.times(edge.strides)
                    if tied.rows * tied.sy >= height and tied.cols * tied.sx >= width:
                        found.add(tied)
        ranked = sorted(found, key=lambda lattice: (waste(lattice, extent[level]), lattice))
        options[level] = ranked[:8]
        return options[level]

    for level in extent:
        visit(level)
    return options


def waste(lattice: Lattice, extent: tuple[int, int]) -> float:
    """Lanes computed per pixel, times a factor for grids that only small tiles divide."""
    sy, sx, rows, cols = lattice
    covered = sy * sx * rows * cols / (extent[0] * extent[1])
    tile = largest_tile(rows, cols, 14)
    vectors = tile[0] * tile[1]
    return covered * (vectors + 1.5) / vectors


def largest_tile(rows: int, cols: int, limit: int) -> tuple[int, int]:
    """(R, V) with R | rows, V | cols and the largest R * V <= limit; wide ones first."""
    found = [
        (r, v)
        for r, v in itertools.product(range(1, min(rows, limit) + 1), range(1, limit + 1))
        if r * v <= limit and rows % r == 0 and cols % v == 0
    ]
    return max(found, key=lambda tile: (tile[0] * tile[1], tile[1]))


def assign_lattices(levels: Levels, best: int) -> list[dict[str, Lattice]]:
    """The `best` cheapest distinct assignments found, as value -> lattice; cheapest first."""
    names = sorted(levels.options)
    seen: dict[tuple[Lattice, ...], float] = {}

    def cost(choice: dict[str, Lattice]) -> float:
        key = tuple(choice[name] for name in names)
        if key not in seen:
            seen[key] = _cost(levels, choice)
        return seen[key]

    for start in range(3):
        choice = {name: levels.options[name][start % len(levels.options[name])] for name in names}
        for _ in range(MAX_SWEEPS):
            before = cost(choice)
            for name in names:
                choice[name] = min(
                    levels.options[name], key=lambda option: cost({**choice, name: option})
                )
            _move_pairs(levels, choice, cost)
            if cost(choice) >= before:
                break
    different: dict[tuple[tuple[int, ...], ...], dict[str, Lattice]] = {}
    for key in sorted(seen, key=lambda key: (seen[key], key)):
        # A transposed assignment behaves like the original.
        different.setdefault(_up_to_transposition(key), dict(zip(names, key, strict=True)))
        if len(different) == best:
            break
    return [
        {value: choice[level] for value, level in levels.level_of.items()}
        for choice in different.values()
    ]


def _up_to_transposition(key: tuple[Lattice, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted((lattice.sy, lattice.sx))) for lattice in key)


def _move_pairs(levels: Levels, choice: dict[str, Lattice], cost: object) -> None:
    """Change two linked levels at once, where neither change pays alone."""
    assert callable(cost)
    for edge in levels.edges:
        pairs = itertools.product(levels.options[edge.fine], levels.options[edge.coarse])
        fine, coarse = min(
            pairs,
            key=lambda pair: cost({**choice, edge.fine: pair[0], edge.coarse: pair[1]}),
        )
        choice[edge.fine], choice[edge.coarse] = fine, coarse


def _cost(levels: Levels, choice: dict[str, Lattice]) -> float:
    work = sum(
        us * waste(choice[level], levels.extent[level]) for level, us in levels.work_us.items()
    )
    moved = {
        (edge.value, choice[edge.coarse].times(edge.strides))
        for edge in levels.edges
        if choice[edge.fine] != choice[edge.coarse].times(edge.strides)
    }
    return work + sum(levels.sizes[value] for value, _ in moved) / MOVED_VALUES_PER_US
