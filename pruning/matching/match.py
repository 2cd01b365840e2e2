"""Bring a pruned network's outputs near to the dense network's, for calibration images.

Reconstruction takes one layer at a time; what then is left is an error of all layers together,
which only a descent on the network's own outputs sees. The dense network is the teacher, as in
knowledge distillation (Hinton et al., 2015), so images need no labels; the zeros are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.errors import CalibrationError
from topiarist.pruning.calibration import FEWEST, Arrays, Images, batch_size, check_images
from topiarist.pruning.cores import one_blas_thread
from topiarist.pruning.forward import chunks, run_chunks, with_outputs
from topiarist.pruning.layers import constant_arrays, replace_weights
from topiarist.pruning.matching.call import Array
from topiarist.pruning.matching.descent import Descent, Portion, cosine, flipped
from topiarist.pruning.matching.network import Network
from topiarist.pruning.output_error import OutputError
from topiarist.targets.linux import available_cores

HELD_BACK = 1 / 8  # of the images, to see whether it helps
MOST_AT_ONCE = 16
VALUES_AT_ONCE = 24 << 20  # inside the network, for each core
TIMED_STEPS = 4  # before a limit of seconds becomes one of steps


@dataclass(frozen=True)
class Recipe:
    """How outputs are matched: steps of so many images, at a rate that falls to zero by a cosine.

    The rate is how far a step moves a weight, as a share of the size of its tensor's. `mirror` lets
    half of the images be mirrored. With `seconds` there are as many steps as fit, going by the
    first ones; without, results are the same every time on the same machine.
    """

    steps: int = 256
    batch: int = 32
    rate: float = 1e-2
    mirror: bool = True
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
    before a last softmax, over their variance. Some images are held back: where those don't come
    nearer, or there are too few of them, the copy is as `pruned` is. Raises TrainingError, which
    names it, for an operator that has no gradient here, CalibrationError for images that the
    networks can't read.
    """
    check_images(dense, images.arrays)
    names, own_names = scores(dense), scores(pruned)
    networks = [Network(pruned, own_names) for _ in range(available_cores())]
    copy = onnx.ModelProto()
    copy.CopyFrom(pruned)
    back = max(FEWEST, batch_size(dense) or 0, int(HELD_BACK * len(images)))
    if len(images) - back < max(FEWEST, batch_size(dense) or 0) or not networks[0].parameters:
        return copy
    training, held = images.first(len(images) - back), images.after(len(images) - back)
    error = OutputError(with_outputs(dense, names), held, back)
    before = error.of(with_outputs(pruned, own_names))
    batches = Batches(dense, names, training, recipe)
    descent = Descent(networks, batches.weights)
    _descend(descent, batches, _at_once(networks[0], dense, training), recipe, progress, clock)
    replace_weights(copy, _as_stored(pruned, descent.parameters))
    if error.of(with_outputs(copy, own_names)) < before:
        return copy
    copy.CopyFrom(pruned)
    return copy


def scores(model: onnx.ModelProto) -> list[str]:
    """The outputs, each before its softmax if it has one."""
    last = {node.output[0]: node for node in model.graph.node if "Softmax" in node.op_type}
    names = [value.name for value in model.graph.output]
    return [last[name].input[0] if name in last else name for name in names]


class Batches:
    """Images in a random order, again and again, with the dense network's outputs.

    `weights` are one over the variance of each output, and over the number of outputs.
    """

    def __init__(
        self, dense: onnx.ModelProto, names: Sequence[str], images: Images, recipe: Recipe
    ) -> None:
        self._arrays = images.arrays
        self._rng = np.random.default_rng(recipe.seed)
        self._mirror = recipe.mirror
        self._wanted = [_outputs(dense, names, images.arrays, False)]
        if recipe.mirror:
            self._wanted.append(_outputs(dense, names, images.arrays, True))
        count = len(self._wanted[0][0])
        self._count = count
        whole = batch_size(dense) or 1
        self.size = max(whole, min(recipe.batch, count) // whole * whole)
        variances = [float(np.var(array, axis=0).mean()) for array in self._wanted[0]]
        if not np.isfinite(variances).all():
            raise CalibrationError(
                "the network's outputs overflow or are NaN for these images; are they scaled as "
                "the network expects?"
            )
        self.weights = [1 / (len(names) * max(variance, 1e-12)) for variance in variances]

    def forever(self, at_once: int) -> Iterator[list[Portion]]:
        """Batches in portions."""
        while True:
            order = self._rng.permutation(self._count)
            for start in range(0, self._count - self.size + 1, self.size):
                chosen = order[start : start + self.size]
                mirrored = self._rng.random(self.size) < (0.5 if self._mirror else 0.0)
                yield [
                    self._portion(chosen[s : s + at_once], mirrored[s : s + at_once])
                    for s in range(0, self.size, at_once)
                ]

    def _portion(self, chosen: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Portion:
        """Some images, some of them mirrored."""
        wanted = [array[chosen] for array in self._wanted[0]]
        for array, other in zip(wanted, self._wanted[-1], strict=True):
            array[mirrored] = other[chosen[mirrored]]
        inputs = {name: array[chosen] for name, array in self._arrays.items()}
        return Portion(flipped(inputs, mirrored), wanted)


def _outputs(
    dense: onnx.ModelProto, names: Sequence[str], arrays: Arrays, mirror: bool
) -> list[Array]:
    """What the dense network says, [N, ...] for each output."""
    portions = chunks(dense, Images(arrays))
    if mirror:
        portions = [flipped(p, np.ones(len(next(iter(p.values()))), np.bool_)) for p in portions]
    found = list(run_chunks(dense, portions, names))
    parts = ([part[name].astype(np.float32) for part in found] for name in names)
    return [np.concatenate(part) for part in parts]


def _at_once(network: Network, dense: onnx.ModelProto, images: Images) -> int:
    """How many images go through the network at once, on each core."""
    fixed = batch_size(dense)
    if fixed is not None:
        return fixed
    network.run(images.first(1).arrays, network.parameters)
    return max(1, min(MOST_AT_ONCE, VALUES_AT_ONCE // network.values_held))


def _descend(
    descent: Descent,
    batches: Batches,
    at_once: int,
    recipe: Recipe,
    progress: Callable[[float], None],
    clock: Callable[[], float],
) -> None:
    """As many steps as the recipe says."""
    steps, start = recipe.steps, clock()
    with one_blas_thread():
        for done, portions in enumerate(batches.forever(at_once)):
            if done >= steps:
                return
            loss = descent.step(portions, recipe.rate * cosine(done / steps))
            if not math.isfinite(loss):
                return  # the outputs for other images will tell
            progress((done + 1) / steps)
            if done + 1 == TIMED_STEPS and recipe.seconds is not None:
                fitting = int(recipe.seconds * TIMED_STEPS / max(clock() - start, 1e-9))
                steps = max(TIMED_STEPS, min(steps, fitting))


def _as_stored(model: onnx.ModelProto, parameters: dict[str, Array]) -> dict[str, NDArray[Any]]:
    """In the dtypes of the file; zeros stay."""
    stored = constant_arrays(model)
    return {name: array.astype(stored[name].dtype) for name, array in parameters.items()}
