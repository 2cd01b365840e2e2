"""Adam on a network's parameters, as far as they are not zero, over all cores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from topiarist.pruning.calibration import Arrays
from topiarist.pruning.cores import on_all_cores
from topiarist.pruning.matching.call import Array
from topiarist.pruning.matching.network import Network
from topiarist.pruning.matching.teacher import Teacher

MEAN_DECAY, SQUARE_DECAY = 0.9, 0.999  # as Adam's authors have them
_LEAST = 1e-8
LEAST_BIAS = 0.1  # biases of zero have no size to go by

Line = NDArray[np.float32]


class Descent:
    """Moves parameters so that a network's outputs come near to the teacher's; zeros stay zeros.

    The networks are the same, one for each core; their gradients are summed in a fixed order.
    """

    def __init__(self, networks: Sequence[Network], teacher: Teacher) -> None:
        self._networks = networks
        self._teacher = teacher
        start = networks[0].parameters
        ends = np.cumsum([array.size for array in start.values()]).tolist()
        self._places = {
            name: (slice(end - array.size, end), array.shape)
            for (name, array), end in zip(start.items(), ends, strict=True)
        }
        self._line: Line = np.concatenate([array.reshape(-1) for array in start.values()])
        self._reach = np.concatenate([_reach(array).reshape(-1) for array in start.values()])
        self._mean, self._square = np.zeros_like(self._line), np.zeros_like(self._line)
        self._steps = 0

    @property
    def parameters(self) -> dict[str, Array]:
        """As they are now, by name."""
        return {name: self._line[place].reshape(s) for name, (place, s) in self._places.items()}

    def step(self, portions: Sequence[Arrays], rate: float) -> float:
        """One step for a batch in portions; returns its loss."""
        count = sum(map(_images, portions))
        shares = [portions[i :: len(self._networks)] for i in range(len(self._networks))]

        def gradient(number: int) -> tuple[Line, float]:
            with np.errstate(all="ignore"):  # the loss says what went wrong
                return self._gradient(self._networks[number], shares[number], count)

        busy = [number for number, share in enumerate(shares) if share]
        (total, loss), *others = on_all_cores(gradient, busy)
        for line, part in others:
            total += line
            loss += part
        self._move(total, rate)
        return loss

    def _gradient(
        self, network: Network, portions: Sequence[Arrays], count: int
    ) -> tuple[Line, float]:
        """The share of some portions in the gradient and in the loss of a batch."""
        total, loss, parameters = np.zeros_like(self._line), 0.0, self.parameters
        for portion in portions:
            said = self._teacher.says(portion)
            outputs, pull = network.run(portion, parameters)
            slopes = []
            for found, wanted, weight in zip(outputs, said, self._teacher.weights, strict=True):
                missing = np.subtract(found, wanted, out=wanted)
                scale = weight * _images(portion) / (count * missing.size)
                loss += scale * float(np.vdot(missing, missing))
                missing *= missing.dtype.type(2 * scale)
                slopes.append(missing)
            for name, array in pull(slopes).items():
                total[self._places[name][0]] += array.reshape(-1)
        return total, loss

    def _move(self, gradient: Line, rate: float) -> None:
        """Adam (Kingma & Ba, ICLR 2015, algorithm 1)."""
        self._steps += 1
        gradient *= self._reach != 0
        self._mean += (1 - MEAN_DECAY) * (gradient - self._mean)
        self._square += (1 - SQUARE_DECAY) * (gradient * gradient - self._square)
        whole = 1 - MEAN_DECAY**self._steps, 1 - SQUARE_DECAY**self._steps
        deviation = np.sqrt(self._square / np.float32(whole[1])) + np.float32(_LEAST)
        self._line -= np.float32(rate / whole[0]) * self._reach * self._mean / deviation


def _images(portion: Arrays) -> int:
    return len(next(iter(portion.values())))


def _reach(array: Array) -> Array:
    """How far each value of a tensor goes with a rate of 1: the root mean square; zeros stay.

    Weights of one network differ a thousandfold in size, and one rate has to suit all. A bias that
    is zero has not been pruned, and may move.
    """
    size = float(np.sqrt(np.mean(np.square(array[array != 0])))) if array.any() else 0.0
    if array.ndim == 1:
        return np.full_like(array, max(size, LEAST_BIAS))
    reach: Array = np.where(array != 0, array.dtype.type(size), array.dtype.type(0))
    return reach


def cosine(share: float) -> float:
    """The factor of the rate after this share of all steps: 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * share))
