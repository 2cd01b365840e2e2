"""How far the outputs of a changed network are from those of the network as it was."""

from __future__ import annotations

import math

import numpy as np
import onnx

from topiarist.pruning.calibration import Arrays, Images
from topiarist.pruning.forward import VALUES_AT_ONCE, chunks, run_chunks

MOST_IMAGES = 64
FEWEST_IMAGES = 8  # of a network with large inputs
_LEAST = 1e-12


class OutputError:
    """The error of changed networks, relative to the variance between a few images.

    Of several outputs the mean. The last images are taken: layers are fitted to the first ones. A
    network with a fixed batch size needs images for one batch.
    """

    def __init__(
        self, model: onnx.ModelProto, images: Images, most_images: int = MOST_IMAGES
    ) -> None:
        values = sum(math.prod(array.shape[1:]) for array in images.arrays.values())
        count = VALUES_AT_ONCE // max(values, 1)
        count = min(most_images, max(FEWEST_IMAGES, count))
        self._names = [value.name for value in model.graph.output]
        self._portions = chunks(model, images.after(max(0, len(images) - count)))
        self._expected = self._outputs(model)

    def of(self, changed: onnx.ModelProto) -> float:
        """The squared difference over the squared deviation from the mean image."""
        found = self._outputs(changed)
        shares = []
        for name, array in self._expected.items():
            whole = array.astype(np.float64)
            variance = float(np.square(whole - whole.mean(axis=0)).sum())
            shares.append(float(np.square(found[name] - whole).sum()) / max(variance, _LEAST))
        return float(np.mean(shares))

    def _outputs(self, model: onnx.ModelProto) -> Arrays:
        parts = list(run_chunks(model, self._portions, self._names))
        return {name: np.concatenate([part[name] for part in parts]) for name in self._names}
