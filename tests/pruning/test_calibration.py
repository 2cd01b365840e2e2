"""Calibration images: what is taken, and what is said about what isn't."""

import numpy as np
import pytest

from tests.models import Net
from topiarist.errors import CalibrationError
from topiarist.pruning.calibration import batch_size, check_images, load_images


def _model(batch="N"):
    net = Net()
    return net.model(net.conv(net.input(batch, 3, 4, 4), 8, 3))


def _images(count=8, dtype=np.float32):
    return np.random.default_rng(0).standard_normal((count, 3, 4, 4)).astype(dtype)


def test_the_one_array_of_a_file_may_have_any_name(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=_images(), labels=np.arange(8, dtype=np.uint8))
    found = load_images(tmp_path / "a.npz", _model())
    assert list(found.arrays) == ["x"]
    assert len(found) == 8
    assert found.labels is not None
    assert found.labels.tolist() == list(range(8))
    assert len(found.first(3)) == 3


def test_arrays_are_found_by_name_among_others(tmp_path):
    np.savez(tmp_path / "a.npz", x=_images(dtype=np.float64), other=np.ones(3))
    found = load_images(tmp_path / "a.npz", _model())
    assert found.arrays["x"].dtype == np.float32
    assert found.labels is None


def test_a_digest_is_of_the_values():
    one, other = _images(), _images()
    other[0, 0, 0, 0] += 1
    model = _model()
    digests = [check_images(model, {"x": a}).digest() for a in (one, one.copy(), other)]
    assert digests[0] == digests[1] != digests[2]


def test_batch_size():
    assert (batch_size(_model()), batch_size(_model(4))) == (None, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": _images()[:, :2]}, r"must be \[N, 3, 4, 4\], got \[8, 2, 4, 4\]"),
        ({"x": _images()[0]}, r"must be \[N, 3, 4, 4\], got \[3, 4, 4\]"),
        ({"x": _images().astype(np.uint8)}, "must be float32, got uint8: .* normalised"),
        ({"x": _images(3)}, "3 images are too few"),
        ({"x": np.where(_images() > 2, np.nan, _images())}, "NaN or infinite values, first in"),
        ({"x": _images(), "labels": np.arange(5)}, "labels must be 8 class numbers"),
        ({"x": _images(), "labels": np.zeros(8)}, "labels must be 8 class numbers, got float64"),
        ({"a": _images(), "b": _images()}, "no array named 'x', only a, b"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_images(tmp_path / "images.npz", _model())
    assert "images.npz" in str(caught.value)


def test_what_is_no_npz_is_refused(tmp_path):
    (tmp_path / "a.npz").write_text("no")
    with pytest.raises(CalibrationError, match=r"is no \.npz file"):
        load_images(tmp_path / "a.npz", _model())
    np.savez(tmp_path / "b.npz", x=np.array([None, 1], dtype=object))
    with pytest.raises(CalibrationError, match=r"is no \.npz file of plain arrays"):
        load_images(tmp_path / "b.npz", _model())
