"""Kernel patterns: few arrangements, and losses that are those of least squares."""

import numpy as np

from topiarist.pruning.kernel_patterns import LIBRARY, remove_taps, tap_library


def test_library_has_the_arrangements_that_most_kernels_want():
    rng = np.random.default_rng(0)
    importance = rng.random((100, 9))
    importance[:60, [1, 3, 4, 5]] += 2
    importance[60:90, [0, 1, 2, 4]] += 2
    library = tap_library(importance, 4)
    assert library.shape == (LIBRARY, 5)
    assert library[0].tolist() == [0, 2, 6, 7, 8]
    assert library[1].tolist() == [3, 5, 6, 7, 8]


def test_every_kernel_has_one_of_the_arrangements():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((54, 54)) @ rng.standard_normal((54, 300))
    matrix = x @ x.T / 300 + 0.05 * np.eye(54)
    w = rng.standard_normal((5, 1, 54))
    library = tap_library(w.reshape(-1, 9) ** 2, 4)
    found = remove_taps(w, matrix, np.linalg.inv(matrix), library)
    assert found.order.shape == (5, 30)
    for row, order, cost in zip(w[:, 0], found.order, found.cost, strict=True):
        gone = np.zeros(54, bool)
        gone[order] = True
        taps = {tuple(np.flatnonzero(kernel)) for kernel in gone.reshape(6, 9)}
        assert taps <= {tuple(t) for t in library.tolist()}
        pushed = np.linalg.inv(matrix)[np.ix_(gone, gone)]
        least = row[gone] @ np.linalg.solve(pushed, row[gone])
        assert least * 0.999 < cost.sum() < least * 1.05
