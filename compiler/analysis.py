"""Per layer of an ONNX file: shapes, FLOPs, and how and where its weights are zero."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx.shape_inference import infer_shapes

from topiarist.pruning.layers import WeightedLayer, attribute, weighted_layers
from topiarist.pruning.patterns import find_pattern

_SMALL = 1024  # values: a shape or an index, which shape inference may need


@dataclass(frozen=True)
class LayerReport:
    """One Conv, Gemm or MatMul with constant weights.

    `weight_shape` is [O, C / groups, kh, kw], or [M, K] where fully connected. `output_shape`
    has batch 1 where the file leaves it open; it is () and both FLOPs are 0 where the file
    doesn't fix the size. FLOPs count 2 per multiply-add. `note` is "" or a remark.
    """

    layer: str
    kind: str
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int
    density: float
    pattern: str
    dead_filters: int
    dead_channels: int
    flops_dense: int
    flops_nonzero: int
    note: str

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def analyse(model: onnx.ModelProto) -> list[LayerReport]:
    """A report per layer with constant weights, in file order."""
    shapes = _value_shapes(model)
    first_user: dict[str, str] = {}
    reports = []
    for layer in weighted_layers(model):
        owner = first_user.setdefault(layer.weight_name, layer.name)
        shared = f"shares its weight with {owner}" if owner != layer.name else ""
        reports.append(_report(layer, shapes.get(layer.node.output[0], ()), shared))
    return reports


def _report(layer: WeightedLayer, output_shape: tuple[int, ...], shared: str) -> LayerReport:
    """Count one layer."""
    found = find_pattern(layer.weight, layer.groups)
    uses = _uses_per_weight(layer, output_shape)
    notes = [
        shared,
        "depthwise" if layer.groups > 1 and layer.weight.shape[1] == 1 else "",
        "" if output_shape else "the file doesn't fix the output size: FLOPs not counted",
        "" if np.isfinite(layer.weight).all() else "has NaN or infinite weights",
    ]
    is_conv = layer.kind == "Conv"
    rank = len(layer.stored_shape) - 2
    return LayerReport(
        layer=layer.name,
        kind=layer.kind,
        weight_shape=layer.stored_shape if is_conv else layer.weight.shape[:2],
        output_shape=output_shape,
        strides=tuple(attribute(layer.node, "strides", (1,) * rank)) if is_conv else (),
        groups=layer.groups,
        density=found.density,
        pattern=str(found),
        dead_filters=found.dead_filters,
        dead_channels=found.dead_channels,
        flops_dense=2 * layer.weight.size * uses,
        flops_nonzero=2 * found.nnz * uses,
        note="; ".join(note for note in notes if note),
    )


def _uses_per_weight(layer: WeightedLayer, output_shape: tuple[int, ...]) -> int:
    """How often each weight is multiplied: output elements per output channel."""
    if not output_shape:
        return 0
    return prod(output_shape) // len(layer.weight)


def _value_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all values that the file fixes, with batch 1 where it is open."""
    fixed = _without_weights(model)
    for value in fixed.graph.input:
        _fix_batch(value)
    graph = infer_shapes(fixed, data_prop=True).graph
    shapes = {}
    for value in (*graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and all(d.dim_value > 0 for d in dims):
            shapes[value.name] = tuple(d.dim_value for d in dims)
    return shapes


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large initializers have a shape but no values: shape inference copies all."""
    copy = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    copy.functions.extend(model.functions)
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(copy.graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= _SMALL:
            copy.graph.initializer.append(tensor)
        else:
            copy.graph.initializer.add(
                name=tensor.name, dims=tensor.dims, data_type=tensor.data_type
            )
    return copy


def _fix_batch(value: Any) -> None:
    """An open first dimension becomes 1."""
    dims = value.type.tensor_type.shape.dim
    if dims and dims[0].dim_value <= 0:
        dims[0].dim_value = 1
