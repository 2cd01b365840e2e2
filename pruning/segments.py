"""Run a network piece by piece, and change layers on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx

from topiarist.pruning.calibration import Arrays
from topiarist.pruning.forward import open_session, run_session


class SegmentedRun:
    """A network that stops after chosen nodes, for portions of inputs at a time.

    The values that later nodes need are kept in `values`, a dictionary for each portion; who
    changes one there changes what follows. The graph may be changed behind the point reached.
    """

    def __init__(self, model: onnx.ModelProto, portions: Sequence[Arrays]) -> None:
        self.model = model
        self.values: list[Arrays] = [dict(portion) for portion in portions]
        self._done = 0
        self._position = {o: i for i, n in enumerate(model.graph.node) for o in n.output if o}
        graph = model.graph
        inputs = {value.name for value in graph.input} - {t.name for t in graph.initializer}
        self._moving = _depends_on(graph, inputs)

    def advance_to(self, name: str) -> None:
        """Run the nodes up to the one that makes the value with this name, as far as not done."""
        last = self._position.get(name, -1)
        if last < self._done:
            return
        nodes = [
            node
            for index, node in enumerate(self.model.graph.node)
            if self._done <= index <= last or not self._moving.intersection(node.output)
        ]
        later = {name, *self._later(last)}
        wanted = [o for node in nodes for o in node.output if o in self._moving and o in later]
        given = set(self.values[0]) & {n for node in nodes for n in _reads(node)}
        session = open_session(self._piece(nodes, sorted(given), wanted))
        for values in self.values:
            values |= run_session(session, values, wanted)
            for old in set(values) - later:
                del values[old]
        self._done = last + 1

    def _later(self, last: int) -> set[str]:
        """The values that nodes behind this one read."""
        nodes = list(self.model.graph.node)[last + 1 :]
        return {name for node in nodes for name in _reads(node)}

    def _piece(
        self, nodes: Sequence[Any], given: Sequence[str], wanted: Sequence[str]
    ) -> onnx.ModelProto:
        """A model of these nodes."""
        piece = onnx.ModelProto(ir_version=self.model.ir_version)
        piece.opset_import.extend(self.model.opset_import)
        piece.functions.extend(self.model.functions)
        graph, used = piece.graph, {name for node in nodes for name in _reads(node)}
        graph.name = "piece"
        graph.node.extend(nodes)
        whole = self.model.graph
        graph.initializer.extend(t for t in whole.initializer if t.name in used)
        graph.sparse_initializer.extend(
            t for t in whole.sparse_initializer if t.values.name in used
        )
        if self.model.ir_version < 4:
            graph.input.extend(v for v in whole.input if v.name in used and v.name not in given)
        for name in given:
            kind = onnx.helper.np_dtype_to_tensor_dtype(self.values[0][name].dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        return piece


def _depends_on(graph: Any, names: set[str]) -> set[str]:
    """These values and all that are computed from them."""
    found = set(names)
    for node in graph.node:
        if found.intersection(_reads(node)):
            found.update(o for o in node.output if o)
    return found


def _reads(node: Any) -> Iterator[str]:
    """The values that a node reads, those that its subgraphs take from outside included."""
    yield from (name for name in node.input if name)
    for item in node.attribute:
        for graph in [item.g, *item.graphs] if item.HasField("g") or item.graphs else []:
            for inner in graph.node:
                yield from _reads(inner)
