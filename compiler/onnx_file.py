"""Read an ONNX file and refuse what can't be trusted: broken, incomplete, or reaching outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from topiarist.errors import ModelError

OLDEST_OPSET = 7
_IR_WITHOUT_WEIGHT_INPUTS = 4


def read_model(path: str | Path) -> onnx.ModelProto:
    """The model with its external data loaded; its tensors are complete, but not yet checked."""
    path = Path(path)
    model = _parse(path)
    for tensor in tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _load_external(tensor, path)
    return model


def check_model(model: onnx.ModelProto) -> None:
    """Raise ModelError for a model that can't be right, whatever it would compute."""
    _check_names(model.graph)
    _check_opset(model)
    for tensor in tensors(model.graph):
        _check_tensor(tensor)
    if not any(node.op_type == "Conv" for node in _all_nodes(model)):
        raise ModelError(
            "The model has no convolution, so there is nothing for topiarist to speed up. "
            "Give it a convolutional network, or run this one with ONNX Runtime."
        )
    _check_structure(model)


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All constant tensors of the graph: initializers and attributes, subgraphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from _attribute_tensors(attribute)


def _attribute_tensors(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    if attribute.HasField("sparse_tensor"):
        yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
    if attribute.HasField("g"):
        yield from tensors(attribute.g)
    for graph in attribute.graphs:
        yield from tensors(graph)


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _parse(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise ModelError(f"{path} is a folder. Give the path of the .onnx file itself.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"There is no model file {path}. Check the path.") from None
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        model.Clear()
    if not model.ir_version or not model.graph.node:
        raise ModelError(
            f"{path} is not an ONNX model, or it is truncated ({len(content)} bytes). "
            "Export or download it again; a file kept in Git LFS needs `git lfs pull`."
        )
    return model


def _load_external(tensor: onnx.TensorProto, model_path: Path) -> None:
    """Replace a tensor's reference into a data file by the bytes, after checking the reference."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    source = _external_path(tensor.name, where.get("location", ""), model_path)
    try:
        offset = int(where.get("offset", 0))
        length = int(where.get("length", source.stat().st_size - offset))
    except ValueError:
        raise ModelError(
            f"Tensor {tensor.name!r}: its external data has an offset or length that is no number. "
            "Export the model again."
        ) from None
    if offset < 0 or length < 0 or offset + length > source.stat().st_size:
        raise ModelError(
            f"Tensor {tensor.name!r}: {source.name} has {source.stat().st_size} bytes, but the "
            f"model wants bytes {offset} to {offset + length}. The data file is truncated or "
            "belongs to another model: copy it again."
        )
    with source.open("rb") as file:
        file.seek(offset)
        tensor.raw_data = file.read(length)
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.DEFAULT


def _external_path(name: str, location: str, model_path: Path) -> Path:
    folder = model_path.resolve().parent
    source = (folder / location).resolve()
    if not location or Path(location).is_absolute() or not source.is_relative_to(folder):
        raise ModelError(
            f"Tensor {name!r} keeps its data at {location!r}, which is outside the model's folder "
            f"{folder}. Such a file is not opened: put the data beside the model and save the "
            "model with a relative location."
        )
    if not source.is_file():
        raise ModelError(
            f"Tensor {name!r} keeps its data in {location!r}, and there is no such file in "
            f"{folder}. Copy the data file beside the model."
        )
    return source


def _check_names(graph: onnx.GraphProto) -> None:
    """Names must be text: in a damaged file protobuf gives bytes, or raises."""
    try:
        named = (*graph.initializer, *graph.input, *graph.output, *graph.node)
        names = [graph.name, *(item.name for item in named)]
        for node in graph.node:
            names += [node.op_type, node.domain, *node.input, *node.output]
            names += [attribute.name for attribute in node.attribute]
        damaged = any(not isinstance(name, str) for name in names)
    except UnicodeDecodeError:
        damaged = True
    if damaged:
        raise ModelError(
            "The model has a name that is not UTF-8 text. The file is damaged: export or download "
            "it again."
        )


def _check_opset(model: onnx.ModelProto) -> None:
    newest = onnx.defs.onnx_opset_version()
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions or not OLDEST_OPSET <= versions[0] <= newest:
        found = f"opset {versions[0]}" if versions else "no ONNX opset"
        raise ModelError(
            f"The model uses {found}; topiarist reads opset {OLDEST_OPSET} to {newest}. "
            "Export it again with an opset in that range."
        )


def _check_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ModelError(
            f"Tensor {tensor.name!r} has its data in a file that was not read. Load the model "
            "with load_onnx, or give import_model the path."
        )
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"Tensor {tensor.name!r} of shape {list(tensor.dims)} can't be read: {error}. "
            "The file is damaged: export or download it again."
        ) from None
    if not np.issubdtype(array.dtype, np.floating):
        return
    # An infinite scalar is a legitimate bound, of Clip for instance.
    good = ~np.isnan(array) if array.size == 1 else np.isfinite(array)
    if not good.all():
        raise ModelError(
            f"Tensor {tensor.name!r} has {int((~good).sum())} NaN or infinite values of "
            f"{array.size}. The training or the export went wrong: use a sound checkpoint."
        )


def _check_structure(model: onnx.ModelProto) -> None:
    """ONNX's own checker: every name defined once and before its use, every operator known."""
    try:
        onnx.checker.check_model(_without_weights(model))
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ModelError(
            f"The model is not valid ONNX: {reason} Export it again, or repair it; "
            "`onnx.checker.check_model` says the same."
        ) from None


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its initializers as inputs: the checker would copy them, up to 2 GiB.

    Inputs and outputs get shapes where they have none, which the checker minds and we do not.
    """
    skeleton = onnx.ModelProto(ir_version=max(model.ir_version, _IR_WITHOUT_WEIGHT_INPUTS))
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    graph = skeleton.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    weights = {t.name: (t.data_type, t.dims) for t in model.graph.initializer}
    for sparse in model.graph.sparse_initializer:
        weights[sparse.values.name] = (sparse.values.data_type, sparse.dims)
    graph.input.extend(value for value in model.graph.input if value.name not in weights)
    for name, (kind, dims) in weights.items():
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, dims))
    graph.output.extend(model.graph.output)
    for value in (*graph.input, *graph.output):
        if not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
    return skeleton
