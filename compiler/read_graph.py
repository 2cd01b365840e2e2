"""A model as the layers that a target has kernels for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import tvm

from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Conv, Graph
from topiarist.compiler.simplify import simplify
from topiarist.schedules.workload import HALF
from topiarist.targets.precision import Precision, require_precision
from topiarist.targets.spec import TargetSpec


def read_graph(
    model: Path | str | onnx.ModelProto,
    target: TargetSpec,
    *,
    batch: int | None = None,
    precision: Precision = "fp32",
) -> Graph:
    """The layers of an ONNX model. Raises ModelError, TargetError."""
    return layers_for(import_model(model, batch=batch), target, precision)


def layers_for(module: tvm.IRModule, target: TargetSpec, precision: Precision = "fp32") -> Graph:
    """The layers of an imported module; GPUs have no kernels for dynamic convolutions.

    Raises TargetError where the target does not multiply so.
    """
    require_precision(precision, target)
    graph = simplify(extract_layers(module, dynamic=target.gpu is None))
    return graph if precision == "fp32" else in_half(graph)


def in_half(graph: Graph) -> Graph:
    """The same with convolutions whose factors may be rounded to fp16."""
    nodes = (replace(n, dtype=HALF) if isinstance(n, Conv) else n for n in graph.nodes)
    return replace(graph, nodes=tuple(nodes))
