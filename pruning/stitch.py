"""Put reconstructed layers together to a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx

from topiarist.pruning.calibration import Images
from topiarist.pruning.compensation import fit_linear
from topiarist.pruning.correction import correct_statistics
from topiarist.pruning.database import Database
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.level import DENSE, Level


def stitch(
    model: onnx.ModelProto,
    database: Database,
    choice: Mapping[str, Level],
    images: Images,
    *,
    refit: bool = True,
    progress: Callable[[float], None] = lambda share: None,
) -> onnx.ModelProto:
    """A copy of the model with each layer at its level and its statistics corrected.

    Layers that are not named stay dense. `refit` fits the weights once more, those of fully
    connected layers too, to the inputs that they have in the pruned network; it takes as long as
    calibration and keeps all zeros. Raises ValueError for a layer or level that the database
    doesn't have.
    """
    for name in choice:
        if name not in database.layers:
            raise ValueError(
                f"{name!r} is not in the database; it has {', '.join(database.layers)}"
            )
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    for layer in weighted_layers(model):
        level = choice.get(layer.name, DENSE)
        if level != DENSE:
            weight = database.weight(layer.name, level).astype(layer.weight.dtype)
            replace_weights(pruned, {layer.weight_name: layer.as_stored(weight)})
    if all(level == DENSE for level in choice.values()):
        return pruned
    corrected = correct_statistics(model, pruned, images, refit=refit, progress=progress)
    return fit_linear(model, corrected, images) if refit else corrected
