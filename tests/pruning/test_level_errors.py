"""What levels of single layers do to the network's outputs."""

import numpy as np
import pytest

from tests.models import Net
from topiarist.pruning.calibration import check_images
from topiarist.pruning.database import build_database
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.level_errors import TRIED, level_errors
from topiarist.pruning.output_error import OutputError


def _network(branch):
    """A residual branch of two layers, scaled by `branch` before it is added."""
    net = Net(seed=3)
    x = net.node("Relu", net.conv(net.input("N", 3, 6, 6), 16, 3, name="stem"))
    y = net.node("Relu", net.conv(x, 16, 16, name="inner"))
    y = net.node("Mul", net.conv(y, 16, 16, name="outer"), net.constant(np.float32(branch)))
    x = net.node("Relu", net.node("Add", x, y))
    return net.model(net.conv(x, 4, 16, name="last"))


@pytest.fixture
def images():
    return {"x": np.random.default_rng(0).standard_normal((24, 3, 6, 6)).astype(np.float32)}


def test_a_branch_that_hardly_matters_costs_little(images, tmp_path):
    model = _network(0.01)
    checked = check_images(model, images)
    database = build_database(model, checked, tmp_path, patterns=("unstructured", "2:4"))
    found = level_errors(model, database, checked)
    assert set(found) == set(database.layers) == {"inner", "outer", "last"}
    for name, errors in found.items():
        assert tuple(errors) == database.levels(name)
        assert all(error >= 0 for error in errors.values())
    level = database.levels("inner")[-5]
    own = database.error("inner", level), database.error("last", level)
    assert own[0] > 0.05 * own[1]
    assert found["inner"][level] < 0.01 * found["last"][level]


def test_what_was_tried_is_what_the_network_says(images, tmp_path):
    model = _network(1.0)
    checked = check_images(model, images)
    database = build_database(model, checked, tmp_path)
    found = level_errors(model, database, checked)
    outputs = OutputError(model, checked)
    before = model.SerializeToString()
    for density in TRIED:
        level = min(found["outer"], key=lambda v: abs(np.log(v.density / density)))
        changed = type(model)()
        changed.CopyFrom(model)
        (layer,) = (v for v in weighted_layers(model) if v.name == "outer")
        weight = layer.as_stored(database.weight("outer", level))
        replace_weights(changed, {layer.weight_name: weight})
        assert found["outer"][level] == pytest.approx(outputs.of(changed), rel=1e-3)
    assert model.SerializeToString() == before
    assert outputs.of(model) == 0
