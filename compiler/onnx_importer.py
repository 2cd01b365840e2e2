"""A normalised ONNX model as a Relax function: TVM's importer, mended.

Three things differ from the importer in TVM: operators in `onnx_operators` are written by us, what
depends on constants and static shapes only is computed at once, and names and errors name layers.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import onnx
import tvm
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from topiarist.compiler.layer_names import with_layer_names, with_output_names
from topiarist.compiler.onnx_normalise import opset
from topiarist.compiler.onnx_operators import CONVERTERS, OnnxCall
from topiarist.compiler.relax_calls import array_of, is_constant, operator_of, shape_of
from topiarist.errors import ModelError

WINDOWED = ("Conv", "MaxPool", "AveragePool")


def import_graph(model: onnx.ModelProto, batch_changed_from: int | None) -> tvm.IRModule:
    """One Relax function `main`; raises ModelError that names the first node that can't be."""
    importer = _Importer({}, None, sanitize=False)
    importer.batch_changed_from = batch_changed_from
    importer.refuse_unknown(model)
    try:
        module = importer.from_onnx(model.graph, opset(model))
    except ModelError:
        importer.bb._end_block()  # or TVM writes a warning to the terminal
        raise
    names = dict(importer.layer_names)
    _name_aliases(module["main"], names)
    module = with_layer_names(module, names)
    return with_output_names(module, [value.name for value in model.graph.output])


def _name_aliases(function: Any, names: dict[str, str]) -> None:
    """A variable that only renames a layer's result is that layer's result."""
    for block in function.body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Var) and binding.value.name in names:
                names.setdefault(binding.var.name, names[binding.value.name])


def _refuse_empty(node: onnx.NodeProto, expr: Any) -> None:
    """Raise ModelError where a window is larger than what it slides over."""
    if node.op_type not in WINDOWED or not isinstance(expr.ty, relax.TensorType):
        return
    shape = [int(d) for d in expr.ty.shape]
    if min(shape) < 1:
        raise ModelError(
            f"{node.op_type} node {node.name!r} has an empty output of shape {shape}: its window "
            "is larger than its padded input. Check the model's input size."
        )


class _Importer(onnx_frontend.ONNXGraphImporter):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer_names: dict[str, str] = {}
        self.batch_changed_from: int | None = None
        self.read_names: set[str] = set()

    def refuse_unknown(self, model: onnx.ModelProto) -> None:
        """Raise ModelError for the first operator that neither TVM nor we can import."""
        known = {*onnx_frontend._get_convert_map(), *CONVERTERS}
        for node in model.graph.node:
            tensors_only = not re.search("Sequence|Optional", node.op_type)
            if node.domain in ("", "ai.onnx") and node.op_type in known and tensors_only:
                continue
            domain = f" of domain {node.domain!r}" if node.domain else ""
            raise ModelError(
                f"Node {node.name!r} uses the operator {node.op_type}{domain}, which topiarist "
                "can't import. Export the model with standard inference operators only, or cut "
                "the model before this node."
            )

    def _check_for_unsupported_ops(self, graph: Any) -> None:
        """Already done, and with a better message."""

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        self.read_names = {name for node in graph.node for name in node.input}
        self.read_names |= {value.name for value in graph.output}
        for node in graph.node:
            for name, result in zip(node.output, self._results(node), strict=False):
                if name:
                    self._nodes[name] = self._emit(result, node.name)
        for value in graph.output:
            if is_constant(self._nodes[value.name]):
                raise ModelError(
                    f"Output {value.name!r} does not depend on the model's input. Remove it from "
                    "the model's outputs."
                )

    def _results(self, node: onnx.NodeProto) -> list[Any]:
        """The expressions of the node's outputs, in order."""
        folded = self._folded(node)
        if folded is not None:
            return folded
        try:
            expr = self._converted(node)
        except ModelError:
            raise
        except Exception as error:
            # TVM's converters fail in any way; each of them means that the node can't be imported.
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                f"{node.op_type} node {node.name!r} can't be imported: {reason[-1]}. Export the "
                "model without it, or cut the model before it."
            ) from error
        if isinstance(expr, relax.Tuple):
            return list(expr.fields)
        _refuse_empty(node, expr)
        if isinstance(expr.ty, relax.TupleType):
            whole = self.bb.emit(expr)
            return [relax.TupleGetItem(whole, i) for i in range(len(expr.ty.fields))]
        return [expr]

    def _converted(self, node: onnx.NodeProto) -> Any:
        inputs = [self._nodes[name] if name else None for name in node.input]
        attributes = self._parse_attr(node.attribute)
        if node.op_type in CONVERTERS:
            call = OnnxCall(
                lambda expr: self._bind(expr, node.name),
                node.name,
                node.op_type,
                tuple(inputs),
                attributes,
                len(node.output),
                any(name in self.read_names for name in node.output[1:]),
                self.opset,
                self.batch_changed_from,
            )
            return self.bb.normalize(CONVERTERS[node.op_type](call))
        attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        optional = onnx_frontend.onnx_input()
        optional.extend(inputs)
        return self._convert_operator(node.op_type, optional, attributes, self.opset)

    def _folded(self, node: onnx.NodeProto) -> list[Any] | None:
        """The node's results as constants, when nothing in it waits for the network's input."""
        if node.op_type in ("Shape", "Size"):
            shape = np.array(shape_of(self._nodes[node.input[0]]), np.int64)
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            part = shape[attributes.get("start", 0) : attributes.get("end")]
            return [_constant(part if node.op_type == "Shape" else np.array(shape.prod()))]
        if not all(is_constant(self._nodes[name]) for name in node.input if name):
            return None
        values = {name: array_of(self._nodes[name]) for name in node.input if name}
        results = _evaluate(node, values, self.opset)
        return None if results is None else [_constant(np.asarray(r)) for r in results]

    def _emit(self, expr: Any, name: str) -> Any:
        """Bind the expression to a variable that is recorded as the layer's."""
        if not isinstance(expr, relax.Call | relax.TupleGetItem):
            return expr
        if not isinstance(expr.ty, relax.TensorType):
            return expr
        if operator_of(expr) == "reshape" and shape_of(expr) == shape_of(expr.args[0]):
            return expr.args[0]
        return self._bind(expr, name)

    def _bind(self, expr: Any, name: str) -> Any:
        variable = self.bb.emit(expr, name)
        self.layer_names[variable.name] = name
        return variable


def _constant(array: NDArray[Any]) -> Any:
    """The array as it is; without its dtype, TVM would narrow int64 to int32."""
    return relax.const(array, str(array.dtype))


def _evaluate(node: onnx.NodeProto, values: dict[str, Any], version: int) -> list[Any] | None:
    """Run one node on constants; None when onnx itself can't."""
    outputs = list(node.output)
    graph = helper.make_graph(
        [node],
        "constants",
        [helper.make_value_info(name, onnx.TypeProto()) for name in values],
        [helper.make_value_info(name, onnx.TypeProto()) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results: list[Any] = ReferenceEvaluator(model).run(None, values)
    except Exception:
        # Its operators fail in any way, and it lacks some versions: TVM may still know them.
        return None
    return results
