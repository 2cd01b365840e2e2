"""Plain questions about Relax expressions."""

from __future__ import annotations

from typing import Any

import tvm
from numpy.typing import NDArray


def operator_of(expr: Any) -> str:
    """The operator's name without `relax.`, such as "nn.conv2d"; "" where there is none."""
    if isinstance(expr, tvm.ir.Call) and isinstance(expr.op, tvm.ir.Op):
        return str(expr.op.name).removeprefix("relax.")
    return ""


def shape_of(expr: Any) -> tuple[int, ...]:
    """The static shape of a tensor expression."""
    return tuple(int(size) for size in expr.ty.shape.values)


def dtype_of(expr: Any) -> str:
    """The element type of a tensor expression."""
    dtype = expr.ty.dtype
    return str(dtype.dtype if hasattr(dtype, "dtype") else dtype)


def is_constant(expr: Any) -> bool:
    """Whether the expression is a tensor constant."""
    return isinstance(expr, tvm.ir.GenericConst)


def array_of(expr: Any) -> NDArray[Any]:
    """The value of a tensor constant."""
    array: NDArray[Any] = expr.value.numpy()
    return array
