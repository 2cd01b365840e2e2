"""From an ONNX file to a Relax module: `import_model` is the first stage of the compiler."""

from __future__ import annotations

from pathlib import Path

import onnx
import tvm
from tvm import relax

from topiarist.compiler import onnx_file
from topiarist.compiler.onnx_importer import import_graph
from topiarist.compiler.onnx_normalise import fixed_batch, normalise
from topiarist.compiler.passes.fold_batch_norm import FoldBatchNorm
from topiarist.compiler.passes.merge_padding import MergePadding


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file, external data included. Raises ModelError."""
    model = onnx_file.read_model(path)
    onnx_file.check_model(model)
    return model


def import_model(model: str | Path | onnx.ModelProto, *, batch: int | None = None) -> tvm.IRModule:
    """The model as a Relax function `main` with static shapes and its weights as constants.

    A dynamic batch becomes `batch`, or 1; a `batch` given also replaces a fixed one. Batch norms
    are folded into the convolutions before them. Raises ModelError.
    """
    if isinstance(model, onnx.ModelProto):
        onnx_file.check_model(model)
    else:
        model = load_onnx(model)
    old_batch = fixed_batch(model.graph)
    changed = old_batch if batch is not None and old_batch not in (0, batch) else None
    module = import_graph(normalise(model, batch), changed)
    return PIPELINE(module)


PIPELINE = tvm.transform.Sequential(
    [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.FoldConstant(),
        MergePadding(),
        FoldBatchNorm(),
        relax.transform.DeadCodeElimination(),
    ],
    name="topiarist_import",
)
