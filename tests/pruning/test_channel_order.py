"""The order against the definition, and what follows from it: counts, compensation, errors."""

import numpy as np
import onnx
import pytest

from tests.models import Net, random_inputs, relative_error, run_onnx
from tests.pruning.channel_nets import NETWORKS, plain, residual, silence, some_kept
from topiarist.errors import BudgetError, CalibrationError
from topiarist.pruning import channel_order
from topiarist.pruning.calibration import Images
from topiarist.pruning.channel_errors import channel_errors
from topiarist.pruning.channel_order import filter_norms, magnitude_orders, obs_orders
from topiarist.pruning.channel_steps import choose_counts, layer_channels, step_counts
from topiarist.pruning.channels import channel_map
from topiarist.pruning.compensation import compensate
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.moments import damped, gather_moments
from topiarist.pruning.shrink import shrink


def _two_layers():
    """A convolution with related channels, and one that reads them."""
    net = Net()
    x = net.node("Relu", net.conv(net.input("N", 3, 6, 6), 8, 3, name="make"))
    return net.model(net.conv(x, 5, 8, name="read"))


def _images(model, count=24):
    return Images(random_inputs(model, batch=count))


def _share_lost(weight, matrix, gone):
    """The loss of the best weight without the channels, by least squares."""
    stay = np.repeat(~np.isin(np.arange(8), gone), 9)
    fitted = np.zeros_like(weight)
    cross = weight @ matrix[:, stay]
    fitted[:, stay] = np.linalg.solve(matrix[np.ix_(stay, stay)], cross.T).T
    change = weight - fitted
    return np.trace(change @ matrix @ change.T) / np.trace(weight @ matrix @ weight.T)


def test_errors_are_those_of_the_best_weights_and_the_order_is_greedy():
    model = _two_layers()
    images = _images(model)
    order = obs_orders(model, channel_map(model), images)["make"]
    layer = weighted_layers(model)[1]
    weight = layer.weight.astype(np.float64).reshape(5, -1)
    matrix, _ = damped("read", gather_moments(model, [layer], images)[0].matrix[0])
    assert sorted(order.order) == list(range(8))
    for count in range(8):
        lost = _share_lost(weight, matrix, order.order[:count])
        assert order.errors[count] == pytest.approx(lost, rel=1e-6, abs=1e-12)
    for count in range(7):
        gone, rest = order.order[:count], order.order[count:]
        every = [_share_lost(weight, matrix, [*gone, one]) for one in rest]
        assert min(every) == pytest.approx(order.errors[count + 1], rel=1e-6)
    assert order.kept(3).tolist() == sorted(order.order[5:])


@pytest.mark.parametrize("rounds", [64, 2])
def test_useless_channels_go_first(rounds, monkeypatch):
    monkeypatch.setattr(channel_order, "_ROUNDS", rounds)
    model = residual()
    channels = channel_map(model)
    model = _without(model, "one", [2, 7, 9])
    orders = obs_orders(model, channel_map(model), _images(model))
    assert set(orders["one"].order[:3]) == {2, 7, 9}
    assert orders["one"].errors[3] == pytest.approx(0, abs=1e-6)
    assert set(orders) == {g.name for g in channels.groups if g.reason_kept is None}
    for order in orders.values():
        assert (np.diff(order.errors) >= -1e-12).all()
        assert len(order.errors) == len(order.order)


def _without(model, name, gone):
    """Nobody reads these channels."""
    channels = channel_map(model)
    stay = np.delete(np.arange(channels.group(name).size), gone)
    return silence(model, channels, channels.mask({name: stay}))


def test_layers_with_too_many_columns_count_by_their_diagonal(monkeypatch):
    monkeypatch.setattr(channel_order, "MOST_COLUMNS", 100)
    model = plain()
    images = Images(random_inputs(model, batch=1))
    order = obs_orders(model, channel_map(model), images)["two"]
    (hidden,) = [v for v in weighted_layers(model) if v.name == "hidden"]
    assert hidden.weight.shape == (10, 192, 1, 1)
    values = run_onnx(_upto(model, hidden.node.input[0]), images.arrays)[0].reshape(12, 16)
    weight = hidden.weight.reshape(10, 12, 16).astype(np.float64)
    power = np.square(values.astype(np.float64)).mean(axis=1)
    alone = (weight**2).sum(axis=(0, 2)) * power
    assert order.order[0] == np.argmin(alone)


def _upto(model, value):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.append(onnx.ValueInfoProto(name=value))
    return copy


def test_magnitude_is_the_share_of_the_filters_norms():
    model = residual()
    channels = channel_map(model)
    stem, two = (v for v in weighted_layers(model) if v.name in ("stem", "two"))
    energy = [np.square(v.weight.astype(np.float64)).sum(axis=(1, 2, 3)) for v in (stem, two)]
    expected = sum(e / e.sum() for e in energy)
    assert filter_norms(channels, channels.group("stem")) == pytest.approx(expected)
    order = magnitude_orders(channels)["stem"]
    assert order.order.tolist() == np.argsort(expected).tolist()
    assert order.errors[-1] == pytest.approx(2 - expected.max())


@pytest.mark.parametrize("network", NETWORKS)
def test_compensation_loses_less_than_plain_cutting(network):
    model = NETWORKS[network]()
    batch = 1 if network in ("plain", "reshaped") else 64
    images = Images(random_inputs(model, batch=batch))
    kept = some_kept(channel_map(model))
    before = model.SerializeToString(deterministic=True)
    fitted = compensate(model, kept, images)
    assert model.SerializeToString(deterministic=True) == before
    small = shrink(fitted, kept)
    (expected,) = run_onnx(model, images.arrays)
    (whole,) = run_onnx(fitted, images.arrays)
    (best,) = run_onnx(small, images.arrays)
    (cut,) = run_onnx(shrink(model, kept), images.arrays)
    assert relative_error(best, whole) < 1e-4
    assert np.square(best - expected).sum() < 0.5 * np.square(cut - expected).sum()


def test_compensation_is_exact_where_channels_repeat():
    """Channel 1 is channel 0 twice, so whoever reads it can read channel 0."""
    net = Net()
    weight = net.rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    weight[1] = 2 * weight[0]
    x = net.node("Conv", net.input("N", 3, 6, 6), net.constant(weight), name="make")
    model = net.model(net.conv(net.node("Relu", x), 5, 4, name="read"))
    images = _images(model, 32)
    kept = {"make": [0, 2, 3]}
    small = shrink(compensate(model, kept, images), kept)
    inputs = random_inputs(model, batch=4, seed=5)
    error = relative_error(run_onnx(small, inputs)[0], run_onnx(model, inputs)[0])
    assert error < 0.02
    assert error < 0.1 * relative_error(
        run_onnx(shrink(model, kept), inputs)[0], run_onnx(model, inputs)[0]
    )


def test_images_that_overflow_are_refused():
    model = _two_layers()
    images = Images({"x": np.full((8, 3, 6, 6), 3e38, np.float32)})
    with pytest.raises(CalibrationError, match="read: its inputs overflow"):
        compensate(model, {"make": [0, 1]}, images)
    with pytest.raises(CalibrationError, match="read: its inputs overflow"):
        obs_orders(model, channel_map(model), images)


def test_few_images_are_not_learnt_by_heart():
    """A classifier of 40 inputs and 24 images: other images must not lose."""
    net = Net()
    x = net.node("Relu", net.conv(net.input("N", 3, 6, 6), 48, 3, name="make"))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    model = net.model(net.node("Gemm", x, net.weight(10, 48), net.weight(10), transB=1))
    kept = {"make": range(8, 48)}
    fitted = shrink(compensate(model, kept, _images(model)), kept)
    inputs = random_inputs(model, batch=200, seed=9)
    expected = run_onnx(model, inputs)[0]
    errors = [
        np.square(run_onnx(small, inputs)[0] - expected).mean()
        for small in (fitted, shrink(model, kept))
    ]
    assert errors[0] < 1.1 * errors[1]


def test_zeros_of_a_sparse_network_stay_while_the_rest_makes_up():
    model = _two_layers()
    _make, read = weighted_layers(model)
    zeros = np.random.default_rng(3).random(read.weight.shape) < 0.7
    sparse = onnx.ModelProto()
    sparse.CopyFrom(model)
    replace_weights(sparse, {read.weight_name: np.where(zeros, np.float32(0), read.weight)})
    images, kept = _images(sparse, 64), {"make": [0, 1, 3, 4, 6]}
    fitted = compensate(sparse, kept, images)
    weight = weighted_layers(fitted)[1].weight
    assert not weight[zeros].any()
    assert np.count_nonzero(weight) == np.count_nonzero(~zeros[:, kept["make"]])
    inputs = random_inputs(model, batch=64, seed=5)
    expected = run_onnx(sparse, inputs)[0]
    errors = [
        np.square(run_onnx(shrink(small, kept), inputs)[0] - expected).sum()
        for small in (fitted, sparse)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_nothing_cut_is_nothing_changed():
    model = residual()
    assert compensate(model, {}, _images(model)) == model


def test_channel_errors_tell_groups_apart():
    """A block that hardly matters for the sum costs little, whatever its own layers lose."""
    net = Net()
    x = net.node("Relu", net.conv(net.input("N", 3, 6, 6), 8, 3, name="stem"))
    y = net.node("Relu", net.conv(x, 8, 8, name="inner"))
    small = net.node("Mul", net.conv(y, 8, 8, name="outer"), net.constant(np.float32(0.01)))
    model = net.model(net.conv(net.node("Relu", net.node("Add", x, small)), 4, 8, name="last"))
    images = _images(model, 32)
    orders = obs_orders(model, channel_map(model), images)
    measured = channel_errors(model, orders, images)
    assert orders["inner"].errors[4] > 0.1 * orders["stem"].errors[4]
    assert measured["inner"].errors[4] < 0.001 * measured["stem"].errors[4]
    for name, order in measured.items():
        assert (order.order == orders[name].order).all()
        assert (np.diff(order.errors) >= 0).all()


@pytest.mark.parametrize(
    ("size", "first", "last", "steps"),
    [(1, None, None, 0), (3, 2, 1, 2), (16, 14, 2, 7), (24, 22, 2, 11), (32, 28, 4, 7),
     (64, 56, 8, 7), (100, 96, 8, 12), (256, 240, 16, 15), (2048, 1920, 128, 15)],
)  # fmt: skip
def test_steps_of_whole_vectors(size, first, last, steps):
    counts = step_counts(size)
    assert len(counts) == steps
    if steps:
        assert (counts[0], counts[-1]) == (first, last)


def test_layers_follow_their_groups():
    channels = channel_map(NETWORKS["concatenated"]())
    sizes = layer_channels(channels, {"left": 3, "grow": 2, "squeeze": 5})
    assert sizes == {
        "squeeze": (3, 5),
        "left": (5, 3),
        "right": (5, 12),
        "grow": (15, 2),
        "fc": (32, 10),
    }


def _us(layer, inputs, outputs):
    return float(inputs * outputs)


def _total(channels, counts):
    return sum(_us(name, *sizes) for name, sizes in layer_channels(channels, counts).items())


@pytest.mark.parametrize("network", NETWORKS)
def test_counts_meet_the_budget_with_little_left(network):
    channels = channel_map(NETWORKS[network]())
    orders = magnitude_orders(channels)
    whole = _total(channels, {})
    assert choose_counts(channels, orders, _us, whole) == {
        name: len(order.order) for name, order in orders.items()
    }
    for share in (0.8, 0.5, 0.3):
        counts = choose_counts(channels, orders, _us, share * whole)
        assert 0.5 * share * whole < _total(channels, counts) <= share * whole
        small = shrink(NETWORKS[network](), {n: orders[n].kept(c) for n, c in counts.items()})
        sizes = {v.name: v.weight.shape for v in weighted_layers(small)}
        assert {name: shape[0] for name, shape in sizes.items()} == {
            name: outputs for name, (_, outputs) in layer_channels(channels, counts).items()
        }


def test_layers_that_do_not_get_faster_are_left_alone():
    channels = channel_map(residual())
    orders = magnitude_orders(channels)

    def price(layer, inputs, outputs):
        return 100.0 if layer == "two" else _us(layer, inputs, outputs)

    whole = sum(price(name, *sizes) for name, sizes in layer_channels(channels, {}).items())
    with pytest.raises(BudgetError, match=r"least that was reached is [\d.]+ us"):
        choose_counts(channels, orders, price, 99.0)
    only = {"one": orders["one"]}
    counts = choose_counts(channels, only, price, whole - 30)
    assert counts["one"] < 12
    with pytest.raises(BudgetError):
        choose_counts(channels, only, lambda *_: 1.0, 1.0)
