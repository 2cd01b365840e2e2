"""Where every value of the network lives: its layout, and for concatenations its channels.

A value has one primary place, where its layer writes it. A reader that needs another layout reads
a copy, which is made once.
"""

from __future__ import annotations

from dataclasses import dataclass

from topiarist.compiler.graph import Add as AddNode
from topiarist.compiler.graph import (
    Affine,
    Concat,
    Conv,
    GlobalPool,
    Graph,
    Node,
    Pool,
    Subsample,
    View,
)
from topiarist.compiler.lattice import Lattice, laned_values, largest_tile, strides_of
from topiarist.schedules.layout import Halo, LaneLayout, PlainLayout, halo_of_taps
from topiarist.schedules.layout import View as ChannelView

NO_HALO: Halo = (0, 0, 0, 0)
NEGATIVE_INFINITY = float("-inf")
LEAST_VECTORS = 7  # of a tile that is made smaller for threads


@dataclass(frozen=True)
class Place:
    """A named buffer and the part of it that a value occupies."""

    buffer: str
    view: ChannelView | PlainLayout


@dataclass(frozen=True)
class Copy:
    """A value in a second layout."""

    value: str
    place: Place


@dataclass(frozen=True)
class LayoutPlan:
    """The primary place of every value, and what each reader reads.

    `reads[node name]` lists the places in the order of the node's inputs; places that are not
    primary are in `copies`.
    """

    places: dict[str, Place]
    reads: dict[str, tuple[Place, ...]]
    copies: dict[str, Copy]  # by buffer name


@dataclass(frozen=True)
class _Want:
    """What a reader needs of a lane layout."""

    lattice: Lattice
    halo: Halo = NO_HALO
    padded: bool = False
    fill: float = 0.0
    anything: bool = False  # reads any layout as it is


def halo_of(node: Conv | Pool) -> Halo:
    """The halo that the layer's input needs."""
    if isinstance(node, Pool):
        return halo_of_taps(node.kernel, node.strides, node.padding)
    kh, kw = node.weight.shape[2:]
    return halo_of_taps((kh, kw), node.strides, node.padding, node.dilation)


def pads(node: Pool, graph: Graph) -> bool:
    """Whether some window reaches past the picture."""
    h, w = graph.values[node.inputs[0]].shape[2:]
    oh, ow = graph.values[node.output].shape[2:]
    top, left = node.padding[:2]
    below = (oh - 1) * node.strides[0] + node.kernel[0] - top > h
    right = (ow - 1) * node.strides[1] + node.kernel[1] - left > w
    return bool(top or left or below or right)


def _is_pointwise(node: Conv) -> bool:
    return node.weight.shape[2:] == (1, 1) and not any(node.padding)


def never_negative(graph: Graph) -> set[str]:
    """Values that can't be below zero, so that zero is neutral for a maximum."""
    found: set[str] = set()
    for node in graph.nodes:
        if isinstance(node, Conv | Affine | AddNode):
            act = node.activation
            known = act is not None and act.low is not None and act.low >= 0
        elif isinstance(node, Pool | Subsample | GlobalPool | Concat | View):
            known = all(name in found for name in node.inputs)
        else:
            known = False
        if known:
            found.add(node.output)
    return found


class LayoutPlanner:
    """Gives every value its place, for one choice of lattices."""

    def __init__(
        self,
        graph: Graph,
        lattices: dict[str, Lattice],
        tile_vectors: int,
        threads: int = 1,
    ) -> None:
        self.graph = graph
        self.lattices = lattices
        self.tile_vectors = tile_vectors
        self.threads = threads
        self.laned = laned_values(graph)
        self.nonnegative = never_negative(graph)
        self.producer = {node.output: node for node in graph.nodes}
        self.parents = self._concat_parents()
        self.parents |= self._accumulated()
        self.copies: dict[str, Copy] = {}

    def plan(self) -> LayoutPlan:
        """Place all values and resolve all reads."""
        wants = self._wants()
        places = self._places(wants)
        reads = {
            node.name: tuple(
                self._read(name, wants.get((node.name, i)), wants, places)
                for i, name in enumerate(node.inputs)
            )
            for node in self.graph.nodes
        }
        return LayoutPlan(places, reads, self.copies)

    def _writes_lanes(self, value: str) -> bool:
        node = self.producer.get(value)
        return value in self.laned and isinstance(
            node, Conv | Pool | Subsample | AddNode | Affine | Concat
        )

    def _concat_parents(self) -> dict[str, tuple[str, int]]:
        """value -> (concatenation that it is written into, first channel there)."""
        parents: dict[str, tuple[str, int]] = {}
        for node in self.graph.nodes:
            if not isinstance(node, Concat) or not self._writes_lanes(node.output):
                continue
            first = 0
            for name in node.inputs:
                alone = node.inputs.count(name) == 1 and name not in parents
                if alone and self._writes_lanes(name):
                    parents[name] = node.output, first
                first += self.graph.values[name].shape[1]
        return parents

    def _accumulated(self) -> dict[str, tuple[str, int]]:
        """Output of a convolution with a residual that no later layer reads -> that residual.

        The convolution then adds to the residual's buffer, which spares reading another one.
        """
        found: dict[str, tuple[str, int]] = {}
        joined = set(self.parents) | {parent for parent, _ in self.parents.values()}
        last = {name: i for i, node in enumerate(self.graph.nodes) for name in node.inputs}
        for i, node in enumerate(self.graph.nodes):
            if not isinstance(node, Conv) or node.residual is None:
                continue
            residual = node.residual
            free = residual not in joined and node.output not in joined
            dead = last[residual] == i and residual not in self.graph.outputs
            if free and dead and residual != node.inputs[0] and self._writes_lanes(residual):
                found[node.output] = residual, 0
        return found

    def _root(self, value: str) -> tuple[str, int]:
        """The buffer that a value is written into, and its first channel there."""
        first = 0
        while value in self.parents:
            value, offset = self.parents[value]
            first += offset
        return value, first

    def _wants(self) -> dict[tuple[str, int], _Want]:
        """What each (node, input index) that reads lanes needs."""
        wants: dict[tuple[str, int], _Want] = {}
        for node in self.graph.nodes:
            for i, name in enumerate(node.inputs):
                want = self._want(node, i, name)
                if want is not None:
                    wants[node.name, i] = want
        return wants

    def _want(self, node: Node, i: int, name: str) -> _Want | None:
        if name not in self.laned:
            return None
        if isinstance(node, GlobalPool):
            return _Want(self.lattices[name])
        if node.output not in self.laned or not self._writes_lanes(node.output):
            return None
        out = self.lattices[node.output]
        if isinstance(node, Subsample):
            return _Want(out.times(node.strides), anything=True)
        if i > 0 or not isinstance(node, Conv | Pool):
            return _Want(out)
        lattice = out.times(strides_of(node))
        if isinstance(node, Conv):
            if _is_pointwise(node):
                return _Want(lattice)
            return _Want(lattice, halo_of(node), True)
        fill = 0.0
        if node.mode == "max" and pads(node, self.graph) and name not in self.nonnegative:
            fill = NEGATIVE_INFINITY
        return _Want(lattice, halo_of(node), True, fill)

    def _places(self, wants: dict[tuple[str, int], _Want]) -> dict[str, Place]:
        merged = self._merged_wants(wants)
        layouts: dict[str, LaneLayout] = {}
        for name in self.laned:
            root, _ = self._root(name)
            if self._writes_lanes(name) and root not in layouts:
                n_c_h_w = self.graph.values[root].shape
                want = merged.get(root, _Want(self.lattices[root]))
                layouts[root] = self._layout(n_c_h_w, want)
        places: dict[str, Place] = {}
        for name, value in self.graph.values.items():
            if self._writes_lanes(name):
                root, first = self._root(name)
                places[name] = Place(root, ChannelView(layouts[root], first, value.shape[1]))
            else:
                places[name] = Place(name, PlainLayout(value.shape))
        return places

    def _merged_wants(self, wants: dict[tuple[str, int], _Want]) -> dict[str, _Want]:
        """What the readers of each buffer need that can share its own lattice and fill."""
        merged: dict[str, _Want] = {}
        for node in self.graph.nodes:
            for i, name in enumerate(node.inputs):
                want = wants.get((node.name, i))
                if want is None or want.anything or not self._writes_lanes(name):
                    continue
                root, _ = self._root(name)
                if want.lattice != self.lattices[name] or want.fill != 0:
                    continue
                old = merged.get(root, _Want(self.lattices[root]))
                merged[root] = _merge(old, want)
        return merged

    def _layout(self, shape: tuple[int, ...], want: _Want) -> LaneLayout:
        grid = want.lattice.grid(shape[2], shape[3])
        if want.padded or grid.lanes == 1:  # tiles keep vectors together, and here are none
            return LaneLayout(shape[1], grid, want.halo, None, want.fill)
        # A tile for each thread, where that leaves enough to do: its pixels stay in its cache.
        share = shape[0] * grid.rows * grid.cols // self.threads
        limit = min(self.tile_vectors, max(LEAST_VECTORS, share))
        tile = largest_tile(grid.rows, grid.cols, limit)
        return LaneLayout(shape[1], grid, NO_HALO, tile)

    def _read(
        self,
        name: str,
        want: _Want | None,
        wants: dict[tuple[str, int], _Want],
        places: dict[str, Place],
    ) -> Place:
        place = places[name]
        if want is not None and want.anything:
            return place
        if want is None:
            if isinstance(place.view, PlainLayout):
                return place
            return self._copy(name, PlainLayout(self.graph.values[name].shape))
        if isinstance(place.view, ChannelView) and _serves(place.view.layout, want):
            return place
        shared = want
        for node in self.graph.consumers(name):
            for i, other in enumerate(node.inputs):
                theirs = wants.get((node.name, i))
                if other != name or theirs is None or theirs.anything:
                    continue
                if theirs.lattice == want.lattice and theirs.fill == want.fill:
                    shared = _merge(shared, theirs)
        return self._copy(name, self._layout(self.graph.values[name].shape, shared))

    def _copy(self, name: str, layout: LaneLayout | PlainLayout) -> Place:
        buffer = f"{name}@{layout}"
        if buffer not in self.copies:
            view: ChannelView | PlainLayout = (
                layout
                if isinstance(layout, PlainLayout)
                else (ChannelView(layout, 0, layout.channels))
            )
            self.copies[buffer] = Copy(name, Place(buffer, view))
        return self.copies[buffer].place


def _merge(a: _Want, b: _Want) -> _Want:
    top, left, bottom, right = (max(x, y) for x, y in zip(a.halo, b.halo, strict=True))
    return _Want(a.lattice, (top, left, bottom, right), a.padded or b.padded, a.fill)


def _serves(layout: LaneLayout, want: _Want) -> bool:
    grid = layout.grid
    if (grid.sy, grid.sx, grid.rows, grid.cols) != want.lattice:
        return False
    if not want.padded:
        return True
    enough = all(have >= need for have, need in zip(layout.halo, want.halo, strict=True))
    return layout.tile is None and enough and layout.fill == want.fill
