"""How often a pruned network is right, and how often it says what the dense one says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.pruning.calibration import Images
from topiarist.pruning.forward import chunks, open_session, run_session

Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Accuracy:
    """Shares of images, 0 to 1: right (None without labels), and as the dense network says."""

    images: int
    top_1: float | None
    agreement: float

    @staticmethod
    def of(classes: Classes, dense: Classes, labels: Classes | None) -> Accuracy:
        """Of the classes that two networks give the same images."""
        right = None if labels is None else float((classes == labels[: len(classes)]).mean())
        return Accuracy(len(classes), right, float((classes == dense).mean()))

    @property
    def share(self) -> float:
        """Top-1 accuracy, or agreement where there are no labels."""
        return self.agreement if self.top_1 is None else self.top_1


def predicted_classes(model: onnx.ModelProto, images: Images) -> Classes:
    """The class [N] with the largest score in the first output, for each image.

    A fixed batch size leaves out what is left over. Raises ModelError, CalibrationError.
    """
    session = open_session(model)
    name = model.graph.output[0].name
    found = [
        run_session(session, portion, [name])[name].reshape(len(next(iter(portion.values()))), -1)
        for portion in chunks(model, images)
    ]
    classes: Classes = np.concatenate(found).argmax(axis=1).astype(np.int64)
    return classes
