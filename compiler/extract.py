"""The Relax function `main` as a graph of layers, each with its epilogue fused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm
from tvm import relax

from topiarist.compiler.find_dynamic import find_dynamic
from topiarist.compiler.fuse_layers import fuse_layers
from topiarist.compiler.graph import Graph, Node, Opaque, Value, View
from topiarist.compiler.layer_names import layer_names, output_names
from topiarist.compiler.read_layer import Site, read_layer
from topiarist.compiler.relax_calls import dtype_of, operator_of, shape_of
from topiarist.errors import ModelError


def extract_layers(module: tvm.IRModule, *, dynamic: bool = True) -> Graph:
    """The layers of an imported module. Raises ModelError for what no layer can express.

    Without `dynamic`, for targets that have no kernels for them, dynamic convolutions stay as the
    layers that they are made of.
    """
    reader = _Reader(module["main"])
    graph = find_dynamic(reader.graph()) if dynamic else reader.graph()
    return _with_unique_names(fuse_layers(graph, reader.opaque_forms))


class _Reader:
    """Turns each binding of a function into one node, unfused."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.layers = layer_names(function)
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.opaque_forms: dict[str, Opaque] = {}  # output value -> its node as Opaque
        self._substitutes: dict[str, Any] = {}  # variable -> the expression that it renames
        self._value_of: dict[str, str] = {}  # variable -> value

    def graph(self) -> Graph:
        """Read the whole function."""
        for parameter in self.function.params:
            self._add_value(parameter)
        inputs = tuple(self.values)
        for block in self.function.body.blocks:
            for binding in block.bindings:
                expr = self._substituted(binding.value)
                if not expr.same_as(binding.value) and isinstance(expr, relax.Call):
                    relax.expr._update_type(expr, binding.value.ty)
                self._read(binding.var, expr)
        outputs = self._outputs()
        return Graph(tuple(self.nodes), self.values, inputs, outputs)

    def _read(self, variable: Any, expr: Any) -> None:
        computes = isinstance(expr, relax.Call)
        if _is_same_view(expr, variable):
            computes, expr = False, expr.args[0]
        if not computes or not isinstance(variable.ty, relax.TensorType):
            # An alias or a tuple: whoever reads the variable reads the expression instead.
            self._substitutes[variable.name] = expr
            return
        name = self.layers.get(variable.name) or operator_of(expr).rpartition(".")[2]
        opaque = self._opaque(name, expr, self._add_value(variable))
        site = Site(
            name,
            expr,
            opaque.output,
            shape_of(variable),
            dtype_of(variable),
            self.value_of,
            self._add_intermediate,
        )
        self.nodes.extend(read_layer(site) or [opaque])
        self.opaque_forms[opaque.output] = opaque

    def _substituted(self, expr: Any) -> Any:
        """The expression without the variables that stand for tuples or other variables."""
        if isinstance(expr, relax.Var):
            return self._substitutes.get(expr.name, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._substituted(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return self._field(expr)
        if isinstance(expr, relax.Call):
            arguments = [self._substituted(argument) for argument in expr.args]
            if all(new.same_as(old) for new, old in zip(arguments, expr.args, strict=True)):
                return expr
            return relax.Call(expr.op, arguments, expr.attrs, expr.ty_args)
        return expr

    def _field(self, expr: Any) -> Any:
        whole = self._substituted(expr.tuple_value)
        if isinstance(whole, relax.Tuple):
            return whole.fields[expr.index]
        raise ModelError(
            f"The operator {operator_of(whole)} has several results, which topiarist can't place "
            "in a network. Export the model without it, or cut the model before it."
        )

    def _opaque(self, name: str, expr: Any, output: str) -> Opaque:
        if operator_of(expr) in ("call_tir", "call_dps_packed", "call_tir_inplace"):
            raise ModelError(
                f"Layer {name!r} is imported as a TIR function, which topiarist can't place in a "
                "network. Export the model without this operator, or cut the model before it."
            )
        arguments: dict[str, Any] = {}

        def visit(part: Any) -> None:
            if isinstance(part, relax.Var):
                arguments.setdefault(part.name, part)

        relax.analysis.post_order_visit(expr, visit)
        return Opaque(
            name=name,
            inputs=tuple(self.value_of(argument) for argument in arguments.values()),
            output=output,
            call=expr,
            arguments=tuple(arguments.values()),
        )

    def value_of(self, variable: Any) -> str:
        """The name of the value that a variable holds."""
        return self._value_of[variable.name]

    def _outputs(self) -> tuple[str, ...]:
        """Give the results the names that the model has for them."""
        result = self._substituted(self.function.body.body)
        fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
        renamed: dict[str, str] = {}
        outputs = []
        for name, field in zip(self._output_names(len(fields)), fields, strict=True):
            value = self.value_of(field)
            if renamed.get(value) == name:
                outputs.append(name)
                continue
            if value in renamed or any(value == self.value_of(p) for p in self.function.params):
                name = self._add_view(value, name)
            else:
                renamed[value] = name
            outputs.append(name)
        self._rename(renamed)
        return tuple(outputs)

    def _output_names(self, count: int) -> list[str]:
        names = output_names(self.function)
        if len(names) == count:
            return names
        return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]

    def _add_view(self, value: str, name: str) -> str:
        """An output that is an input, or another output too, gets a node of its own."""
        if name not in self.values:
            self.values[name] = replace(self.values[value], name=name)
            self.nodes.append(View(name=name, inputs=(value,), output=name))
        return name

    def _rename(self, renamed: dict[str, str]) -> None:
        def rename(node: Any) -> Any:
            inputs = tuple(renamed.get(i, i) for i in node.inputs)
            return replace(node, inputs=inputs, output=renamed.get(node.output, node.output))

        self.nodes = [rename(node) for node in self.nodes]
        self.opaque_forms = {
            renamed.get(value, value): rename(node) for value, node in self.opaque_forms.items()
        }
        self.values = {
            renamed.get(name, name): replace(value, name=renamed.get(name, name))
            for name, value in self.values.items()
        }

    def _add_value(self, variable: Any) -> str:
        shape = variable.ty.shape
        if not isinstance(shape, relax.ShapeExpr) or not all(
            isinstance(size, tvm.tirx.IntImm) for size in shape.values
        ):
            raise ModelError(
                f"The shape of {self.layers.get(variable.name, variable.name)!r} is known at run "
                "time only, and topiarist compiles fixed shapes. Fix the shapes at export, or cut "
                "the model before this layer."
            )
        name = self._add_intermediate(variable.name, shape_of(variable), dtype_of(variable))
        self._value_of[variable.name] = name
        return name

    def _add_intermediate(self, base: str, shape: tuple[int, ...], dtype: str = "float32") -> str:
        """Record a value; the names of the results are kept free for them."""
        is_input = any(base == parameter.name for parameter in self.function.params)
        reserved = set() if is_input else set(output_names(self.function))
        name = base
        while name in self.values or name in reserved:
            name += "_"
        self.values[name] = Value(name, shape, dtype)
        return name


def _is_same_view(expr: Any, variable: Any) -> bool:
    """A reshape to the shape that the tensor has."""
    return operator_of(expr) == "reshape" and shape_of(expr.args[0]) == shape_of(variable)


def _with_unique_names(graph: Graph) -> Graph:
    """The first node of a layer keeps the layer's name; its other nodes get a number."""
    taken = {node.name for node in graph.nodes}
    seen: set[str] = set()
    nodes = []
    for node in graph.nodes:
        name, copies = node.name, 1
        while name in seen or (copies > 1 and name in taken):
            copies += 1
            name = f"{node.name}_{copies}"
        seen.add(name)
        nodes.append(node if name == node.name else replace(node, name=name))
    return replace(graph, nodes=tuple(nodes))
