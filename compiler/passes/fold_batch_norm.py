"""Fold a scale and shift per channel (a batch norm) into the convolution or matmul before it.

c = conv2d(x, W)                      c = conv2d(x, W * scale)
b = add(c, bias)              ->      y = add(c, bias * scale + shift)
m = multiply(b, scale)
y = add(m, shift)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from topiarist.compiler.layer_names import layer_names, with_layer_names
from topiarist.compiler.per_channel import Float64Array, ScaleShift, match_scale_shift
from topiarist.compiler.relax_calls import array_of, is_constant, operator_of, shape_of


@tvm.transform.module_pass(opt_level=0, name="FoldBatchNorm")
class FoldBatchNorm:
    """See the module's docstring. Layers whose raw result has another reader stay as they are."""

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """The module with its function `main` rewritten."""
        folder = _Folder(module)
        module = module.clone()
        module["main"] = folder.visit_expr(module["main"])
        return with_layer_names(module, folder.names)


def count_readers(function: Any) -> Counter[str]:
    """How often each variable is read, by name; the function's results count as readers."""
    readers: Counter[str] = Counter()

    def visit(expr: Any) -> None:
        if isinstance(expr, relax.Var):
            readers[expr.name] += 1

    for block in function.body.blocks:
        for binding in block.bindings:
            relax.analysis.post_order_visit(binding.value, visit)
    relax.analysis.post_order_visit(function.body.body, visit)
    return readers


@relax.expr_functor.mutator
class _Folder(relax.PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.names = layer_names(module["main"])
        self.readers = count_readers(module["main"])

    def visit_call_(self, call: Any) -> Any:
        """Replace the arithmetic by the layer with new weights, where it is the only reader."""
        call = self.visit_expr_post_order(call)
        found = match_scale_shift(call)
        if found is None:
            return call
        folded = self._folded(found)
        return call if folded is None else folded

    def _folded(self, found: ScaleShift) -> Any:
        layer, expr = self._only_read_here(found.data)
        if expr is None:
            return None
        bias: Float64Array | None = None
        if operator_of(expr) == "add":
            inner = match_scale_shift(expr)
            if inner is None:
                return None
            bias = inner.shift
            layer, expr = self._only_read_here(inner.data)
        if expr is None or not _has_constant_weight(expr):
            return None
        if bias is None and found.scale is None:
            return None  # already a layer and its bias
        return self._emit(layer, expr, bias, found)

    def _only_read_here(self, variable: Any) -> tuple[Any, Any]:
        """The variable and call behind a name, if all on the way there have one reader."""
        while isinstance(variable, relax.Var) and self.readers[variable.name] == 1:
            value = self.lookup_binding(variable)
            if isinstance(value, relax.Call):
                return variable, value
            variable = value
        return None, None

    def _emit(self, layer: Any, call: Any, bias: Float64Array | None, found: ScaleShift) -> Any:
        scaled, total = _scaled(call, found.scale), _total_bias(bias, found)
        if scaled is None or not np.isfinite(total).all():
            return None
        variable = self.builder_.emit(scaled, layer.name)
        self.readers[variable.name] = 1
        if layer.name in self.names:
            self.names[variable.name] = self.names[layer.name]
        shape = [1, -1, *[1] * (len(shape_of(call)) - 2)]
        return relax.op.add(variable, relax.const(total.reshape(shape)))


def _total_bias(bias: Float64Array | None, found: ScaleShift) -> NDArray[np.float32]:
    """bias * scale + shift, [C]; infinite where float32 can't hold it."""
    channels = shape_of(found.data)[1]
    total = np.zeros(channels) if bias is None else bias
    if found.scale is not None:
        total = total * found.scale
    if found.shift is not None:
        total = total + found.shift
    with np.errstate(over="ignore"):
        return total.astype(np.float32)


def _has_constant_weight(call: Any) -> bool:
    operator = operator_of(call)
    if operator == "nn.conv2d" or (operator == "matmul" and len(shape_of(call)) == 2):
        return is_constant(call.args[1])
    return False


def _scaled(call: Any, scale: Float64Array | None) -> Any:
    """The layer with its output channels scaled; None where float32 can't hold the weights."""
    if scale is None:
        return call
    weight = array_of(call.args[1])
    # Convolution weights are [O, I, kh, kw], those of a matmul [K, M].
    factor = scale.reshape(-1, 1, 1, 1) if operator_of(call) == "nn.conv2d" else scale
    with np.errstate(over="ignore"):
        scaled = (weight.astype(np.float64) * factor).astype(weight.dtype)
    if not np.isfinite(scaled).all():
        return None
    return relax.Call(call.op, [call.args[0], relax.const(scaled)], call.attrs)
