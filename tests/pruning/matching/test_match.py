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
from topiarist.pruning.forward import with_outputs
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.matching.batches import Batches, moved
from topiarist.pruning.matching.descent import cosine
from topiarist.pruning.matching.match import Recipe, match_outputs
from topiarist.pruning.matching.teacher import common_activations
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
    assert shares == [done / QUICK.steps for done in range(QUICK.steps + 1)]
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


def test_seconds_limit_the_steps_and_the_rate_falls_by_the_clock():
    dense, pruned, images = _pruned()
    ticks, shares = itertools.count(), []
    recipe = Recipe(steps=60, batch=16, seconds=5)
    match_outputs(dense, pruned, images, recipe, progress=shares.append, clock=lambda: next(ticks))
    assert shares == [0.2, 0.4, 0.6, 0.8, 1]


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


def test_planes_are_mirrored_and_moved():
    plane = np.arange(9.0).reshape(1, 1, 3, 3)
    images = np.concatenate([plane, plane, plane])
    shifts = np.array([[0, 0], [1 / 3, 0], [0, -1 / 3]])
    found = moved(images, np.array([True, False, True]), shifts)
    assert found[0, 0].tolist() == [[2, 1, 0], [5, 4, 3], [8, 7, 6]]
    assert found[1, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]], "down, the edge repeated"
    assert found[2, 0].tolist() == [[2, 2, 1], [5, 5, 4], [8, 8, 7]], "left, then mirrored"
    row = np.arange(4.0).reshape(2, 2)
    assert moved(row, np.array([True, True]), shifts[:2]) is row


def test_batches_go_through_all_images_before_one_comes_again():
    numbers = np.arange(10.0, dtype=np.float32).reshape(10, 1)
    batches = Batches(Images({"x": numbers}), 4, 3, mirror=True, shift=0.1, seed=0)
    first, second, third = itertools.islice(batches, 3)
    assert [len(portion["x"]) for portion in first] == [3, 1]
    seen = np.concatenate([portion["x"] for portion in (*first, *second)])
    assert len(np.unique(seen)) == 8
    assert [p["x"].tolist() for p in third] != [p["x"].tolist() for p in first]


def test_activations_inside_are_learned_too():
    dense, pruned, images = _pruned()
    inner = common_activations(dense, pruned, images)
    assert inner == [n.output[0] for n in dense.graph.node if n.op_type == "Relu"]
    held = check_images(dense, {"x": small_images(64, seed=5)})
    error = OutputError(with_outputs(dense, inner), held)
    plain, both = (
        match_outputs(dense, pruned, images, Recipe(steps=30, batch=16, inside=inside))
        for inside in (0.0, 3.0)
    )
    assert error.of(with_outputs(both, inner)) < error.of(with_outputs(plain, inner))


def test_activations_of_other_shapes_are_not_compared():
    def network(channels):
        net = Net()
        x = net.node("Relu", net.conv(net.input("N", 3, 8, 8), channels, 3))
        y = net.node("Relu", net.conv(x, 6, channels))
        return net.model(y), x, y

    (dense, x, y), (cut, *_) = network(8), network(5)
    images = check_images(dense, {"x": small_images()})
    assert common_activations(dense, dense, images) == [x, y]
    assert common_activations(dense, cut, images) == [y]
