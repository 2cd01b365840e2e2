"""Statistics after pruning are those of the dense network."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.models import Net, run_onnx
from tests.pruning.networks import near, small_images, small_network
from topiarist.pruning.calibration import check_images
from topiarist.pruning.correction import channel_statistics, correct_statistics
from topiarist.pruning.database import build_database
from topiarist.pruning.forward import chunks, with_outputs
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.one_shot import prune_model
from topiarist.pruning.stitch import stitch

CONVS = ["stem", "conv1", "conv2", "depthwise", "grouped", "point"]


def _statistics(model, images):
    names = [layer.node.output[0] for layer in weighted_layers(model) if layer.kind == "Conv"]
    return channel_statistics(model, names, chunks(model, images))


@pytest.mark.parametrize("batch", ["N", 1, 8])
def test_mean_and_deviation_of_every_convolution_are_the_dense_ones(batch):
    dense = small_network(batch)
    images = check_images(dense, {"x": small_images()})
    pruned, _ = prune_model(dense, density=0.5)
    corrected = correct_statistics(dense, pruned, images)
    wanted, found = _statistics(dense, images), _statistics(corrected, images)
    for name, expected in wanted.items():
        np.testing.assert_allclose(found[name].mean, expected.mean, atol=2e-4)
        np.testing.assert_allclose(found[name].deviation, expected.deviation, rtol=2e-3)


def test_zeros_stay_and_only_convolutions_after_pruned_ones_change():
    dense = small_network()
    images = check_images(dense, {"x": small_images()})
    pruned, _ = prune_model(dense, density=1.0, layer_density={"conv2": 0.3})
    before = pruned.SerializeToString()
    corrected = correct_statistics(dense, pruned, images)
    assert pruned.SerializeToString() == before
    for old, new in zip(weighted_layers(pruned), weighted_layers(corrected), strict=True):
        assert ((old.weight == 0) == (new.weight == 0)).all()
        same = old.name in ("stem", "conv1", "fc")
        assert same == bool((old.weight == new.weight).all())


def test_a_bias_is_added_where_there_is_none():
    dense = small_network()
    images = check_images(dense, {"x": small_images()})
    pruned, _ = prune_model(dense, density=0.4)
    corrected = correct_statistics(dense, pruned, images)
    node = next(n for n in corrected.graph.node if n.name == "conv1")
    assert node.input[2] == "conv1.weight.corrected_bias"
    names = [t.name for t in corrected.graph.initializer]
    assert len(names) == len(set(names))
    used = {name for n in corrected.graph.node for name in n.input}
    assert set(names) <= used, "the old biases are gone"


def test_a_bias_that_others_read_stays_as_it_is():
    net = Net()
    bias = net.constant(np.arange(8, dtype=np.float32))
    x = net.node("Conv", net.input("N", 8, 5, 5), net.weight(8, 8, 3, 3), bias, name="a")
    dense = net.model(net.node("Conv", x, net.weight(8, 8, 3, 3), bias, name="b"))
    images = check_images(dense, {"x": np.random.default_rng(0).random((9, 8, 5, 5), np.float32)})
    pruned, _ = prune_model(dense, density=0.4)
    corrected = correct_statistics(dense, pruned, images)
    assert [n.input[2].split(".")[-1] for n in corrected.graph.node] == ["corrected_bias"] * 2
    assert corrected.graph.node[0].input[2] != corrected.graph.node[1].input[2]


def test_weights_and_biases_in_constant_nodes_and_old_files():
    """IR version 3 lists weights among the inputs; exporters also write Constant nodes."""
    rng = np.random.default_rng(0)
    arrays = {"w1": rng.standard_normal((6, 3, 3, 3)), "w2": rng.standard_normal((6, 6, 3, 3))}
    tensors = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    bias = numpy_helper.from_array(rng.standard_normal(6).astype(np.float32), "value")
    nodes = [
        helper.make_node("Constant", [], ["b2"], value=bias),
        helper.make_node("Conv", ["x", "w1"], ["a"], name="one"),
        helper.make_node("Shape", ["a"], ["shape"]),
        helper.make_node("Reshape", ["a", "shape"], ["same"]),
        helper.make_node("Conv", ["same", "w2", "b2"], ["y"], name="two"),
    ]
    kind = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, ["N", 3, 8, 8])]
    inputs += [helper.make_tensor_value_info(t.name, kind, t.dims) for t in tensors]
    output = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(nodes, "net", inputs, [output], tensors)
    dense = helper.make_model(graph, ir_version=3, opset_imports=[helper.make_opsetid("", 8)])
    images = check_images(dense, {"x": small_images()})
    pruned, _ = prune_model(dense, density=0.5, layer_density={"one": 0.5})
    corrected = correct_statistics(dense, pruned, images)
    wanted, found = _statistics(dense, images), _statistics(corrected, images)
    for name, expected in wanted.items():
        np.testing.assert_allclose(found[name].mean, expected.mean, atol=2e-4)


def test_stitched_networks_are_nearer_to_the_dense_one_than_magnitude(tmp_path):
    dense = small_network()
    images = check_images(dense, {"x": small_images(64)})
    level = near("unstructured", 0.3)
    other = {"x": small_images(64, seed=7)}
    middle = [n.output[0] for n in dense.graph.node if n.op_type == "GlobalAveragePool"]
    (expected,) = run_onnx(with_outputs(dense, middle), other)
    distance = {}
    for criterion in ("obs", "magnitude"):
        database = build_database(dense, images, tmp_path, criterion=criterion)
        choice = dict.fromkeys(database.layers, level)
        stitched = stitch(dense, database, choice, images)
        for layer in weighted_layers(stitched):
            if layer.name in choice:
                kept = np.count_nonzero(layer.weight) / layer.weight.size
                assert kept == pytest.approx(level.density, abs=0.005)
        (found,) = run_onnx(with_outputs(stitched, middle), other)
        distance[criterion] = float(((found - expected) ** 2).mean())
    assert distance["obs"] < 0.5 * distance["magnitude"]


def test_dense_everywhere_changes_nothing(tmp_path):
    dense = small_network()
    images = check_images(dense, {"x": small_images()})
    database = build_database(dense, images, tmp_path)
    assert stitch(dense, database, {}, images).SerializeToString() == dense.SerializeToString()
    with pytest.raises(ValueError, match="'stem' is not in the database; it has conv1, conv2"):
        stitch(dense, database, {"stem": near("unstructured", 0.9)}, images)
