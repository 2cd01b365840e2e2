"""Calibration images in random batches, mirrored and moved a little."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topiarist.pruning.calibration import Arrays, Images
from topiarist.pruning.matching.call import Array

Flags = NDArray[np.bool_]
Shares = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of `size` images without end, in portions of at most `at_once`.

    Half of the images are mirrored with `mirror`, and all are moved by up to the share `shift` of
    their height and width.
    """

    images: Images
    size: int
    at_once: int
    mirror: bool
    shift: float
    seed: int

    def __iter__(self) -> Iterator[list[Arrays]]:
        rng, count = np.random.default_rng(self.seed), len(self.images)
        while True:
            order = rng.permutation(count)
            for start in range(0, count - self.size + 1, self.size):
                chosen = order[start : start + self.size]
                mirrored = rng.random(self.size) < (0.5 if self.mirror else 0.0)
                shifts = rng.uniform(-self.shift, self.shift, (self.size, 2))
                yield [
                    self._portion(chosen[s], mirrored[s], shifts[s])
                    for s in (slice(i, i + self.at_once) for i in range(0, self.size, self.at_once))
                ]

    def _portion(self, chosen: NDArray[np.int64], mirrored: Flags, shifts: Shares) -> Arrays:
        found = {name: array[chosen] for name, array in self.images.arrays.items()}
        return {name: moved(array, mirrored, shifts) for name, array in found.items()}


def moved(images: Array, mirrored: Flags, shifts: Shares) -> Array:
    """Images [N, C, H, W] mirrored left to right, and moved down and right by shares [N, 2].

    What is at the edge fills what gets free. Anything but four dimensions stays as it is.
    """
    if images.ndim != 4:
        return images
    found = np.empty_like(images)
    steps = np.rint(shifts * images.shape[2:]).astype(np.int64)
    for image, flip, step, place in zip(images, mirrored, steps, found, strict=True):
        rows, columns = (
            np.clip(np.arange(size) - by, 0, size - 1)
            for size, by in zip(image.shape[1:], step, strict=True)
        )
        place[...] = image[:, rows[:, None], columns[::-1] if flip else columns]
    return found
