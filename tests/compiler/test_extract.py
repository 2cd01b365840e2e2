"""The graph has the layers that a user would name, with their epilogues fused, and no others."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tvm import relax

from tests.graph_reference import evaluate, outputs_of
from tests.models import Net, random_inputs, relative_error, run_onnx
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model, load_onnx
from topiarist.compiler.graph import Activation, Add, Affine, Conv, Graph, Linear, Opaque
from topiarist.compiler.light_models import light_model, light_names
from topiarist.compiler.relax_calls import operator_of
from topiarist.errors import ModelError
from topiarist.pruning.layers import weighted_layers

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
HUGE = ["bvlc_alexnet", "vgg19", "zfnet512"]
RELU = Activation(low=0.0)


def extract(model: onnx.ModelProto | Path) -> Graph:
    graph = extract_layers(import_model(model))
    check_consistent(graph)
    return graph


@functools.cache
def light_graph(name: str) -> Graph:
    return extract(light_model(name))


def check_consistent(graph: Graph) -> None:
    """Topological order, all values known, all names different, types on opaque calls."""
    assert all(node.call.ty is not None for node in graph.nodes if isinstance(node, Opaque))
    known = set(graph.inputs)
    for node in graph.nodes:
        assert set(node.inputs) <= known, node.name
        assert node.output not in known, node.name
        known.add(node.output)
    assert set(graph.outputs) <= known == set(graph.values)
    assert all(name == value.name for name, value in graph.values.items())
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


def kinds(graph: Graph) -> dict[str, int]:
    return dict(Counter(type(node).__name__ for node in graph.nodes))


def convs(graph: Graph) -> list[Conv]:
    return [node for node in graph.nodes if isinstance(node, Conv)]


def opaque_operators(graph: Graph) -> dict[str, int]:
    return dict(Counter(operator_of(n.call) for n in graph.nodes if isinstance(n, Opaque)))


class TestFusion:
    def test_bias_norm_residual_and_activation(self) -> None:
        net = Net()
        x = net.input(1, 4, 8, 8)
        y = net.batch_norm(net.conv(x, 4, 4, name="block"), 4, name="norm")
        graph = extract(net.model(net.node("Relu", net.node("Add", x, y))))
        (conv,) = convs(graph)
        assert len(graph.nodes) == 1
        assert (conv.name, conv.residual, conv.activation) == ("block", "x", RELU)

    def test_the_later_of_two_convolutions_takes_the_residual(self) -> None:
        net = Net()
        x = net.input(1, 4, 8, 8)
        first, second = net.conv(x, 4, 4, name="first"), net.conv(x, 4, 4, name="second")
        graph = extract(net.model(net.node("Add", second, first)))
        assert [(c.name, c.residual is not None) for c in convs(graph)] == [
            ("first", False),
            ("second", True),
        ]

    def test_a_convolution_read_twice_keeps_its_own_output(self) -> None:
        net = Net()
        x = net.input(1, 4, 8, 8)
        raw = net.conv(x, 4, 4)
        y = net.node("Concat", net.node("Relu", raw), net.node("Add", raw, x), axis=1)
        graph = extract(net.model(y))
        assert kinds(graph) == {"Conv": 1, "Affine": 1, "Add": 1, "Concat": 1}
        assert convs(graph)[0].activation is None

    def test_a_convolution_that_is_an_output_keeps_its_own_output(self) -> None:
        net = Net()
        raw = net.conv(net.input(1, 4, 8, 8), 4, 4)
        assert kinds(extract(net.model(net.node("Relu", raw), raw))) == {"Conv": 1, "Affine": 1}

    def test_a_residual_after_the_activation_is_not_fused(self) -> None:
        net = Net()
        x = net.input(1, 4, 8, 8)
        graph = extract(net.model(net.node("Add", net.node("Relu", net.conv(x, 4, 4)), x)))
        assert kinds(graph) == {"Conv": 1, "Add": 1}

    def test_a_value_added_to_itself(self) -> None:
        net = Net()
        y = net.conv(net.input(1, 4, 8, 8), 4, 4)
        graph = extract(net.model(net.node("Relu", net.node("Add", y, y))))
        assert kinds(graph) == {"Conv": 1, "Add": 1}
        assert [node.activation for node in graph.nodes if isinstance(node, Add)] == [RELU]

    def test_broadcast_addition_is_opaque(self) -> None:
        net = Net()
        y = net.conv(net.input(1, 4, 8, 8), 4, 4)
        graph = extract(net.model(net.node("Add", y, net.node("GlobalAveragePool", y))))
        assert opaque_operators(graph) == {"add": 1}

    def test_clamps_are_composed(self) -> None:
        net = Net()
        y = net.node("Relu", net.conv(net.input(1, 4, 8, 8), 4, 4))
        y = net.node("Clip", y, net.constant(np.float32(-1)), net.constant(np.float32(6)))
        (conv,) = convs(extract(net.model(y)))
        assert conv.activation == Activation(0.0, 6.0)

    def test_a_norm_before_the_convolution_is_one_affine(self) -> None:
        net = Net()
        y = net.conv(net.node("Relu", net.batch_norm(net.input(1, 4, 8, 8), 4, name="norm")), 4, 4)
        affine, conv = extract(net.model(y)).nodes
        assert isinstance(affine, Affine) and isinstance(conv, Conv)
        assert affine.scale is not None and affine.shift is not None
        assert (affine.name, affine.activation) == ("norm", RELU)

    def test_fully_connected_layers_are_normalised(self) -> None:
        net = Net()
        y = net.node(
            "Flatten", net.node("GlobalAveragePool", net.conv(net.input(2, 3, 4, 4), 4, 3))
        )
        first = net.weight(6, 4, name="fc1.weight")
        second = net.weight(6, 5, name="fc2.weight")
        y = net.node("Relu", net.node("Gemm", y, first, net.weight(6), transB=1, name="Gemm_7"))
        y = net.node("Add", net.node("MatMul", y, second), net.weight(5))
        layers = [n for n in extract(net.model(y)).nodes if isinstance(n, Linear)]
        assert [(n.name, n.weight.shape) for n in layers] == [("fc1", (6, 4)), ("fc2", (5, 6))]
        assert [n.activation for n in layers] == [RELU, None]
        assert all(n.bias.any() for n in layers)

    def test_names_of_unnamed_layers_come_from_their_weights(self) -> None:
        net = Net()
        x = net.input(1, 3, 8, 8)
        y = net.conv(x, 4, 3, name="layer1.0.conv1")
        y = net.conv(y, 4, 4)
        model = net.model(y)
        model.graph.node[0].name = ""
        names = [conv.name for conv in convs(extract(model))]
        assert names == ["layer1.0.conv1", "conv_1"]

    def test_names_are_those_that_pruning_uses(self) -> None:
        model = light_model("resnet50")
        pruned = {layer.name for layer in weighted_layers(model)}
        assert pruned <= {node.name for node in light_graph("resnet50").nodes}

    def test_half_precision_is_refused(self) -> None:
        net = Net()
        x = net.input(1, 3, 8, 8, dtype=onnx.TensorProto.FLOAT16)
        weight = net.constant(np.ones((4, 3, 3, 3), np.float16))
        with pytest.raises(ModelError, match="float32"):
            extract(net.model(net.node("Conv", x, weight, name="half")))


class TestForeignModules:
    """Modules that another importer made: no layer names, tuples, aliases, other layouts."""

    def build(self, emit: Callable[[Any, Any], Any]) -> Graph:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((1, 4, 6, 6), "float32"))
        with builder.function("main", params=[x]):
            with builder.dataflow():
                result = builder.emit_output(emit(builder, x))
            builder.emit_func_output(result)
        graph = extract_layers(builder.get())
        check_consistent(graph)
        return graph

    def test_names(self) -> None:
        weight = relax.const(np.ones((4, 4, 1, 1), np.float32))

        def two_convolutions(builder: Any, x: Any) -> Any:
            y = builder.emit(relax.op.nn.conv2d(x, weight))
            return builder.emit(relax.op.nn.conv2d(y, weight))

        graph = self.build(two_convolutions)
        assert [node.name for node in graph.nodes] == ["conv2d", "conv2d_2"]
        assert (graph.inputs, graph.outputs) == (("x",), ("output",))

    def test_several_results(self) -> None:
        def split(builder: Any, x: Any) -> Any:
            halves = builder.emit(relax.op.split(x, 2, axis=1))
            return builder.emit(relax.TupleGetItem(halves, 1))

        with pytest.raises(ModelError, match="split"):
            self.build(split)

    def test_tuples_and_aliases(self) -> None:
        def through_tuple(builder: Any, x: Any) -> Any:
            y = builder.emit(relax.op.nn.relu(x))
            both = builder.emit(relax.Tuple([y, x]))
            again = builder.emit(relax.TupleGetItem(both, 0))
            return builder.emit(relax.op.sigmoid(again))

        graph = self.build(through_tuple)
        assert kinds(graph) == {"Affine": 1, "Opaque": 1}
        array = np.linspace(-1, 1, 144, dtype=np.float32).reshape(1, 4, 6, 6)
        (found,) = outputs_of(graph, {"x": array})
        assert np.allclose(found, 1 / (1 + np.exp(-np.maximum(array, 0))))

    def test_another_layout_is_opaque(self) -> None:
        weight = relax.const(np.ones((4, 6, 1, 1), np.float32))

        def channels_last(builder: Any, x: Any) -> Any:
            return builder.emit(relax.op.nn.conv2d(x, weight, data_layout="NHWC"))

        assert kinds(self.build(channels_last)) == {"Opaque": 1}


def test_light_models_are_reproducible() -> None:
    one, same, other = (light_model("squeezenet", seed) for seed in (0, 0, 1))
    assert one.SerializeToString() == same.SerializeToString() != other.SerializeToString()


def test_unknown_light_model() -> None:
    with pytest.raises(ModelError, match="resnet50"):
        light_model("resnet51")


class TestLightModels:
    def test_names(self) -> None:
        assert len(light_names()) == 9

    def test_resnet50(self) -> None:
        graph = light_graph("resnet50")
        assert kinds(graph) == {
            "Conv": 53,
            "Pool": 1,
            "GlobalPool": 1,
            "View": 1,
            "Linear": 1,
            "Opaque": 1,
        }
        assert sum(conv.residual is not None for conv in convs(graph)) == 16
        assert sum(conv.activation == RELU for conv in convs(graph)) == 49
        assert opaque_operators(graph) == {"nn.softmax": 1}
        assert [conv.name for conv in convs(graph)][:2] == ["gpu_0/conv1", "gpu_0/res2_0_branch2a"]

    def test_squeezenet(self) -> None:
        graph = light_graph("squeezenet")
        assert kinds(graph) == {
            "Conv": 26,
            "Pool": 3,
            "Concat": 8,
            "GlobalPool": 1,
            "View": 2,
            "Opaque": 1,
        }
        assert all(conv.activation == RELU for conv in convs(graph))

    def test_densenet(self) -> None:
        graph = light_graph("densenet121")
        assert kinds(graph) == {"Conv": 121, "Pool": 4, "Affine": 62, "Concat": 58, "GlobalPool": 1}
        assert not opaque_operators(graph)

    def test_shufflenet(self) -> None:
        graph = light_graph("shufflenet")
        assert opaque_operators(graph) == {"permute_dims": 16, "nn.softmax": 1}
        assert sum(conv.residual is not None for conv in convs(graph)) == 13
        assert {conv.groups for conv in convs(graph)} == {1, 4, 112, 136, 272, 544}

    @pytest.mark.parametrize("name", ["inception_v1", "inception_v2"])
    def test_inception(self, name: str) -> None:
        graph = light_graph(name)
        assert len(convs(graph)) == {"inception_v1": 57, "inception_v2": 69}[name]
        assert all(conv.activation == RELU for conv in convs(graph))

    @pytest.mark.parametrize("name", sorted({*light_names()} - {*HUGE}))
    def test_results(self, name: str) -> None:
        check_results(light_model(name), light_graph(name))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", HUGE)
    def test_huge_fully_connected_layers(self, name: str) -> None:
        graph = extract(light_model(name))
        check_results(light_model(name), graph)
        assert sum(isinstance(node, Linear) for node in graph.nodes) == 3


def check_results(model: onnx.ModelProto, graph: Graph) -> None:
    """Compare with ONNX Runtime, before a softmax: random weights make one of nearly 0 and 1."""
    shorter = onnx.ModelProto()
    shorter.CopyFrom(model)
    result = graph.outputs[0]
    last = shorter.graph.node[-1]
    if last.op_type == "Softmax":
        shorter.graph.output[0].name = last.input[0]
        shorter.graph.output[0].type.tensor_type.ClearField("shape")
        del shorter.graph.node[-1]
        softmax = next(node for node in graph.nodes if node.name.startswith("softmax"))
        result = softmax.inputs[0]
    inputs: dict[str, Any] = random_inputs(model)
    found = evaluate(graph, inputs)[result]
    (expected,) = run_onnx(shorter, inputs)
    assert relative_error(found.reshape(expected.shape), expected) < 1e-5


@pytest.mark.shared_data
class TestTrainedNetworks:
    @pytest.mark.parametrize(
        ("name", "layers", "residuals"),
        [
            ("cifar10_mlperftiny_resnet8", 9, 3),
            ("cifar10_resnet20", 19, 9),
            ("imagenet_mobilenet_v2_1.0_224", 53, 10),
            ("imagenet_squeezenet1.0_pruned", 26, 0),
        ],
    )
    def test_layers_and_results(self, name: str, layers: int, residuals: int) -> None:
        path = SHARED / f"{name}.onnx"
        if not path.is_file():
            pytest.skip(f"needs {path}")
        graph = extract(path)
        assert len(convs(graph)) == layers
        assert sum(conv.residual is not None for conv in convs(graph)) == residuals
        assert set(opaque_operators(graph)) <= {"nn.pad", "strided_slice"}
        check_results(load_onnx(path), graph)
