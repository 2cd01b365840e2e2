"""Cuts channels out of an ONNX file: smaller weights, and every engine runs less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.pruning.channels import Numbers, channel_map
from topiarist.pruning.layers import constant_arrays, replace_inputs


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
    replace_inputs(small.graph, inputs)
    del small.graph.value_info[:]
    return small


def _set_attribute(node: Any, name: str, position: int, value: int) -> None:
    """Put a number into an attribute that is an integer or a list of them."""
    for item in node.attribute:
        if item.name == name and item.type == onnx.AttributeProto.INTS:
            item.ints[position] = value
        elif item.name == name:
            item.i = value
