"""What the dense network says of images: at its end, and behind its nonlinearities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from topiarist.errors import CalibrationError
from topiarist.pruning.calibration import Arrays, Images, batch_size
from topiarist.pruning.forward import chunks, open_session, run_chunks, run_session, with_outputs
from topiarist.pruning.matching.call import Array

VARIANCE_IMAGES = 64
_LEAST = 1e-12
_NONLINEAR = {"Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "PRelu", "Relu", "Sigmoid"}


class Teacher:
    """A network that others are to be like, in the values called `names`.

    Each name has a share of the loss; `weights` are the shares over the variance between a few
    images. Raises CalibrationError where the values are no numbers.
    """

    def __init__(self, dense: onnx.ModelProto, shares: Mapping[str, float], images: Images) -> None:
        self.names = tuple(shares)
        few = chunks(dense, images.first(max(VARIANCE_IMAGES, batch_size(dense) or 0)))
        self._session = open_session(with_outputs(dense, self.names), threads=1)
        said = zip(*map(self.says, few), strict=True)
        with np.errstate(all="ignore"):
            variances = [float(np.var(np.concatenate(parts), axis=0).mean()) for parts in said]
        if not np.isfinite(variances).all():
            raise CalibrationError(
                "the network's outputs overflow or are NaN for these images; are they scaled as "
                "the network expects?"
            )
        self.weights = [
            share / max(variance, _LEAST)
            for share, variance in zip(shares.values(), variances, strict=True)
        ]

    def says(self, inputs: Arrays) -> list[Array]:
        """The values [N, ...] in the order of the names; several threads may ask at once."""
        found = run_session(self._session, inputs, self.names)
        return [found[name].astype(np.float32, copy=False) for name in self.names]


def scores(model: onnx.ModelProto) -> list[str]:
    """The outputs, each before its softmax if it has one."""
    last = {node.output[0]: node for node in model.graph.node if "Softmax" in node.op_type}
    names = [value.name for value in model.graph.output]
    return [last[name].input[0] if name in last else name for name in names]


def common_activations(
    dense: onnx.ModelProto, pruned: onnx.ModelProto, images: Images
) -> list[str]:
    """The values behind nonlinearities that both networks have, in the same shape."""
    own = {node.output[0] for node in pruned.graph.node}
    names = [n.output[0] for n in dense.graph.node if n.op_type in _NONLINEAR]
    names = [name for name in names if name in own]
    if not names:
        return []
    inputs = chunks(dense, images.first(batch_size(dense) or 1))
    one, other = (next(run_chunks(model, inputs, names)) for model in (dense, pruned))
    return [name for name in names if one[name].shape == other[name].shape]
