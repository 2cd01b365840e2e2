"""A trained module as an ONNX file."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from topiarist.pruning.layers import weighted_layers

_OPSET = 17


def write_onnx(model: nn.Module, image: Tensor, path: Path, *, fold: bool = True) -> None:
    """Write a network in inference mode; `image` is [N, C, H, W], and any batch will do.

    Input and output are called "input" and "output". Zeros of weights stay zeros. Without `fold`
    batch norms stay as they are, and weights keep their names in the module.
    """
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    training = model.training
    with warnings.catch_warnings():
        # The exporter that is new needs a package more, for graphs that are no simpler.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model.eval(),
            (image,),
            path,
            opset_version=_OPSET,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            training=mode,
            do_constant_folding=fold,
            dynamo=False,
        )
    model.train(training)


def modules_of(model: nn.Module, written: onnx.ModelProto) -> dict[str, nn.Module]:
    """The compiler's names of layers -> modules, of a network that was written without folding."""
    owners = {f"{name}.weight": module for name, module in model.named_modules()}
    layers = weighted_layers(written)
    return {v.name: owners[v.weight_name] for v in layers if v.weight_name in owners}
