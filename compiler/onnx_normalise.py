"""Bring an ONNX model to one plain form, whatever exporter and opset it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, inliner, numpy_helper

from topiarist.errors import ModelError
from topiarist.pruning.layers import node_names


def normalise(model: onnx.ModelProto, batch: int | None) -> onnx.ModelProto:
    """A copy with local functions inlined, dense initializers, static inputs and named nodes."""
    if model.functions:
        model = inliner.inline_local_functions(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    for node, name in zip(graph.node, node_names(graph), strict=True):
        node.name = name
    _make_initializers_dense(graph)
    _drop_initializers_from_inputs(graph)
    _fix_input_shapes(graph, batch)
    _attributes_to_inputs(graph, opset(copy))
    del graph.value_info[:]
    return copy


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators that the model is written in."""
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))


def _make_initializers_dense(graph: onnx.GraphProto) -> None:
    for sparse in graph.sparse_initializer:
        try:
            dense = _dense(sparse)
        except (ValueError, IndexError, MemoryError) as error:
            raise ModelError(
                f"Sparse tensor {sparse.values.name!r} of shape {list(sparse.dims)} is broken: "
                f"{error}. Export the model again."
            ) from None
        graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _dense(sparse: onnx.SparseTensorProto) -> NDArray[Any]:
    """Indices are [nnz] into the flat tensor, or [nnz, rank]."""
    values = numpy_helper.to_array(sparse.values)
    indices = numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), dense.shape)
    dense.reshape(-1)[indices] = values
    return dense


def _drop_initializers_from_inputs(graph: onnx.GraphProto) -> None:
    """IR versions below 4 list every initializer as an input too."""
    names = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in names]
    del graph.input[:]
    graph.input.extend(inputs)


def _fix_input_shapes(graph: onnx.GraphProto, batch: int | None) -> None:
    """Pin the batch dimension; any other dynamic dimension is an error."""
    if batch is not None and batch < 1:
        raise ModelError(f"The batch size must be at least 1, got {batch}.")
    known = fixed_batch(graph)
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if not value.type.tensor_type.HasField("shape"):
            raise ModelError(
                f"Input {value.name!r} has no shape. Export the model with input shapes."
            )
        for axis, dim in enumerate(dims):
            fixed = dim.HasField("dim_value") and dim.dim_value > 0
            if axis == 0 and (not fixed or (batch is not None and dim.dim_value == known)):
                dim.dim_value = batch if batch is not None else (dim.dim_value or 1)
            elif not fixed:
                shape = [d.dim_value or d.dim_param or "?" for d in dims]
                raise ModelError(
                    f"Input {value.name!r} has shape {shape}: dimension {axis} is not fixed. "
                    "Only the batch may be dynamic; fix the others at export, or with "
                    "`python -m onnxruntime.tools.make_dynamic_shape_fixed`."
                )


def fixed_batch(graph: onnx.GraphProto) -> int:
    """The first dimension of the first image input; 0 where it is dynamic or there is none."""
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if len(dims) >= 3:
            return int(dims[0].dim_value)
    return 0


def _attributes_to_inputs(graph: onnx.GraphProto, version: int) -> None:
    """Write the old attribute forms of Slice, TopK, Upsample and Resize as today's inputs."""
    for index, node in enumerate(graph.node):
        if version < 10 and node.op_type == "Slice":
            _move(graph, node, index, ("starts", "ends", "axes"), np.int64)
        elif version < 10 and node.op_type == "TopK":
            _move(graph, node, index, ("k",), np.int64)
        elif version < 11 and node.op_type in ("Upsample", "Resize"):
            if len(node.input) == 1:
                _move(graph, node, index, ("scales",), np.float32)
            _as_resize(node)


def _move(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    index: int,
    names: tuple[str, ...],
    dtype: type[np.generic],
) -> None:
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    for name in names:
        if name in given:
            tensor_name = f"{node.op_type}_{index}_{name}"
            array = np.atleast_1d(np.asarray(given.pop(name), dtype))
            graph.initializer.append(numpy_helper.from_array(array, tensor_name))
            node.input.append(tensor_name)
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(k, v) for k, v in given.items())


def _as_resize(node: onnx.NodeProto) -> None:
    """Upsample(x, scales) -> Resize(x, roi = none, scales), as both were defined up to opset 10."""
    data, scales = node.input
    del node.input[:]
    node.input.extend([data, "", scales])
    node.op_type = "Resize"
    node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
    node.attribute.append(helper.make_attribute("nearest_mode", "floor"))
