"""Which channels go together, which can't go, and that cutting useless ones changes nothing."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.models import Net, random_inputs, run_onnx, worst_error
from tests.pruning.channel_nets import (
    NETWORKS,
    concatenated,
    mobile,
    padded_shortcut,
    plain,
    residual,
    silence,
    some_kept,
)
from topiarist.pruning.calibration import Images
from topiarist.pruning.channel_order import magnitude_orders
from topiarist.pruning.channels import channel_map
from topiarist.pruning.compensation import compensate
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.shrink import shrink

SHARED = Path(__file__).parents[3] / "shared" / "data"


def _groups(model):
    return {group.name: group for group in channel_map(model).groups}


def _check(model):
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    onnx.checker.check_model(inferred, full_check=True)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_cutting_channels_that_nobody_reads_changes_nothing(network, seed):
    model = NETWORKS[network]()
    channels = channel_map(model)
    kept = some_kept(channels, seed)
    assert len(kept) >= 3
    useless = silence(model, channels, channels.mask(kept))
    before = useless.SerializeToString(deterministic=True)
    small = shrink(useless, kept)
    assert useless.SerializeToString(deterministic=True) == before
    _check(small)
    for name, group in _groups(small).items():
        assert group.size == len(kept.get(name, group.channels))
    inputs = random_inputs(model)
    assert worst_error(run_onnx(small, inputs), run_onnx(useless, inputs)) < 1e-5
    sizes = [sum(v.weight.size for v in weighted_layers(m)) for m in (small, model)]
    assert sizes[0] < 0.6 * sizes[1]


def test_one_group_at_a_time_in_any_network():
    for make in NETWORKS.values():
        model = make()
        inputs = random_inputs(model)
        for name, stay in some_kept(channel_map(model)).items():
            channels = channel_map(model)
            useless = silence(model, channels, channels.mask({name: stay}))
            small = shrink(useless, {name: stay})
            assert worst_error(run_onnx(small, inputs), run_onnx(useless, inputs)) < 1e-5


def test_all_that_write_to_a_sum_go_together():
    groups = _groups(residual())
    assert list(groups) == ["stem", "one", "three", "skip", "fc"]
    assert groups["stem"].producers == ("stem", "two")
    assert groups["stem"].consumers == ("one", "three", "skip")
    assert groups["skip"].producers == ("skip", "four")
    assert groups["skip"].consumers == ("fc",)
    assert groups["fc"].reason_kept.startswith("the network's output")


def test_padded_shortcuts_have_two_groups():
    groups = _groups(padded_shortcut())
    assert groups["stem"].producers == ("stem", "two")
    assert groups["two"].producers == ("two",)
    assert (groups["stem"].size, groups["two"].size) == (8, 8)
    small = shrink(padded_shortcut(), {"stem": [0, 5, 7], "two": range(2, 8)})
    pads = next(n for n in small.graph.node if n.op_type == "Pad").input[1]
    stored = {t.name: numpy_helper.to_array(t).tolist() for t in small.graph.initializer}
    assert stored[pads] == [0, 2, 0, 0, 0, 4, 0, 0]


def test_depthwise_and_gates_go_along():
    groups = _groups(mobile())
    assert groups["expand"].producers == ("expand", "depthwise", "excite")
    assert groups["expand"].consumers == ("squeeze", "project")
    assert groups["stem"].producers == ("stem", "project", "double")
    small = shrink(mobile(), {"stem": [1, 2, 3], "expand": [5]})
    shapes = {v.name: (v.weight.shape[:2], v.groups) for v in weighted_layers(small)}
    assert shapes["depthwise"] == ((1, 1), 1)
    assert shapes["double"] == ((6, 1), 3)
    assert shapes["fc"] == ((10, 6), 1)


def test_concatenations_keep_their_parts_apart():
    groups = _groups(concatenated())
    assert groups["left"].consumers == groups["right"].consumers == ("grow", "fc")
    small = shrink(concatenated(), {"left": [0], "grow": [1, 2]})
    shapes = {v.name: v.weight.shape[:2] for v in weighted_layers(small)}
    assert (shapes["grow"], shapes["fc"]) == ((2, 13), (10, 28))
    assert not [n for n in small.graph.node if n.op_type == "Unsqueeze"]


def test_pixels_of_a_channel_go_together():
    small = shrink(plain(), {"two": [3, 4], "hidden": [9]})
    shapes = [v.weight.shape[:2] for v in weighted_layers(small)]
    assert shapes == [(8, 3), (2, 8), (1, 32), (5, 1)]


def _reason(build):
    """Why the convolution `c` can't be cut in a network that ends in `build`."""
    net = Net()
    conv = net.conv(net.input(2, 3, 8, 8), 8, 3, name="c")
    model = net.model(net.conv(build(net, conv), 4, 8, 1, name="last"))
    return _groups(model)["c"].reason_kept


def test_reasons():
    assert _reason(lambda net, x: net.node("Relu", x)) is None
    assert (
        _reason(lambda net, x: net.node("LRN", x, size=3, name="n")) == "LRN n may mix its channels"
    )
    shuffled = _reason(lambda net, x: net.node("Transpose", x, perm=[0, 1, 3, 2], name="t"))
    assert shuffled == "Transpose t may mix its channels"
    grouped = _reason(lambda net, x: net.conv(x, 8, 8, group=2, name="g"))
    assert grouped == "Conv g is a convolution in 2 groups of equal size"
    mean = _reason(lambda net, x: net.node("ReduceMean", x, axes=[1], name="r"))
    assert mean == "ReduceMean r works along the channels"
    two = _reason(lambda net, x: net.nodes_of("Split", x, count=2, axis=2, name="s")[0])
    assert two == "Split s may mix its channels"
    spread = _reason(
        lambda net, x: net.node(
            "Mul", net.conv(x, 4, 8, name="other"), net.node("ReduceMean", x, axes=[1], name="r")
        )
    )
    assert spread == "ReduceMean r works along the channels"


def test_after_an_unknown_operator_channels_are_known_again():
    net = Net()
    x = net.conv(net.input(2, 3, 8, 8), 8, 3, name="first")
    x = net.conv(net.node("LRN", x, size=3), 6, 8, name="second")
    model = net.model(net.conv(x, 4, 6, name="third"))
    groups = _groups(model)
    assert groups["first"].reason_kept is not None
    assert groups["second"].reason_kept is None
    small = shrink(model, {"second": [0, 1]})
    _check(small)
    assert [v.weight.shape[:2] for v in weighted_layers(small)] == [(8, 3), (2, 8), (4, 2)]


def test_a_shared_weight_is_cut_for_each_layer():
    net = Net()
    weight = net.weight(8, 8, 3, 3, name="w")
    x = net.conv(net.input(1, 3, 8, 8), 8, 3, name="stem")
    a = net.node("Conv", x, weight, pads=[1] * 4, name="a")
    b = net.node("Conv", net.node("Relu", a), weight, pads=[1] * 4, name="b")
    model = net.model(net.conv(b, 4, 8, name="last"))
    channels = channel_map(model)
    kept = {"stem": [0, 1, 2], "a": range(5), "b": [7]}
    small = shrink(model, kept)
    _check(small)
    shapes = [v.weight.shape[:2] for v in weighted_layers(small)]
    assert shapes == [(3, 3), (5, 3), (1, 5), (4, 1)]
    assert {group.name for group in channels.groups} == {"stem", "a", "b", "last"}


def test_wrong_cuts_are_refused():
    model = residual()
    with pytest.raises(ValueError, match="no group of channels 'conv9'; there are stem, one"):
        shrink(model, {"conv9": [0]})
    with pytest.raises(ValueError, match="the channels of fc can't be cut: the network's output"):
        shrink(model, {"fc": [0]})
    for wrong in ([], [8], [-1]):
        with pytest.raises(ValueError, match="keeps at least one of its channels 0 to 7"):
            shrink(model, {"stem": wrong})
    assert shrink(model, {}) == model


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["cifar10_resnet20", "imagenet_mobilenet_v2_1.0_224"])
def test_trained_networks_shrink_and_run(name):
    path = SHARED / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    model = onnx.load(path)
    channels = channel_map(model)
    kept = some_kept(channels)
    assert len(kept) == len(channels.groups) - 1
    useless = silence(model, channels, channels.mask(kept))
    small = shrink(useless, kept)
    _check(small)
    assert small.ByteSize() < 0.45 * model.ByteSize()
    inputs = random_inputs(model)
    assert worst_error(run_onnx(small, inputs), run_onnx(useless, inputs)) < 1e-4


@pytest.mark.shared_data
def test_compensation_saves_the_accuracy_of_a_trained_network():
    """An eighth of every group, a quarter of the FLOPs."""
    path = SHARED / "cifar10_resnet20.onnx"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    model = onnx.load(path)
    orders = magnitude_orders(channel_map(model))
    kept = {name: order.kept(7 * len(order.order) // 8) for name, order in orders.items()}
    images, _ = _cifar("cifar10_train5000", 128)
    test, labels = _cifar("cifar10_test500", 500)

    def top1(candidate):
        (logits,) = run_onnx(candidate, {"input": test})
        return 100 * np.mean(logits.argmax(axis=1) == labels)

    plainly = top1(shrink(model, kept))
    fitted = top1(shrink(compensate(model, kept, Images({"input": images})), kept))
    assert top1(model) - fitted < 6
    assert fitted - plainly > 15


def _cifar(name, count):
    """Images as the network reads them [N, 3, 32, 32], and labels."""
    with np.load(SHARED / f"{name}.npz") as file:
        pixels, labels = file["images"][:count], file["labels"][:count]
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    images = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels
