"""Outputs come nearer to the dense network's, zeros stay, and nothing gets worse."""

import itertools

import numpy as np
import pytest
from onnx import numpy_helper

from tests.models import Net
from tests.pruning.networks import small_images, small_network
from topiarist.errors import CalibrationError, TrainingError
from topiarist.pruning.calibration import Images, check_images
from topiarist.pruning.correction import correct_statistics
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.matching.descent import cosine, flipped
from topiarist.pruning.matching.match import Recipe, match_outputs
from topiarist.pruning.one_shot import prune_model
from topiarist.pruning.output_error import OutputError

QUICK = Recipe(steps=30, batch=16)


def _pruned(batch="N", density=0.4):
    dense = small_network(batch)
    images = check_images(dense, {"x": small_images(96)})
    pruned, _ = prune_model(dense, density=density)
    return dense, correct_statistics(dense, pruned, images), images


def _error(dense, model):
    return OutputError(dense, check_images(dense, {"x": small_images(64, seed=5)})).of(model)


@pytest.mark.parametrize("batch", ["N", 1, 16])
def test_outputs_come_nearer_and_zeros_stay(batch):
    dense, pruned, images = _pruned(batch)
    before = pruned.SerializeToString()
    shares = []
    matched = match_outputs(dense, pruned, images, QUICK, progress=shares.append)
    assert pruned.SerializeToString() == before
    assert shares == sorted(shares) and len(shares) == QUICK.steps and shares[-1] == 1
    assert _error(dense, matched) < 0.9 * _error(dense, pruned)
    for old, new in zip(weighted_layers(pruned), weighted_layers(matched), strict=True):
        assert ((old.weight == 0) == (new.weight == 0)).all()
        assert not (old.weight == new.weight).all()


def test_all_else_in_the_file_is_the_same():
    dense, pruned, images = _pruned()
    matched = match_outputs(dense, pruned, images, QUICK)
    for one in (pruned, matched):
        for tensor in one.graph.initializer:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(values), tensor.name))
    assert pruned.SerializeToString() == matched.SerializeToString()


def test_the_same_every_time():
    dense, pruned, images = _pruned()
    found = [match_outputs(dense, pruned, images, QUICK).SerializeToString() for _ in range(2)]
    assert found[0] == found[1]
    other = match_outputs(dense, pruned, images, Recipe(steps=30, batch=16, seed=1))
    assert other.SerializeToString() != found[0]


@pytest.mark.parametrize("rate", [1e30, np.nan])
def test_what_does_not_help_is_not_taken(rate):
    dense, pruned, images = _pruned()
    shares = []
    found = match_outputs(dense, pruned, images, Recipe(rate=rate), progress=shares.append)
    assert found.SerializeToString() == pruned.SerializeToString()
    assert len(shares) < 5, "it goes on though the loss is no number any more"


def test_too_few_images_to_hold_some_back():
    dense, pruned, images = _pruned()
    assert match_outputs(dense, pruned, images.first(7)) == pruned
    dense, pruned, images = _pruned(16)
    assert match_outputs(dense, pruned, images.first(31)) == pruned


def test_seconds_limit_the_steps_by_what_the_first_ones_took():
    dense, pruned, images = _pruned()
    ticks, shares = itertools.count(0, 2), []  # four steps take two seconds
    recipe = Recipe(steps=60, batch=16, seconds=5)
    match_outputs(dense, pruned, images, recipe, progress=shares.append, clock=lambda: next(ticks))
    assert len(shares) == 10 and shares[-1] == 1


def test_softmax_and_several_outputs():
    net = Net()
    x = net.node("Relu", net.conv(net.input("N", 3, 8, 8), 8, 3, name="first"))
    y = net.node("Relu", net.conv(x, 8, 8, name="second"))
    dense = net.model(
        *(
            net.node("Softmax", net.node("Flatten", net.node("GlobalAveragePool", v)))
            for v in (net.conv(y, 5, 8, name="third"), y)
        )
    )
    images = check_images(dense, {"x": small_images(64)})
    pruned, _ = prune_model(dense, density=0.3)
    matched = match_outputs(dense, pruned, images, QUICK)
    assert _error(dense, matched) < 0.9 * _error(dense, pruned)


def test_images_that_networks_can_not_read():
    dense, pruned, images = _pruned()
    broken = images.arrays["x"].copy()
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match="NaN or infinite values, first in image 3"):
        match_outputs(dense, pruned, Images({"x": broken}))
    with pytest.raises(CalibrationError, match="overflow or are NaN"):
        match_outputs(dense, pruned, Images({"x": np.full_like(broken, 1e38)}))


def test_an_operator_without_a_gradient():
    net = Net()
    dense = net.model(net.node("Erf", net.conv(net.input("N", 3, 8, 8), 8, 3), name="strange"))
    images = check_images(dense, {"x": small_images()})
    with pytest.raises(TrainingError, match="'strange'"):
        match_outputs(dense, dense, images)


def test_the_rate_falls_from_all_to_nothing():
    assert cosine(0) == 1 and cosine(0.5) == pytest.approx(0.5) and cosine(1) == 0


def test_planes_are_mirrored_and_nothing_else():
    planes, row = np.arange(8.0).reshape(2, 1, 2, 2), np.arange(4.0).reshape(2, 2)
    found = flipped({"planes": planes, "row": row}, np.array([False, True]))
    assert (found["planes"][0] == planes[0]).all() and (found["row"] == row).all()
    assert found["planes"][1].tolist() == [[[5, 4], [7, 6]]]
