"""A model as the layers that a target has kernels for."""

from __future__ import annotations

from pathlib import Path

import onnx
import tvm

from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Graph
from topiarist.compiler.simplify import simplify
from topiarist.targets.spec import TargetSpec


def read_graph(
    model: Path | str | onnx.ModelProto, target: TargetSpec, *, batch: int | None = None
) -> Graph:
    """The layers of an ONNX model. Raises ModelError."""
    return layers_for(import_model(model, batch=batch), target)


def layers_for(module: tvm.IRModule, target: TargetSpec) -> Graph:
    """The layers of an imported module; GPUs have no kernels for dynamic convolutions."""
    return simplify(extract_layers(module, dynamic=target.gpu is None))
