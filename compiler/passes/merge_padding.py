"""Merge a zero padding of the image plane into the convolution that reads it.

p = nn.pad(x, [0, 0, 0, 0, t, b, l, r], 0)    ->    conv2d(x, W, padding + (t, l, b, r))
y = conv2d(p, W, padding)
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from topiarist.compiler.relax_calls import operator_of


@tvm.transform.module_pass(opt_level=0, name="MergePadding")
class MergePadding:
    """See the module's docstring. The padding itself is left to dead code elimination."""

    def transform_module(self, module: tvm.IRModule, _: Any) -> tvm.IRModule:
        """The module with its function `main` rewritten."""
        merged = module.clone()
        merged["main"] = _Merger(module).visit_expr(module["main"])
        return merged


@relax.expr_functor.mutator
class _Merger(relax.PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Any) -> Any:
        """Read the tensor before the padding instead."""
        call = self.visit_expr_post_order(call)
        if operator_of(call) != "nn.conv2d" or not isinstance(call.args[0], relax.Var):
            return call
        pad = self.lookup_binding(call.args[0])
        if operator_of(pad) != "nn.pad":
            return call
        widths = [int(w) for w in pad.attrs.pad_width]
        zero = pad.attrs.pad_mode == "constant" and float(pad.attrs.pad_value) == 0.0
        if not zero or any(widths[:4]):
            return call
        top, bottom, left, right = widths[4:]
        own = [int(p) for p in call.attrs.padding]
        padding = [p + q for p, q in zip(own, (top, left, bottom, right), strict=True)]
        return _with_padding(call, pad.args[0], padding)


def _with_padding(call: Any, data: Any, padding: list[int]) -> Any:
    attrs = call.attrs
    return relax.op.nn.conv2d(
        data,
        call.args[1],
        strides=list(attrs.strides),
        padding=padding,
        dilation=list(attrs.dilation),
        groups=int(attrs.groups),
        data_layout=attrs.data_layout,
        kernel_layout=attrs.kernel_layout,
    )
