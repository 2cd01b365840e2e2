"""Cuts channels out of an ONNX file: smaller weights, and every engine runs less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from topiarist.pruning.channels import Numbers, channel_map
from topiarist.pruning.layers import constant_arrays, read_inside


def shrink(model: onnx.ModelProto, kept: Mapping[str, Sequence[int] | Numbers]) -> onnx.ModelProto:
    """A copy of the model in which groups of channels have only the kept ones, in file order.

    `kept` maps a group of `channel_map(model)` to indices of its channels; the others stay whole.
    Shapes of values inside the graph are left out: they follow. Raises ValueError for an unknown
    group, one that can't be cut, or one that would lose all of its channels.
    """
    channels = channel_map(model)
    mask = channels.mask(kept)
    constants = constant_arrays(model)
    small = onnx.ModelProto()
    small.CopyFrom(model)
    inputs: dict[tuple[int, int], NDArray[Any]] = {}
    for cut in channels.cuts:
        if not mask[cut.channels].all():
            place = (cut.node, cut.input)
            array = inputs.get(place, constants[model.graph.node[cut.node].input[cut.input]])
            inputs[place] = array.compress(mask[cut.channels], axis=cut.axis)
    for count in channels.counts:
        stay = int(np.count_nonzero(mask[count.channels]))
        node = small.graph.node[count.node]
        if isinstance(count.where, str):
            _set_attribute(node, count.where, count.position, stay)
        elif stay < len(count.channels):
            place = (count.node, count.where)
            array = inputs.get(place, constants[node.input[count.where]]).copy()
            array[count.position] = stay
            inputs[place] = array
    _replace_inputs(small.graph, inputs)
    del small.graph.value_info[:]
    return small


def _set_attribute(node: Any, name: str, position: int, value: int) -> None:
    """Put a number into an attribute that is an integer or a list of them."""
    for item in node.attribute:
        if item.name == name and item.type == onnx.AttributeProto.INTS:
            item.ints[position] = value
        elif item.name == name:
            item.i = value


def _replace_inputs(graph: Any, inputs: Mapping[tuple[int, int], NDArray[Any]]) -> None:
    """Give nodes other constants: in place where nobody else reads them, else under new names."""
    readers = Counter(value.name for value in graph.output)
    readers.update(name for node in graph.node for name in (*node.input, *read_inside(node)))
    stored = {tensor.name: tensor for tensor in graph.initializer}
    listed = {value.name: value for value in graph.input}
    nodes = list(graph.node)
    for (index, number), array in inputs.items():
        node = nodes[index]
        name = node.input[number]
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        if name not in stored or readers[name] > 1:
            tensor.name = node.input[number] = _new_name(name, readers)
            readers.update({tensor.name: 1, name: -1})
            graph.initializer.append(tensor)
            _drop_if_unread(graph, name, readers)
            continue
        tensor.doc_string = stored[name].doc_string
        stored[name].CopyFrom(tensor)
        if name in listed:
            new = onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims)
            listed[name].CopyFrom(new)


def _new_name(name: str, taken: Mapping[str, int]) -> str:
    """The name with a number that makes it new."""
    number = 2
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def _drop_if_unread(graph: Any, name: str, readers: Counter[str]) -> None:
    """Remove a constant that nobody reads any more, and what only made it."""
    if readers[name] > 0:
        return
    for sparse in [t for t in graph.sparse_initializer if t.values.name == name]:
        graph.sparse_initializer.remove(sparse)
    for tensor in [t for t in graph.initializer if t.name == name]:
        graph.initializer.remove(tensor)
    for value in [v for v in graph.input if v.name == name]:
        graph.input.remove(value)
    for node in [n for n in graph.node if name in n.output]:
        graph.node.remove(node)
        readers.subtract(node.input)
        for source in node.input:
            _drop_if_unread(graph, source, readers)
