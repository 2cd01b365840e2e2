"""One-shot pruning: ONNX in, ONNX out, exact budgets, everything else untouched."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from topiarist.errors import ModelError
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.one_shot import prune_model
from topiarist.pruning.patterns import find_pattern

RNG = np.random.default_rng(0)


def _array(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def _network(ir_version=8, dtype=np.float32):
    """conv1 (3 channels), conv2 (16), depthwise, conv3 (Constant node), Gemm stored as [K, M]."""
    weights = {
        "conv1.weight": _array(16, 3, 3, 3),
        "conv2.weight": _array(18, 16, 3, 3),
        "dw.weight": _array(18, 1, 3, 3),
        "fc.weight": _array(20, 10),
    }
    initializers = [numpy_helper.from_array(w.astype(dtype), n) for n, w in weights.items()]
    constant = numpy_helper.from_array(_array(20, 18, 1, 1).astype(dtype), "")
    nodes = [
        helper.make_node("Constant", [], ["conv3.weight"], value=constant),
        helper.make_node("Conv", ["x", "conv1.weight"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "conv2.weight"], ["c"], name="/conv2/Conv", pads=[1] * 4),
        helper.make_node("Conv", ["c", "dw.weight"], ["d"], group=18, pads=[1] * 4),
        helper.make_node("Conv", ["d", "conv3.weight"], ["e"], name="conv3"),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "fc.weight"], ["y"]),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [helper.make_tensor_value_info("x", kind, ["N", 3, 8, 8])]
    if ir_version < 4:
        inputs += [helper.make_tensor_value_info(t.name, kind, t.dims) for t in initializers]
    output = helper.make_tensor_value_info("y", kind, ["N", 10])
    graph = helper.make_graph(nodes, "net", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 13)]
    model = helper.make_model(graph, ir_version=ir_version, opset_imports=opsets)
    onnx.checker.check_model(model)
    return model


def _weights(model):
    return {layer.name: layer.weight for layer in weighted_layers(model)}


@pytest.mark.parametrize("ir_version", [3, 8])
def test_default_keeps_first_depthwise_and_fully_connected(ir_version):
    model = _network(ir_version)
    before = model.SerializeToString(deterministic=True)
    pruned, report = prune_model(model, density=0.1)
    onnx.checker.check_model(pruned)
    assert model.SerializeToString(deterministic=True) == before
    reasons = {entry.layer: entry.reason_kept for entry in report}
    assert list(reasons) == ["conv1", "/conv2/Conv", "dw", "conv3", "fc"]
    assert "first convolution" in reasons["conv1"]
    assert "depthwise" in reasons["dw"]
    assert "fully connected" in reasons["fc"]
    assert reasons["/conv2/Conv"] is reasons["conv3"] is None
    for entry in report:
        weight, original = _weights(pruned)[entry.layer], _weights(model)[entry.layer]
        kept = weight != 0
        assert entry.density_after == kept.mean()
        assert entry.density_before == 1
        assert (weight[kept] == original[kept]).all()
        expected = 1 if entry.reason_kept else round(0.1 * weight.size) / weight.size
        assert entry.density_after == pytest.approx(expected)


def test_everything_else_is_untouched():
    model = _network()
    model.metadata_props.add(key="author", value="someone")
    model.graph.initializer[1].doc_string = "a note"
    pruned, _ = prune_model(model, density=0.1)
    assert pruned.graph.initializer[1].doc_string == "a note"
    pruned.graph.initializer[1].CopyFrom(model.graph.initializer[1])
    assert pruned != model  # the Constant node
    pruned.graph.node[0].CopyFrom(model.graph.node[0])
    assert pruned == model


@pytest.mark.parametrize("pattern", ["block4x1", "block8x1", "block16x1", "2:4"])
def test_patterns(pattern):
    pruned, report = prune_model(_network(), density=0.5, pattern=pattern)
    found = find_pattern(_weights(pruned)["/conv2/Conv"])
    assert str(found) == pattern
    assert {entry.pattern for entry in report} == {pattern, "dense"}


def test_filters_are_cut_out():
    model = _network()
    pruned, report = prune_model(model, density=0.5, pattern="filter")
    onnx.checker.check_model(pruned, full_check=True)
    shapes = {name: weight.shape for name, weight in _weights(pruned).items()}
    assert shapes == {
        "conv1": (8, 3, 3, 3),
        "/conv2/Conv": (9, 8, 3, 3),
        "dw": (9, 1, 3, 3),
        "conv3": (10, 9, 1, 1),
        "fc": (10, 10, 1, 1),
    }
    by_layer = {entry.layer: entry for entry in report}
    assert [entry.pattern for entry in report] == [*["filter"] * 4, "channel"]
    assert by_layer["fc"].reason_kept == "the network's output 'y' has them"
    assert by_layer["/conv2/Conv"].density_after == pytest.approx(0.25)
    norms = np.linalg.norm(_weights(model)["conv1"].reshape(16, -1), axis=1)
    largest = np.sort(np.argsort(norms)[-8:])
    assert (_weights(pruned)["conv1"] == _weights(model)["conv1"][largest]).all()


def test_filters_of_named_layers():
    asked = {"conv1": 0.25, "dw": 1.0}
    pruned, report = prune_model(_network(), density=0.5, pattern="filter", layer_density=asked)
    shapes = [weight.shape[:2] for weight in _weights(pruned).values()]
    assert shapes == [(4, 3), (18, 4), (18, 1), (10, 18), (10, 10)]
    reasons = {entry.layer: entry.reason_kept for entry in report}
    assert reasons["dw"] == reasons["/conv2/Conv"] == "density 1 was asked for"
    with pytest.raises(ValueError, match="fc can't be cut: the network's output 'y' has them"):
        prune_model(_network(), density=0.5, pattern="filter", layer_density={"fc": 0.5})
    with pytest.raises(ValueError, match="dw goes together with /conv2/Conv, dw: one density"):
        prune_model(
            _network(),
            density=0.5,
            pattern="filter",
            layer_density={"/conv2/Conv": 0.5, "dw": 0.25},
        )


def test_n_m_sets_the_density():
    pruned, _ = prune_model(_network(), pattern="1:4")
    assert find_pattern(_weights(pruned)["/conv2/Conv"]).density == 0.25
    with pytest.raises(ValueError, match=r"2:4 has density 0\.5, got 0\.1"):
        prune_model(_network(), pattern="2:4", density=0.1)
    _, report = prune_model(_network(), pattern="2:32")
    assert report[1].reason_kept == "16 input channels, 2:32 needs 32"


def test_layer_density_overrides_also_what_is_kept():
    asked = {"conv1": 0.5, "conv3": 1.0, "fc": 0.2}
    pruned, report = prune_model(_network(), density=0.1, layer_density=asked)
    density = {entry.layer: round(entry.density_after, 2) for entry in report}
    assert density == {"conv1": 0.5, "/conv2/Conv": 0.1, "dw": 1.0, "conv3": 1.0, "fc": 0.2}
    assert report[3].reason_kept == "density 1 was asked for"
    stored = {t.name: numpy_helper.to_array(t) for t in pruned.graph.initializer}["fc.weight"]
    assert stored.shape == (20, 10)
    assert (_weights(pruned)["fc"][:, :, 0, 0] == stored.T).all()


@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan")])
def test_densities_outside_are_refused(density):
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        prune_model(_network(), density=density)
    with pytest.raises(ValueError, match="density of conv3"):
        prune_model(_network(), density=0.5, layer_density={"conv3": density})


def test_wrong_arguments_say_what_is_right():
    with pytest.raises(ValueError, match="did you mean conv3"):
        prune_model(_network(), density=0.5, layer_density={"conv33": 0.5})
    with pytest.raises(ValueError, match="layers: conv1, /conv2/Conv"):
        prune_model(_network(), density=0.5, layer_density={"zzz": 0.5})
    for pattern in ("blocks", "4:2", "0:4", "N:M"):
        with pytest.raises(ValueError, match="N:M"):
            prune_model(_network(), density=0.5, pattern=pattern)
    with pytest.raises(ValueError, match="needs a density"):
        prune_model(_network())
    with pytest.raises(ValueError, match=r"2:4 allows 0\.5 or 1, got 0\.3"):
        prune_model(_network(), pattern="2:4", layer_density={"conv3": 0.3})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    model = _network()
    weight = _array(18, 16, 3, 3)
    weight[0, 0, 0, 0] = bad
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "conv2.weight"))
    with pytest.raises(ModelError, match="/conv2/Conv"):
        prune_model(model, density=0.5)
    with pytest.raises(ModelError, match="/conv2/Conv"):
        prune_model(model, density=0.5, pattern="filter")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_the_stored_type_stays(dtype):
    pruned, _ = prune_model(_network(dtype=dtype), density=0.1)
    onnx.checker.check_model(pruned)
    assert _weights(pruned)["conv3"].dtype == dtype
    assert find_pattern(_weights(pruned)["conv3"]).nnz == 36


def test_external_weights(tmp_path):
    onnx.save_model(
        _network(),
        tmp_path / "net.onnx",
        save_as_external_data=True,
        size_threshold=100,
        location="net.data",
        convert_attribute=False,
    )
    pruned, _ = prune_model(onnx.load(tmp_path / "net.onnx"), density=0.1)
    assert find_pattern(_weights(pruned)["/conv2/Conv"]).density == pytest.approx(0.1, abs=1e-3)
    unloaded = onnx.load(tmp_path / "net.onnx", load_external_data=False)
    with pytest.raises(ModelError, match="separate file"):
        prune_model(unloaded, density=0.1)


def _two_convs(second_weight="w", extra=()):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="one"),
        helper.make_node("Identity", ["w"], ["alias"]),
        helper.make_node("Conv", ["a", second_weight], ["y"], name="two"),
        *extra,
    ]
    graph = helper.make_graph(
        nodes,
        "shared",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 4, 4])],
        [numpy_helper.from_array(_array(8, 8, 1, 1), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])


@pytest.mark.parametrize("second_weight", ["w", "alias"])
def test_a_shared_weight_is_pruned_once(second_weight):
    model = _two_convs(second_weight)
    pruned, report = prune_model(model, density=0.25, layer_density={"two": 0.5})
    assert [(e.layer, e.density_after) for e in report] == [("one", 0.5)]
    assert (_weights(pruned)["one"] == _weights(pruned)["two"]).all()
    with pytest.raises(ValueError, match="shares its weight"):
        prune_model(model, density=0.25, layer_density={"one": 0.25, "two": 0.5})


def test_a_weight_that_another_operator_reads_is_kept():
    extra = [helper.make_node("Neg", ["w"], ["z"], name="negate")]
    _, report = prune_model(_two_convs(extra=extra), density=0.25)
    assert report[0].reason_kept == "its weight is also read by Neg negate"


@pytest.mark.parametrize("linear", [True, False])
def test_sparse_initializers_stay_sparse(linear):
    model = _two_convs()
    dense = _array(8, 8, 1, 1)
    dense[:4] = 0
    where = np.argwhere(dense) if not linear else np.flatnonzero(dense)
    values = numpy_helper.from_array(dense[dense != 0], "w")
    indices = numpy_helper.from_array(where.astype(np.int64), "w_indices")
    del model.graph.initializer[:]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, dense.shape))
    assert (_weights(model)["one"] == dense).all()
    pruned, report = prune_model(model, density=0.25)
    assert (report[0].density_before, report[0].density_after) == (0.5, 0.25)
    assert len(pruned.graph.sparse_initializer[0].values.float_data) in (0, 16)
    assert np.count_nonzero(_weights(pruned)["one"]) == 16
    onnx.checker.check_model(pruned)


def test_the_pruned_network_runs(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pruned, _ = prune_model(_network(), density=0.1)
    session = ort.InferenceSession(pruned.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": _array(2, 3, 8, 8)})
    assert y.shape == (2, 10)
    assert np.isfinite(y).all()
