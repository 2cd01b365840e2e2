"""ONNX operators whose Relax form we write ourselves, in place of the importer's own.

Either the importer gets them wrong (Pad-2, even-sized LRN, SAME_LOWER and ceil_mode pooling) or it
writes them in a form that hides the layer (Clip as TIR, Sum as stack and reduce, Split as tuple).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from topiarist.compiler.relax_calls import array_of, dtype_of, is_constant, shape_of
from topiarist.errors import ModelError

Array = NDArray[Any]


@dataclass(frozen=True)
class OnnxCall:
    """One ONNX node on its way to Relax; an absent optional input is None."""

    emit: Callable[[Any], Any]  # bind an intermediate expression, as part of this layer
    name: str
    operator: str
    inputs: tuple[Any, ...]
    attributes: dict[str, Any]
    outputs: int
    uses_further_outputs: bool  # whether an output after the first one is read
    opset: int
    batch_changed_from: int | None = None

    def input(self, index: int) -> Any:
        """The expression of an input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def constant(self, index: int) -> Array | None:
        """The value of a constant input, or None when it is absent."""
        expr = self.input(index)
        if expr is None:
            return None
        if not is_constant(expr):
            raise self.refused(f"its input {index} is computed at run time; it must be a constant")
        return array_of(expr)

    def ints(self, key: str, default: Sequence[int]) -> list[int]:
        """An attribute that is a list of integers."""
        return [int(i) for i in self.attributes.get(key, default)]

    def text(self, key: str, default: str) -> str:
        """An attribute that is a string."""
        value = self.attributes.get(key, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def refused(self, reason: str, remedy: str = "") -> ModelError:
        """The error for a node that can't be compiled."""
        remedy = remedy or "Export the model without it, or cut the model before it"
        return ModelError(
            f"{self.operator} node {self.name!r} can't be compiled: {reason}. {remedy}."
        )


def _same_padding(
    call: OnnxCall, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """auto_pad SAME: [begin..., end...] such that output = ceil(input / stride)."""
    begin, end = [], []
    for size, k, s, d in zip(shape_of(call.inputs[0])[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        small, large = total // 2, total - total // 2
        upper = call.text("auto_pad", "NOTSET") == "SAME_UPPER"
        begin.append(small if upper else large)
        end.append(large if upper else small)
    return begin + end


def _padding(
    call: OnnxCall, kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    mode = call.text("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return _same_padding(call, kernel, strides, dilations)
    if mode not in ("NOTSET", "VALID", ""):
        raise call.refused(f"auto_pad {mode!r} is unknown")
    pads = [0] * (2 * len(kernel)) if mode == "VALID" else call.ints("pads", [0] * 2 * len(kernel))
    if min(pads) < 0:
        raise call.refused(f"its padding {pads} is negative")
    return pads


def _window(call: OnnxCall, kernel: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Strides, dilations and pads of a convolution or pooling."""
    ones = [1] * len(kernel)
    strides, dilations = call.ints("strides", ones), call.ints("dilations", ones)
    return strides, dilations, _padding(call, kernel, strides, dilations)


_CONV_LAYOUTS = {1: ("NCW", "OIW"), 2: ("NCHW", "OIHW"), 3: ("NCDHW", "OIDHW")}


def convert_conv(call: OnnxCall) -> Any:
    """Conv(x, w, b) -> add(conv(x, w), b[1, O, 1, 1]), with every padding explicit."""
    data, weight = call.inputs[:2]
    kernel = list(shape_of(weight)[2:])
    if dtype_of(data) != "float32":
        raise call.refused(
            f"it computes in {dtype_of(data)}", "Convert the model to float32 before compiling it"
        )
    if len(kernel) not in _CONV_LAYOUTS:
        raise call.refused(f"it has {len(kernel)} spatial dimensions")
    strides, dilations, pads = _window(call, kernel)
    data_layout, kernel_layout = _CONV_LAYOUTS[len(kernel)]
    conv = getattr(relax.op.nn, f"conv{len(kernel)}d")(
        data,
        weight,
        strides=strides,
        padding=pads,
        dilation=dilations,
        groups=int(call.attributes.get("group", 1)),
        data_layout=data_layout,
        kernel_layout=kernel_layout,
    )
    bias = call.input(2)
    if bias is None:
        return conv
    conv = call.emit(conv)
    per_channel = [1, -1, *[1] * len(kernel)]
    if is_constant(bias):
        return relax.op.add(conv, relax.const(array_of(bias).reshape(per_channel)))
    return relax.op.add(conv, relax.op.reshape(bias, per_channel))


def _ceil_extra(size: int, kernel: int, stride: int, dilation: int, begin: int, end: int) -> int:
    """How much more end padding makes floor mode give what ceil_mode gives.

    As in ONNX Runtime, a window that would begin in the end padding is dropped.
    """
    window = (kernel - 1) * dilation + 1
    outputs = -(-(size + begin + end - window) // stride) + 1
    if (outputs - 1) * stride >= size + begin:
        outputs -= 1
    return max((outputs - 1) * stride + window - (size + begin + end), 0)


def convert_pool(call: OnnxCall) -> Any:
    """MaxPool, AveragePool -> pooling in floor mode with explicit padding."""
    if call.uses_further_outputs:
        raise call.refused("its second output (Indices) is used")
    data, kernel = call.inputs[0], call.ints("kernel_shape", [])
    rank = len(kernel)
    strides, dilations, pads = _window(call, kernel)
    kind = "max" if call.operator == "MaxPool" else "avg"
    count_pads = bool(call.attributes.get("count_include_pad", 0)) and kind == "avg"
    extra = [0] * rank
    if call.attributes.get("ceil_mode", 0):
        sizes = shape_of(data)[2:]
        extra = [
            _ceil_extra(sizes[i], kernel[i], strides[i], dilations[i], pads[i], pads[rank + i])
            for i in range(rank)
        ]
    if count_pads and any(extra):
        # The pads of the model count, those of ceil_mode do not: make the former data.
        data = call.emit(_zero_pad(data, pads))
        pads, count_pads = [0] * (2 * rank), False
    pads = pads[:rank] + [pads[rank + i] + extra[i] for i in range(rank)]
    pool = getattr(relax.op.nn, f"{kind}_pool{rank}d")
    return pool(data, kernel, strides, pads, dilations, False, count_pads)


def _zero_pad(data: Any, pads: list[int]) -> Any:
    rank = len(pads) // 2
    widths = [0, 0, 0, 0]
    for axis in range(rank):
        widths += [pads[axis], pads[rank + axis]]
    return relax.op.nn.pad(data, widths)


def convert_clip(call: OnnxCall) -> Any:
    """Clip(x, low, high) -> maximum, minimum or clip with scalar constants."""
    if call.opset < 11:
        low, high = call.attributes.get("min"), call.attributes.get("max")
    else:
        low, high = (None if (c := call.constant(i)) is None else c.item() for i in (1, 2))
    low = None if low is None or math.isnan(low) or low == -math.inf else float(low)
    high = None if high is None or math.isnan(high) or high == math.inf else float(high)
    data = call.inputs[0]
    if low is not None and high is not None:
        return relax.op.clip(data, low, high)
    dtype = dtype_of(data)
    if low is not None:
        return relax.op.maximum(data, relax.const(low, dtype))
    if high is not None:
        return relax.op.minimum(data, relax.const(high, dtype))
    return data


_PAD_MODES = {
    "constant": "constant",
    "edge": "replicate",
    "reflect": "reflect",
    "wrap": "circular",
}


def convert_pad(call: OnnxCall) -> Any:
    """Pad -> nn.pad; negative pads crop first."""
    data = call.inputs[0]
    rank = len(shape_of(data))
    if call.opset < 11:
        pads, value = call.ints("pads", []), float(call.attributes.get("value", 0.0))
        axes = list(range(rank))
    else:
        given, fill, chosen = call.constant(1), call.constant(2), call.constant(3)
        pads = [] if given is None else [int(i) for i in given]
        value = 0.0 if fill is None else float(fill.item())
        axes = list(range(rank)) if chosen is None else [int(i) % rank for i in chosen]
    begin, end = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        begin[axis], end[axis] = pads[i], pads[len(axes) + i]
    data = _crop(call, data, begin, end)
    widths = [max(w, 0) for pair in zip(begin, end, strict=True) for w in pair]
    if not any(widths):
        return data
    mode = call.text("mode", "constant")
    if mode not in _PAD_MODES:
        raise call.refused(f"its mode {mode!r} is unknown")
    return relax.op.nn.pad(data, widths, _PAD_MODES[mode], value)


def _crop(call: OnnxCall, data: Any, begin: list[int], end: list[int]) -> Any:
    if min(begin + end) >= 0:
        return data
    shape = shape_of(data)
    starts = [max(-b, 0) for b in begin]
    stops = [size - max(-e, 0) for size, e in zip(shape, end, strict=True)]
    sliced = relax.op.strided_slice(data, list(range(len(shape))), starts, stops)
    return call.emit(sliced)


_CHAINED = {"Sum": relax.op.add, "Max": relax.op.maximum, "Min": relax.op.minimum}


def convert_chain(call: OnnxCall) -> Any:
    """Sum(a, b, c) -> add(add(a, b), c); Max and Min in the same way."""
    result = call.inputs[0]
    for index, other in enumerate(call.inputs[1:], 2):
        result = _CHAINED[call.operator](result, other)
        if index < len(call.inputs):
            result = call.emit(result)
    return result


def convert_batch_norm(call: OnnxCall) -> Any:
    """BatchNormalization(x) -> add(multiply(x, scale), shift), computed in float64."""
    if call.attributes.get("training_mode", 0) or call.uses_further_outputs:
        raise call.refused("it is in training mode", "Export the model with model.eval()")
    if not call.attributes.get("spatial", 1):
        raise call.refused("spatial=0 (statistics per pixel) is not supported")
    parameters = [np.asarray(call.constant(i), np.float64) for i in (1, 2, 3, 4)]
    gamma, beta, mean, variance = parameters
    data = call.inputs[0]
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + float(call.attributes.get("epsilon", 1e-5)))
    if not np.isfinite(scale).all():
        raise call.refused("its variance plus epsilon is not positive in every channel")
    shape = [1, -1, *[1] * (len(shape_of(data)) - 2)]
    dtype = dtype_of(data)
    factor = relax.const(scale.astype(dtype).reshape(shape))
    shift = relax.const((beta - mean * scale).astype(dtype).reshape(shape))
    return relax.op.add(call.emit(relax.op.multiply(data, factor)), shift)


def convert_gemm(call: OnnxCall) -> Any:
    """Gemm -> add(matmul(a, b), c), with transB, alpha and beta folded into constants."""
    alpha, beta = (float(call.attributes.get(k, 1.0)) for k in ("alpha", "beta"))
    a, b, c = call.input(0), call.input(1), call.input(2)
    if call.attributes.get("transA", 0):
        a = call.emit(relax.op.permute_dims(a, [1, 0]))
    if call.attributes.get("transB", 0):
        b = _transposed(call, b)
    product = relax.op.matmul(a, _scaled(call, b, alpha))
    if c is None or beta == 0.0:
        return product
    return relax.op.add(call.emit(product), _scaled(call, c, beta))


def _transposed(call: OnnxCall, matrix: Any) -> Any:
    if is_constant(matrix):
        return relax.const(np.ascontiguousarray(array_of(matrix).T))
    return call.emit(relax.op.permute_dims(matrix, [1, 0]))


def _scaled(call: OnnxCall, matrix: Any, factor: float) -> Any:
    if factor == 1.0:
        return matrix
    if is_constant(matrix):
        value = array_of(matrix)
        return relax.const((value * np.float64(factor)).astype(value.dtype))
    scaled = relax.op.multiply(matrix, relax.const(factor, dtype_of(matrix)))
    return call.emit(scaled)


def convert_reshape(call: OnnxCall) -> Any:
    """Reshape -> reshape; a batch written into the target shape follows the chosen batch."""
    data, target = call.inputs[0], call.constant(1)
    shape = shape_of(data)
    wanted = [int(i) for i in target] if target is not None else call.ints("shape", [])
    if not call.attributes.get("allowzero", 0):
        wanted = [shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    if call.batch_changed_from is not None and wanted and wanted[0] == call.batch_changed_from:
        wanted[0] = shape[0]
    count, rest = math.prod(shape), math.prod(i for i in wanted if i != -1)
    if count % max(rest, 1) if -1 in wanted else count != rest:
        raise call.refused(
            f"{shape} has {count} elements and can't become {wanted}",
            "If the model fixes its batch, compile it for that batch",
        )
    return relax.op.reshape(data, wanted)


def convert_split(call: OnnxCall) -> Any:
    """Split -> one strided_slice for each output."""
    data = call.inputs[0]
    shape = shape_of(data)
    axis = int(call.attributes.get("axis", 0)) % len(shape)
    given = call.constant(1) if call.opset >= 13 else call.attributes.get("split")
    if given is not None:
        sizes = [int(i) for i in given]
    else:
        each = -(-shape[axis] // call.outputs)
        sizes = [min(each, shape[axis] - i * each) for i in range(call.outputs)]
    ends = np.cumsum(sizes).tolist()
    pieces = [
        call.emit(relax.op.strided_slice(data, [axis], [end - size], [end]))
        for size, end in zip(sizes, ends, strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else relax.Tuple(pieces)


def convert_dropout(call: OnnxCall) -> Any:
    """Dropout(x), Identity(x) -> x."""
    if call.uses_further_outputs:
        raise call.refused("its mask output is used", "Export the model with model.eval()")
    return call.inputs[0]


def convert_lrn(call: OnnxCall) -> Any:
    """LRN -> x / (bias + alpha / size * (sum of squares over a window of channels)) ** beta."""
    data, size = call.inputs[0], int(call.attributes["size"])
    emit, shape = call.emit, shape_of(data)
    if len(shape) != 4:
        raise call.refused(f"its input has shape {list(shape)}, not [N, C, H, W]")
    # The channels become the depth of one image, for there is no pooling over channels.
    squares = emit(relax.op.reshape(emit(relax.op.multiply(data, data)), [shape[0], 1, *shape[1:]]))
    before, after = (size - 1) // 2, size // 2
    pads = [before, 0, 0, after, 0, 0]
    pooled = relax.op.nn.avg_pool3d(squares, (size, 1, 1), (1, 1, 1), pads, count_include_pad=True)
    mean = emit(relax.op.reshape(emit(pooled), shape))
    alpha, beta, bias = (
        relax.const(float(call.attributes.get(key, default)), "float32")
        for key, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    base = emit(relax.op.add(emit(relax.op.multiply(mean, alpha)), bias))
    return relax.op.divide(data, emit(relax.op.power(base, beta)))


def convert_top_k(call: OnnxCall) -> Any:
    """TopK -> one topk for the values and one for the indices; unused ones die as dead code."""
    count = call.constant(1)
    if count is None or not call.attributes.get("sorted", 1):
        raise call.refused("its result is not sorted")
    axis = int(call.attributes.get("axis", -1))
    largest = bool(call.attributes.get("largest", 1))
    parts = [
        call.emit(relax.op.topk(call.inputs[0], int(count.item()), axis, kind, largest, "int64"))
        for kind in ("values", "indices")
    ]
    return relax.Tuple(parts)


def convert_tile(call: OnnxCall) -> Any:
    """Tile with constant repeats -> tile."""
    repeats = call.constant(1)
    return relax.op.tile(call.inputs[0], [int(i) for i in repeats] if repeats is not None else [])


def convert_einsum(call: OnnxCall) -> Any:
    """Einsum -> einsum."""
    return relax.op.einsum(tuple(call.inputs), call.text("equation", ""))


CONVERTERS: dict[str, Callable[[OnnxCall], Any]] = {
    "AveragePool": convert_pool,
    "BatchNormalization": convert_batch_norm,
    "Clip": convert_clip,
    "Conv": convert_conv,
    "Dropout": convert_dropout,
    "Einsum": convert_einsum,
    "Gemm": convert_gemm,
    "Identity": convert_dropout,
    "LRN": convert_lrn,
    "Max": convert_chain,
    "MaxPool": convert_pool,
    "Min": convert_chain,
    "Pad": convert_pad,
    "Reshape": convert_reshape,
    "Split": convert_split,
    "Sum": convert_chain,
    "Tile": convert_tile,
    "TopK": convert_top_k,
}
