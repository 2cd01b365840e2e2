"""The layers of an ONNX file that have constant weights, and how to put new weights there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from topiarist.errors import ModelError

LayerKind = Literal["Conv", "Gemm", "MatMul"]

# Names that exporters count up by themselves: the weight's name says more.
_AUTOMATIC = re.compile(r"^(node_)?(conv|conv2d|convolution|gemm|linear|matmul)_?\d*$", re.I)
_WEIGHT_ENDING = re.compile(r"([._/]weights?|[._/]kernel|_w_0|_w|[./]w)(:0)?$", re.I)


@dataclass(frozen=True, eq=False)
class WeightedLayer:
    """A Conv, Gemm or MatMul whose weight is a constant of the file.

    `weight` is [O, C / groups, kh, kw], fully connected [M, K, 1, 1], in the stored dtype; 1-D
    convolutions have kh = 1, 3-D ones have depth and height together. `weight_name` is the
    tensor in the file; layers that share one have the same.
    """

    name: str
    kind: LayerKind
    node: Any  # onnx.NodeProto
    weight_name: str
    weight: NDArray[Any]
    groups: int
    stored_shape: tuple[int, ...]
    transposed: bool  # stored as [K, M]

    def as_stored(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the shape of `weight` -> of the shape in the file."""
        if self.transposed:
            return values.reshape(values.shape[:2]).T
        return values.reshape(self.stored_shape)


def weighted_layers(model: onnx.ModelProto) -> list[WeightedLayer]:
    """All layers of the main graph with constant floating-point weights, in file order.

    Layers are called as `node_names` says. Raises ModelError if a weight is in an external file
    that was not loaded.
    """
    constants = _constants(model.graph)
    arrays: dict[str, NDArray[Any]] = {}
    layers = []
    for node, name in zip(model.graph.node, node_names(model.graph), strict=True):
        source = constants.get(_weight_input(node))
        if source is None:
            continue
        if source.name not in arrays:
            arrays[source.name] = _to_array(source.tensor, source.name)
        layer = _layer(node, name, source.name, arrays[source.name])
        if layer is not None:
            layers.append(layer)
    return layers


def constant_arrays(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Value name -> array, for all constants of the main graph, Unsqueeze of a constant included.

    Raises ModelError if one is in an external file that was not loaded.
    """
    found = {name: _to_array(c.tensor, c.name) for name, c in _constants(model.graph).items()}
    for node in model.graph.node:
        if node.op_type == "Unsqueeze" and all(name in found for name in node.input):
            axes = attribute(node, "axes", None)
            axes = found[node.input[1]].tolist() if axes is None else axes
            found[node.output[0]] = np.expand_dims(found[node.input[0]], tuple(axes))
    return found


def constant_sources(model: onnx.ModelProto) -> dict[str, str]:
    """Value name -> name of the tensor in the file, for constants and Identity nodes of these."""
    return {name: constant.name for name, constant in _constants(model.graph).items()}


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of an ONNX attribute, or the default."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def read_inside(node: Any) -> Iterator[str]:
    """The values that the bodies of a loop or a condition read."""
    for item in node.attribute:
        for graph in (item.g, *item.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from read_inside(inner)


def replace_weights(model: onnx.ModelProto, weights: dict[str, NDArray[Any]]) -> None:
    """Put arrays of the stored shape and dtype in the place of the named tensors, in `model`."""
    sources = {source.name: source.tensor for source in _constants(model.graph).values()}
    for name, array in weights.items():
        tensor = sources[name]
        if isinstance(tensor, onnx.SparseTensorProto):
            _fill_sparse(tensor, array)
        else:
            replacement = numpy_helper.from_array(np.ascontiguousarray(array), tensor.name)
            replacement.doc_string = tensor.doc_string
            tensor.CopyFrom(replacement)


def replace_inputs(graph: Any, inputs: Mapping[tuple[int, int], NDArray[Any]]) -> None:
    """Give nodes other constants: in place where nobody else reads them, else under new names.

    Places are (node, input), and may be one past a node's last input.
    """
    readers = Counter(value.name for value in graph.output)
    readers.update(name for node in graph.node for name in (*node.input, *read_inside(node)))
    stored = {tensor.name: tensor for tensor in graph.initializer}
    listed = {value.name: value for value in graph.input}
    nodes = list(graph.node)
    for (index, number), array in inputs.items():
        node = nodes[index]
        if number == len(node.input):
            node.input.append(f"{node.output[0]}_input_{number}")
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


@dataclass(frozen=True)
class _Constant:
    """A tensor of the file under the name it is defined by."""

    name: str
    tensor: Any  # onnx.TensorProto or onnx.SparseTensorProto


def _constants(graph: Any) -> dict[str, _Constant]:
    """Value name -> tensor: initializers, Constant nodes, and Identity nodes of these."""
    found = {t.name: _Constant(t.name, t) for t in graph.initializer}
    found |= {t.values.name: _Constant(t.values.name, t) for t in graph.sparse_initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for item in node.attribute:
                if item.name == "value":
                    found[node.output[0]] = _Constant(node.output[0], item.t)
                elif item.name == "sparse_value":
                    found[node.output[0]] = _Constant(node.output[0], item.sparse_tensor)
        elif node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _weight_input(node: Any) -> str:
    """Name of the value that a layer uses as its weight, "" for other operators."""
    if node.domain in ("", "ai.onnx") and node.op_type in ("Conv", "Gemm", "MatMul"):
        return str(node.input[1])
    return ""


def node_names(graph: Any) -> list[str]:
    """For each node the name by which users know it, all different.

    That is the name in the file; where an exporter only counted (Conv_12), the weight's name
    without its ending.
    """
    weights = {t.name for t in graph.initializer}
    weights |= {t.values.name for t in graph.sparse_initializer}
    taken: dict[str, None] = {}
    for index, node in enumerate(graph.node):
        base = name = _readable_name(node, weights, index)
        copies = 1
        while name in taken:
            copies += 1
            name = f"{base}_{copies}"
        taken[name] = None
    return list(taken)


def _readable_name(node: Any, weights: set[str], index: int) -> str:
    """The node's own name, or its weight's, or operator and position."""
    weight = _weight_input(node)
    stem = _WEIGHT_ENDING.sub("", weight)
    if weight in weights and stem != weight and _AUTOMATIC.match(node.name or "conv"):
        return stem
    return str(node.name) or f"{node.op_type.lower()}_{index}"


def _layer(node: Any, name: str, weight_name: str, array: NDArray[Any]) -> WeightedLayer | None:
    """The layer, or None if its weight is no convolution kernel or matrix of floats."""
    is_conv = node.op_type == "Conv"
    right_rank = array.ndim in (3, 4, 5) if is_conv else array.ndim == 2
    if not right_rank or not array.size or not _is_float(array):
        return None
    transposed = not is_conv and not (node.op_type == "Gemm" and attribute(node, "transB", 0))
    return WeightedLayer(
        name=name,
        kind=node.op_type,
        node=node,
        weight_name=weight_name,
        weight=_output_channels_first(array, transposed),
        groups=int(attribute(node, "group", 1)) if is_conv else 1,
        stored_shape=array.shape,
        transposed=transposed,
    )


def _output_channels_first(array: NDArray[Any], transposed: bool) -> NDArray[Any]:
    """Stored weight -> [O, C / groups, kh, kw]."""
    if array.ndim == 2:
        return (array.T if transposed else array)[:, :, None, None]
    if array.ndim == 3:
        return array[:, :, None, :]
    return array.reshape(*array.shape[:2], -1, array.shape[-1])


def _is_float(array: NDArray[Any]) -> bool:
    """Floating point, bfloat16 of ml_dtypes included."""
    return np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"


def _to_array(tensor: Any, name: str) -> NDArray[Any]:
    """The values of a dense or sparse tensor."""
    if isinstance(tensor, onnx.SparseTensorProto):
        return _from_sparse(tensor, name)
    if uses_external_data(tensor):
        raise ModelError(
            f"{name}: its values are in a separate file that was not loaded; "
            "load the model together with its external data (onnx.load(path))"
        )
    array: NDArray[Any] = numpy_helper.to_array(tensor)
    return array


def _from_sparse(tensor: Any, name: str) -> NDArray[Any]:
    """Dense array of a SparseTensorProto; its indices are [nnz] linear or [nnz, rank]."""
    values = _to_array(tensor.values, name)
    indices = _to_array(tensor.indices, name)
    shape = tuple(tensor.dims)
    array = np.zeros(shape, dtype=values.dtype)
    if indices.ndim == 1:
        array.reshape(-1)[indices] = values
    else:
        array[tuple(indices.T)] = values
    return array


def _fill_sparse(tensor: Any, array: NDArray[Any]) -> None:
    """Store the nonzeros of the array under linear indices."""
    flat = np.ascontiguousarray(array).reshape(-1)
    positions = np.flatnonzero(flat).astype(np.int64)
    tensor.values.CopyFrom(numpy_helper.from_array(flat[positions], tensor.values.name))
    tensor.indices.CopyFrom(numpy_helper.from_array(positions, tensor.indices.name))


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
