"""What reconstruction is for: a trained network that is pruned without training stays accurate."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models import run_onnx
from tests.pruning.networks import near
from topiarist.pruning.calibration import check_images
from topiarist.pruning.database import build_database
from topiarist.pruning.stitch import stitch

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL = SHARED / "cifar10_resnet20.onnx"


def _images(name, count):
    """Images [N, 3, 32, 32] as the network reads them, and their labels."""
    with np.load(SHARED / name) as file:
        pixels, labels = file["images"][:count], file["labels"][:count]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    scaled = (pixels / 255 - mean) / deviation
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32), labels


@pytest.mark.shared_data
@pytest.mark.skipif(not MODEL.is_file(), reason=f"needs {MODEL.name}")
def test_resnet20_with_a_fifth_of_its_weights(tmp_path):
    model = onnx.load(MODEL)
    images = check_images(model, {"input": _images("cifar10_train5000.npz", 96)[0]})
    pixels, labels = _images("cifar10_test500.npz", 500)

    def right(network):
        (scores,) = run_onnx(network, {"input": pixels})
        return 100 * float((scores.argmax(axis=1) == labels).mean())

    dropped = {}
    for criterion in ("obs", "magnitude"):
        database = build_database(model, images, tmp_path, criterion=criterion)
        choice = dict.fromkeys(database.layers, near("unstructured", 0.2))
        pruned = stitch(model, database, choice, images, refit=criterion == "obs")
        dropped[criterion] = right(model) - right(pruned)
    assert dropped["obs"] < 6
    assert dropped["magnitude"] > dropped["obs"] + 5
