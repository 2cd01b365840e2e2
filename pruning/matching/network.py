"""An ONNX network as a function of its inputs and trained tensors, with its gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx

from topiarist.pruning.layers import constant_arrays, constant_sources, read_inside
from topiarist.pruning.matching.call import Array, Call, Result, Scratch, refused
from topiarist.pruning.matching.operators import OPERATORS, conv_norm

Gradients = dict[str, Array]

TRAINED = {"Conv": (1, 2), "Gemm": (1, 2), "MatMul": (1,), "BatchNormalization": (1, 2)}
_NEW_VALUES = {"Add", "BatchNormalization", "Conv", "Gemm", "MatMul"}  # not needed for gradients
_OVERWRITE = {"Clip", "Relu"}


@dataclass(frozen=True, eq=False)
class _Step:
    """An operator, the values that it reads ("" for none), and those that nobody reads later."""

    function: Callable[..., Result]
    inputs: tuple[str, ...]
    output: str
    over: list[str] = field(default_factory=list)


class Network:
    """Runs for one thread at a time, in the dtype that it is given, whatever the file says.

    `parameters` are the weights, biases, scales and shifts that can be trained, by the names of
    their tensors: those that nothing else reads. `outputs` names values inside or at the end.
    Raises TrainingError for an operator that has no gradient here, ModelError for weights that
    were not loaded.
    """

    def __init__(self, model: onnx.ModelProto, outputs: Sequence[str], dtype: Any = np.float32):
        self.outputs = tuple(outputs)
        self.dtype = np.dtype(dtype)
        self.values_held = 0  # by the last run, for its gradient
        self._scratch = Scratch()
        self._sources = constant_sources(model)
        arrays = constant_arrays(model)
        self._constants = {name: self._cast(array) for name, array in arrays.items()}
        self._trained = _trained(model.graph, self._sources)
        self.parameters = {
            name: self._constants[name]
            for name in sorted(self._trained)
            if self._constants[name].dtype == self.dtype
        }
        nodes = _needed(model.graph, self.outputs, self._constants)
        self._steps = list(self._plan(nodes))
        _note_last_readers(self._steps, self.outputs)

    def run(
        self, inputs: Mapping[str, Array], parameters: Mapping[str, Array]
    ) -> tuple[list[Array], Callable[[Sequence[Array]], Gradients]]:
        """The outputs, and a function from their gradients to those of the parameters."""
        values = {name: self._cast(array) for name, array in inputs.items()}
        tape, held = [], 0
        for step in self._steps:
            read = [self._value(name, values, parameters) for name in step.inputs]
            values[step.output], pull = step.function(*read)
            tape.append((step, pull))
            held += values[step.output].size
            del read
            for name in step.over:
                values.pop(name, None)

        self.values_held = held

        def pull_all(gradients: Sequence[Array]) -> Gradients:
            waiting = dict(zip(self.outputs, gradients, strict=True))
            found: Gradients = {}
            while tape:
                step, pull = tape.pop()
                if step.output not in waiting or not self._moves(step.output):
                    continue
                parts = pull(waiting.pop(step.output))
                for name, part in zip(step.inputs, parts, strict=False):
                    if part is None or not self._moves(name):
                        continue
                    source = self._sources.get(name)
                    place, total = (waiting, name) if source is None else (found, source)
                    place[total] = place[total] + part if total in place else part
            return found

        return [values[name] for name in self.outputs], pull_all

    def _cast(self, array: Array) -> Array:
        """Numbers with a fraction in the network's dtype."""
        whole = array.dtype.kind in "iub"
        return array if whole else np.asarray(array, self.dtype)

    def _value(
        self, name: str, values: Mapping[str, Array], parameters: Mapping[str, Array]
    ) -> Array | None:
        if name in values:
            return values[name]
        source = self._sources.get(name, "")
        return parameters[source] if source in parameters else self._constants.get(name)

    def _moves(self, name: str) -> bool:
        """Whether a value depends on a parameter."""
        return name in self._moving or self._sources.get(name) in self.parameters

    def _plan(self, nodes: Sequence[Any]) -> Iterator[_Step]:
        """The steps in the order of the file; a batch norm joins the convolution that it reads."""
        reads = Counter(name for node in nodes for name in node.input)
        reads.update(self.outputs)
        makers = {node.output[0]: node for node in nodes}
        norms = {
            node.input[0]: node
            for node in nodes
            if node.op_type == "BatchNormalization"
            and reads[node.input[0]] == 1
            and getattr(makers.get(node.input[0]), "op_type", "") == "Conv"
            and all(name in self._constants for name in node.input[1:])
        }
        self._moving: set[str] = set()
        for node in nodes:
            norm = norms.get(node.output[0])
            if node.op_type == "BatchNormalization" and norms.get(node.input[0]) is node:
                continue
            inputs = tuple(node.input)
            if norm is not None:
                inputs = (*inputs, "", "")[:3] + tuple(norm.input[1:])
            output = (norm or node).output[0]
            alone = reads[inputs[0]] == 1 and inputs[0] in makers
            fresh = alone and makers[inputs[0]].op_type in _NEW_VALUES
            call = Call(
                node,
                wants=tuple(map(self._moves, inputs)),
                overwrite=fresh and node.op_type in _OVERWRITE,
                scratch=self._scratch,
            )
            if any(call.wants):
                self._moving.add(output)
            function = partial(OPERATORS[node.op_type], call)
            if norm is not None:
                function = partial(conv_norm, call, Call(norm))
            yield _Step(function, inputs, output)


def _trained(graph: Any, sources: Mapping[str, str]) -> set[str]:
    """The tensors that only the trained inputs of layers and batch norms read."""
    readers: Counter[str] = Counter(sources.get(value.name, "") for value in graph.output)
    trained: Counter[str] = Counter()
    for node in graph.node:
        if node.output[0] in sources:
            continue
        readers.update(sources[n] for n in (*node.input, *read_inside(node)) if n in sources)
        places = TRAINED.get(node.op_type, ())
        trained.update(
            sources[node.input[i]]
            for i in places
            if i < len(node.input) and node.input[i] in sources
        )
    return {name for name, count in trained.items() if readers[name] == count}


def _needed(graph: Any, outputs: Sequence[str], constants: Mapping[str, Array]) -> list[Any]:
    """The nodes that make the outputs; TrainingError for one without a gradient here."""
    wanted, nodes = set(outputs), []
    for node in reversed(graph.node):
        if not wanted.intersection(node.output) or node.output[0] in constants:
            continue
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            raise refused(node, f"only {', '.join(sorted(OPERATORS))} have a gradient here")
        if wanted.intersection(node.output[1:]):
            raise refused(node, "more than its first output is read")
        nodes.append(node)
        wanted.update(node.input)
    return nodes[::-1]


def _note_last_readers(steps: Sequence[_Step], outputs: Sequence[str]) -> None:
    """Let each step know what can be forgotten after it."""
    seen = set(outputs)
    for step in reversed(steps):
        for name in set(step.inputs) - seen:
            step.over.append(name)
        seen.update(step.inputs)
