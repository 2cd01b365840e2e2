"""Fitting a layer once more, to what it reads in the pruned network."""

import numpy as np
import pytest

from tests.models import Net, run_onnx
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.refit import PULL, refit


def _layer(groups, zeros):
    net = Net()
    data = net.input("N", 8, 7, 7)
    attributes = {"group": groups, "strides": [2, 1], "name": "conv"}
    model = net.model(net.conv(data, 6, 8, **attributes))
    (layer,) = weighted_layers(model)
    keep = np.random.default_rng(1).random(layer.weight.shape) > zeros
    replace_weights(model, {layer.weight_name: np.where(keep, layer.weight, 0).astype("f4")})
    return model, weighted_layers(model)[0]


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_come_nearer_to_the_wanted_ones_and_zeros_stay(groups):
    rng = np.random.default_rng(0)
    model, layer = _layer(groups, zeros=0.6)
    dense, _ = _layer(groups, zeros=0.0)
    clean = rng.standard_normal((40, 8, 7, 7)).astype(np.float32)
    read = clean + 0.4 * np.roll(clean, 1, axis=1)  # what layers before have made of it
    (wanted,) = run_onnx(dense, {"x": clean})

    def distance(weight):
        replace_weights(model, {layer.weight_name: weight.astype(np.float32)})
        (found,) = run_onnx(model, {"x": read})
        return float((found - wanted).var(axis=(0, 2, 3)).sum())

    portions = [slice(s, s + 5) for s in range(0, 40, 5)]
    fitted = refit(layer, [read[p] for p in portions], [wanted[p] for p in portions])
    assert ((fitted == 0) == (layer.weight == 0)).all()
    before, after = distance(layer.weight), distance(fitted)
    assert after < 0.95 * before


def test_without_zeros_it_is_the_least_squares_of_all_places():
    rng = np.random.default_rng(2)
    net = Net()
    model = net.model(net.conv(net.input("N", 5, 4, 4), 3, 5, 1, name="conv"))
    (layer,) = weighted_layers(model)
    x = rng.standard_normal((60, 5, 4, 4)).astype(np.float32) + 1
    y = rng.standard_normal((60, 3, 4, 4)).astype(np.float32) + x[:, :3]
    rows = np.moveaxis(x, 1, 0).reshape(5, -1).astype(np.float64)
    wanted = np.moveaxis(y, 1, 0).reshape(3, -1).astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)
    wanted -= wanted.mean(axis=1, keepdims=True)
    square = rows @ rows.T / rows.shape[1]
    pull = PULL * np.diagonal(square).mean()
    weight = layer.weight.reshape(3, 5)
    right = wanted @ rows.T / rows.shape[1] + pull * weight
    expected = right @ np.linalg.inv(square + pull * np.eye(5))
    found = refit(layer, [x], [y]).reshape(3, 5)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_a_layer_that_reads_constants_stays_as_it_is():
    _, layer = _layer(1, zeros=0.5)
    x, y = np.zeros((8, 8, 7, 7), np.float32), np.ones((8, 6, 4, 7), np.float32)
    assert (refit(layer, [x], [y]) == layer.weight).all()
