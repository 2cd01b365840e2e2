"""Accuracy and agreement of networks."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models import Net
from topiarist.pruning.accuracy import Accuracy, predicted_classes
from topiarist.pruning.calibration import check_images


def classes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_accuracy_counts_what_is_right_and_what_agrees() -> None:
    found = Accuracy.of(classes(0, 1, 2, 3), classes(0, 1, 1, 1), classes(0, 2, 2, 3))
    assert (found.images, found.top_1, found.agreement) == (4, 0.75, 0.5)
    assert found.share == 0.75


def test_without_labels_agreement_is_all_there_is() -> None:
    found = Accuracy.of(classes(0, 1), classes(0, 0), None)
    assert found.top_1 is None
    assert found.share == 0.5


def test_labels_beyond_the_last_whole_batch_are_left_out() -> None:
    assert Accuracy.of(classes(1, 1), classes(1, 1), classes(1, 0, 5)).top_1 == 0.5


@pytest.mark.parametrize("batch", ["n", 1, 3])
def test_the_class_is_the_largest_score(batch: int | str) -> None:
    net = Net()
    x = net.input(batch, 4, 2, 2)
    model = net.model(net.node("Flatten", net.node("GlobalMaxPool", x)))
    images = np.zeros((12, 4, 2, 2), np.float32)
    wanted = np.arange(12) % 4
    images[np.arange(12), wanted, 1, 0] = 1.0
    np.testing.assert_array_equal(
        predicted_classes(model, check_images(model, {"x": images})), wanted
    )
