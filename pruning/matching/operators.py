"""ONNX operators and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
from scipy.special import expit

from topiarist.pruning.matching.call import Array, Call, Result, refused, unbroadcast
from topiarist.pruning.matching.convolution import conv
from topiarist.pruning.matching.pooling import (
    average_pool,
    global_average_pool,
    global_max_pool,
    max_pool,
    reduce_mean,
)


def batch_norm(
    call: Call, x: Array, scale: Array, shift: Array, mean: Array, variance: Array
) -> Result:
    """BatchNormalization with fixed statistics."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    axes = (0, *range(2, x.ndim))
    inverse = 1 / np.sqrt(variance + x.dtype.type(call.get("epsilon", 1e-5)))
    factor = scale * inverse
    y = x * factor.reshape(shape)
    y += (shift - mean * factor).reshape(shape)

    def pull(g: Array) -> Sequence[Array | None]:
        total = g.sum(axis=axes)
        dscale = ((g * x).sum(axis=axes) - mean * total) * inverse
        return g * factor.reshape(shape), dscale, total

    return y, pull


def conv_norm(
    call: Call,
    norm: Call,
    x: Array,
    w: Array,
    b: Array | None,
    scale: Array,
    shift: Array,
    mean: Array,
    variance: Array,
) -> Result:
    """A convolution whose weight and bias do what a batch norm behind it would do to values."""
    inverse = 1 / np.sqrt(variance + x.dtype.type(norm.get("epsilon", 1e-5)))
    factor = scale * inverse
    shape = (-1, *[1] * (w.ndim - 1))
    centre = -mean if b is None else b - mean
    y, pull_conv = conv(call, x, w * factor.reshape(shape), centre * factor + shift)

    def pull(g: Array) -> Sequence[Array | None]:
        dx, dw, db = pull_conv(g)
        assert dw is not None and db is not None
        dfactor = (dw * w).reshape(len(w), -1).sum(axis=1) + db * centre
        return dx, dw * factor.reshape(shape), db * factor, dfactor * inverse, db

    return y, pull


def gemm(call: Call, a: Array, b: Array, c: Array | None = None) -> Result:
    """alpha a b + beta c, each of a and b maybe transposed."""
    alpha, beta = (a.dtype.type(call.get(name, 1.0)) for name in ("alpha", "beta"))
    left = a.T if call.get("transA", 0) else a
    right = b.T if call.get("transB", 0) else b
    y = alpha * (left @ right)
    if c is not None:
        y += beta * c

    def pull(g: Array) -> Sequence[Array | None]:
        dleft, dright = alpha * (g @ right.T), alpha * (left.T @ g)
        return (
            dleft.T if call.get("transA", 0) else dleft,
            dright.T if call.get("transB", 0) else dright,
            None if c is None else unbroadcast(beta * g, c.shape),
        )

    return y, pull


def matmul(call: Call, a: Array, b: Array) -> Result:
    """MatMul of matrices, or of stacks of them."""
    if min(a.ndim, b.ndim) < 2:
        raise refused(call.node, "it multiplies a vector")

    def pull(g: Array) -> Sequence[Array | None]:
        da, db = g @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ g
        return unbroadcast(da, a.shape), unbroadcast(db, b.shape)

    return a @ b, pull


def add(call: Call, *terms: Array) -> Result:
    """Add, Sum."""
    shapes = [term.shape for term in terms]
    return reduce(np.add, terms), lambda g: [unbroadcast(g, shape) for shape in shapes]


def subtract(call: Call, a: Array, b: Array) -> Result:
    """Sub."""
    return a - b, lambda g: (unbroadcast(g, a.shape), unbroadcast(-g, b.shape))


def multiply(call: Call, a: Array, b: Array) -> Result:
    """Mul."""
    return a * b, lambda g: (
        unbroadcast(g * b, a.shape) if call.wanted(0) else None,
        unbroadcast(g * a, b.shape) if call.wanted(1) else None,
    )


def divide(call: Call, a: Array, b: Array) -> Result:
    """Div."""
    return a / b, lambda g: (
        unbroadcast(g / b, a.shape),
        unbroadcast(-g * a / (b * b), b.shape) if call.wanted(1) else None,
    )


def relu(call: Call, x: Array) -> Result:
    """Relu."""
    y = np.maximum(x, 0, out=x if call.overwrite else None)
    return y, lambda g: (g * (y > 0),)


def clip(call: Call, x: Array, low: Array | None = None, high: Array | None = None) -> Result:
    """Clip, with bounds that are inputs or attributes."""
    below = call.get("min", -np.inf) if low is None else low
    above = call.get("max", np.inf) if high is None else high
    below, above = x.dtype.type(below), x.dtype.type(above)
    y = np.clip(x, below, above, out=x if call.overwrite else None)
    return y, lambda g: (g * ((y > below) & (y < above)),)


def leaky_relu(call: Call, x: Array) -> Result:
    """LeakyRelu."""
    slope = np.where(x > 0, x.dtype.type(1), x.dtype.type(call.get("alpha", 0.01)))
    return x * slope, lambda g: (g * slope,)


def sigmoid(call: Call, x: Array) -> Result:
    """Sigmoid."""
    y = expit(x)
    return y, lambda g: (g * (y * (1 - y)),)


def tanh(call: Call, x: Array) -> Result:
    """Tanh."""
    y = np.tanh(x)
    return y, lambda g: (g * (1 - y * y),)


def hard_sigmoid(call: Call, x: Array) -> Result:
    """HardSigmoid: alpha x + beta, at least 0, at most 1."""
    alpha, beta = (x.dtype.type(call.get(*pair)) for pair in (("alpha", 0.2), ("beta", 0.5)))
    y = np.clip(alpha * x + beta, 0, 1)
    return y, lambda g: (g * alpha * ((y > 0) & (y < 1)),)


def hard_swish(call: Call, x: Array) -> Result:
    """HardSwish: x times its hard sigmoid x / 6 + 1 / 2."""
    gate = np.clip(x / 6 + x.dtype.type(0.5), 0, 1)
    return x * gate, lambda g: (g * (gate + x / 6 * ((gate > 0) & (gate < 1))),)


def concat(call: Call, *parts: Array) -> Result:
    """Concat."""
    axis = call.get("axis", 1)
    ends = np.cumsum([part.shape[axis] for part in parts])[:-1]
    return np.concatenate(parts, axis), lambda g: np.split(g, ends, axis)


def pad(
    call: Call,
    x: Array,
    amounts: Array | None = None,
    value: Array | None = None,
    axes: Array | None = None,
) -> Result:
    """Pad with a constant."""
    sides = call.ints("pads", (x, amounts), 1)
    mode = call.get("mode", b"constant")
    if mode != b"constant" or sides is None or min(sides, default=0) < 0:
        raise refused(call.node, "it does more than add constants around values")
    places = [a % x.ndim for a in axes.tolist()] if axes is not None else list(range(x.ndim))
    around = [(0, 0)] * x.ndim
    for place, before, behind in zip(places, sides, sides[len(places) :], strict=False):
        around[place] = before, behind
    fill = call.get("value", 0.0) if value is None else value.item()
    inner = tuple(slice(b, b + n) for (b, _), n in zip(around, x.shape, strict=True))
    return np.pad(x, around, constant_values=fill), lambda g: (g[inner],)


def slice_(call: Call, x: Array, *where: Array | None) -> Result:
    """Slice, with inputs or attributes."""
    given = [
        call.ints(name, (x, *where), number)
        for number, name in enumerate(("starts", "ends", "axes", "steps"), 1)
    ]
    starts, ends = given[0] or [], given[1] or []
    axes, steps = given[2] or range(len(starts)), given[3] or [1] * len(starts)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        stop = None if step < 0 and end < -x.shape[axis] else end
        index[axis] = slice(start, stop, step)
    place = tuple(index)

    def pull(g: Array) -> Sequence[Array | None]:
        dx = np.zeros_like(x)
        dx[place] = g
        return (dx,)

    return x[place], pull


def _reshaped(x: Array, shape: Sequence[int]) -> Result:
    return x.reshape(shape), lambda g: (g.reshape(x.shape),)


def reshape(call: Call, x: Array, shape: Array | None = None) -> Result:
    """Reshape."""
    wanted = call.ints("shape", (x, shape), 1) or []
    keep = not call.get("allowzero", 0)
    return _reshaped(x, [x.shape[i] if n == 0 and keep else n for i, n in enumerate(wanted)])


def flatten(call: Call, x: Array) -> Result:
    """Flatten to a matrix."""
    axis = call.get("axis", 1)
    rows = int(np.prod(x.shape[: axis + x.ndim if axis < 0 else axis]))
    return _reshaped(x, (rows, -1))


def squeeze(call: Call, x: Array, axes: Array | None = None) -> Result:
    """Squeeze."""
    found = call.ints("axes", (x, axes), 1)
    return _reshaped(x, np.squeeze(x, None if found is None else tuple(found)).shape)


def unsqueeze(call: Call, x: Array, axes: Array | None = None) -> Result:
    """Unsqueeze."""
    return _reshaped(x, np.expand_dims(x, tuple(call.ints("axes", (x, axes), 1) or ())).shape)


def transpose(call: Call, x: Array) -> Result:
    """Transpose."""
    order = call.get("perm", None) or range(x.ndim)[::-1]
    back = np.argsort(order)
    return x.transpose(order), lambda g: (g.transpose(back),)


def identity(call: Call, x: Array, *others: Array | None) -> Result:
    """Identity, and Dropout when nothing is dropped."""
    return x, lambda g: (g,)


OPERATORS: dict[str, Callable[..., Result]] = {
    "Add": add,
    "AveragePool": average_pool,
    "BatchNormalization": batch_norm,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "Div": divide,
    "Dropout": identity,
    "Flatten": flatten,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Identity": identity,
    "LeakyRelu": leaky_relu,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mul": multiply,
    "Pad": pad,
    "ReduceMean": reduce_mean,
    "Relu": relu,
    "Reshape": reshape,
    "Sigmoid": sigmoid,
    "Slice": slice_,
    "Squeeze": squeeze,
    "Sub": subtract,
    "Sum": add,
    "Tanh": tanh,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
