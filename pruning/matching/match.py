"""Bring a pruned network's values near to the dense network's, for calibration images.

Reconstruction takes one layer at a time; what then is left is an error of all layers together,
which only a descent on the network's own outputs sees. The dense network is the teacher, as in
knowledge distillation (Hinton et al., 2015), at its outputs and at the activations inside (FitNets,
Romero et al., ICLR 2015), so images need no labels; the zeros are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray

from topiarist.pruning.calibration import FEWEST, Images, batch_size, check_images
from topiarist.pruning.cores import one_blas_thread
from topiarist.pruning.forward import with_outputs
from topiarist.pruning.layers import constant_arrays, replace_weights
from topiarist.pruning.matching.batches import Batches
from topiarist.pruning.matching.call import Array
from topiarist.pruning.matching.descent import Descent, cosine
from topiarist.pruning.matching.network import Network
from topiarist.pruning.matching.teacher import Teacher, common_activations, scores
from topiarist.pruning.output_error import OutputError
from topiarist.targets.linux import available_cores

HELD_BACK = 1 / 8  # of the images, to see whether it helps
MOST_HELD_BACK = 256
MOST_AT_ONCE = 16
VALUES_AT_ONCE = 24 << 20  # inside the network, for each core


@dataclass(frozen=True)
class Recipe:
    """How values are matched: steps of so many images, at a rate that falls to zero by a cosine.

    The rate is how far a step moves a weight, as a share of the size of its tensor's. `inside` is
    what all activations together count beside the outputs. `mirror` lets half of the images be
    mirrored, `shift` moves them by up to that share of their size. With `seconds` it ends then at
    the latest; without, results are the same every time on the same machine.
    """

    steps: int = 1024
    batch: int = 32
    rate: float = 1e-2
    inside: float = 3.0
    mirror: bool = True
    shift: float = 1 / 8
    seconds: float | None = None
    seed: int = 0


DEFAULT = Recipe()


def match_outputs(
    dense: onnx.ModelProto,
    pruned: onnx.ModelProto,
    images: Images,
    recipe: Recipe = DEFAULT,
    *,
    progress: Callable[[float], None] = lambda share: None,
    clock: Callable[[], float] = time.perf_counter,
) -> onnx.ModelProto:
    """A copy of `pruned` with other values in the weights that are not zero, biases, batch norms.

    The networks have the same inputs and outputs. The loss is the squared difference of outputs,
    before a last softmax, and of the activations that both networks have, over their variance.
    Some images are held back: where outputs for those don't come nearer, or there are too few of
    them, the copy is as `pruned` is. Raises TrainingError, which names it, for an operator that
    has no gradient here, CalibrationError for images that the networks can't read.
    """
    check_images(dense, images.arrays)
    whole = batch_size(dense) or 1
    outputs = dict(zip(scores(dense), scores(pruned), strict=True))  # by the dense one's names
    names, own_names = list(outputs), list(outputs.values())
    copy = onnx.ModelProto()
    copy.CopyFrom(pruned)
    back = max(FEWEST, whole, min(MOST_HELD_BACK, int(HELD_BACK * len(images))))
    if len(images) - back < max(FEWEST, whole):
        return copy
    training, held = images.first(len(images) - back), images.after(len(images) - back)
    inner = common_activations(dense, pruned, training) if recipe.inside else []
    inner = [name for name in inner if name not in {*names, *own_names}]
    networks = [Network(pruned, [*own_names, *inner]) for _ in range(available_cores())]
    if not networks[0].parameters:
        return copy
    error = OutputError(with_outputs(dense, names), held, back)
    before = error.of(with_outputs(pruned, own_names))
    shares = dict.fromkeys(inner, recipe.inside / max(len(inner), 1))
    teacher = Teacher(dense, dict.fromkeys(names, 1 / len(names)) | shares, training)
    descent = Descent(networks, teacher)
    batches = Batches(
        images=training,
        size=max(whole, min(recipe.batch, len(training)) // whole * whole),
        at_once=_at_once(networks[0], batch_size(dense), training),
        mirror=recipe.mirror,
        shift=recipe.shift,
        seed=recipe.seed,
    )
    _descend(descent, batches, recipe, progress, clock)
    replace_weights(copy, _as_stored(pruned, descent.parameters))
    if error.of(with_outputs(copy, own_names)) < before:
        return copy
    copy.CopyFrom(pruned)
    return copy


def _at_once(network: Network, fixed: int | None, images: Images) -> int:
    """How many images go through the network at once, on each core."""
    if fixed is not None:
        return fixed
    network.run(images.first(1).arrays, network.parameters)
    return max(1, min(MOST_AT_ONCE, VALUES_AT_ONCE // network.values_held))


def _descend(
    descent: Descent,
    batches: Batches,
    recipe: Recipe,
    progress: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """As many steps as the recipe says, or as fit into its seconds."""
    start, limit = clock(), recipe.seconds or math.inf
    with one_blas_thread():
        for done, portions in enumerate(batches):
            share = max(done / recipe.steps, (clock() - start) / limit)
            progress(min(share, 1.0))
            if share >= 1:
                return
            loss = descent.step(portions, recipe.rate * cosine(share))
            if not math.isfinite(loss):
                return  # the outputs for other images will tell


def _as_stored(model: onnx.ModelProto, parameters: dict[str, Array]) -> dict[str, NDArray[Any]]:
    """In the dtypes of the file; zeros stay."""
    stored = constant_arrays(model)
    return {name: array.astype(stored[name].dtype) for name, array in parameters.items()}
