"""Dynamic convolutions: found in ONNX files, fused with what follows, compiled."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.dynamic_models import draw_masks, dynamic_conv
from tests.graph_reference import outputs_of
from tests.models import Net, random_inputs, relative_error, run_onnx, worst_error
from topiarist.compiler.choose import workload_of
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Activation, Conv, DynamicConv, Graph
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.session import Session
from topiarist.compiler.simplify import simplify


def experts(net: Net, out: int, into: int, kernel: int = 3, **masks: int) -> np.ndarray:
    """Four random ones with masks."""
    kept = draw_masks(net.rng, (kernel, kernel), **({"union": 3, "holders": 2} | masks))
    drawn = net.rng.standard_normal((4, out, into, kernel, kernel), np.float32)
    return (drawn * kept[:, None, None] * 0.3).astype(np.float32)


def network(*, scattered: bool = False) -> onnx.ModelProto:
    """Batch norm, residual and ReLU behind dynamic layers; strides; one of 1x1."""
    net = Net(opset=17)
    x = net.node("Relu", net.conv(net.input("N", 3, 12, 12), 16, 3))
    first = experts(net, 16, 16)
    if scattered:
        first *= net.rng.random(first.shape) < 0.2
    y = dynamic_conv(net, x, first, (12, 12), name="first", pads=[1] * 4)
    y = net.node("Relu", net.batch_norm(y, 16))
    y = dynamic_conv(net, y, experts(net, 16, 16, union=4), (12, 12), pads=[1] * 4)
    y = net.node("Relu", net.node("Add", net.batch_norm(y, 16), x))
    y = dynamic_conv(net, y, experts(net, 24, 16), (6, 6), strides=[2, 2], pads=[1] * 4)
    y = dynamic_conv(net, y, experts(net, 8, 24, 1, union=1), (3, 3), strides=[2, 2])
    return net.model(net.node("Flatten", net.node("GlobalAveragePool", y)))


def dynamic_layers(graph: Graph) -> list[DynamicConv]:
    return [node for node in graph.nodes if isinstance(node, DynamicConv)]


def test_what_follows_is_fused() -> None:
    model = network()
    graph = extract_layers(import_model(model, batch=3))
    first, second, third, last = dynamic_layers(graph)
    assert first.name == "first" and first.residual is None
    assert first.activation == second.activation == Activation(0.0)
    assert second.residual == graph.consumers(graph.inputs[0])[0].output
    assert third.strides == (2, 2) and third.activation is None
    assert last.experts.shape == (4, 8, 24, 1, 1)
    assert first.bias.any() and not third.bias.any()
    assert set(graph.values) >= {name for node in graph.nodes for name in node.inputs}
    inputs = random_inputs(model, batch=3)
    assert worst_error(outputs_of(graph, inputs), run_onnx(model, inputs)) < 1e-5


def test_the_workload_says_who_has_which_position() -> None:
    net = Net(opset=17)
    kernels = np.zeros((2, 4, 4, 3, 3), np.float32)
    kernels[0, :, :, 0, 1] = 1
    kernels[:, :, :, 2, 2] = 1
    model = net.model(dynamic_conv(net, net.input(1, 4, 8, 8), kernels, (6, 6)))
    graph = extract_layers(import_model(model))
    workload = workload_of(dynamic_layers(graph)[0], graph)
    assert workload.mixture is not None and workload.mixture.experts == 2
    assert workload.mixture.holders == ((), (0,), (), (), (), (), (), (), (0, 1))
    assert workload.sparsity.density == pytest.approx(2 / 9, abs=1e-3) and not workload.scattered


def test_targets_without_such_kernels_keep_the_layers() -> None:
    model = network()
    graph = extract_layers(import_model(model, batch=2), dynamic=False)
    assert not dynamic_layers(graph)
    inputs = random_inputs(model, batch=2)
    assert worst_error(outputs_of(graph, inputs), run_onnx(model, inputs)) < 1e-5


@pytest.mark.parametrize("what", ["read twice", "an output", "other axis", "one share for all"])
def test_what_looks_alike_is_left_as_it_is(what: str) -> None:
    """And gives the same results."""
    net = Net(opset=17)
    shares = net.constant(net.rng.random((1, 2, 4), np.float32))
    shares = net.node("Mul", net.input(1, 2, 4, name="shares"), shares)
    x = net.input(1, 4, 8, 8)
    y = dynamic_conv(net, x, experts(net, 4, 4)[:2], (6, 6), shares=shares)
    outputs = [y]
    product = next(node for node in net.nodes if node.op_type == "Mul" and node.output[0] != shares)
    if what == "read twice":
        conv = next(node for node in net.nodes if node.op_type == "Conv")
        outputs.append(net.node("Relu", conv.output[0]))
    elif what == "an output":
        outputs.append(product.output[0])
    elif what == "other axis":
        net.nodes[-1].input[1] = net.constant(np.array([2]))
    else:
        product.input[1] = net.constant(net.rng.random((1, 2, 1, 1, 1), np.float32))
    model = net.model(*outputs)
    graph = extract_layers(import_model(model))
    assert not dynamic_layers(graph) and any(isinstance(node, Conv) for node in graph.nodes)
    inputs = random_inputs(model)
    assert worst_error(outputs_of(graph, inputs), run_onnx(model, inputs)) < 1e-5


def test_one_output_pixel_stays_a_convolution() -> None:
    net = Net(opset=17)
    model = net.model(dynamic_conv(net, net.input(2, 4, 3, 3), experts(net, 4, 4), (1, 1)))
    graph = simplify(extract_layers(import_model(model)))
    assert len(dynamic_layers(graph)) == 1
    inputs = random_inputs(model)
    assert worst_error(outputs_of(graph, inputs), run_onnx(model, inputs)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scattered", [False, True])
def test_compiled_networks_agree_with_onnx_runtime(tmp_path, batch: int, scattered: bool) -> None:
    """Nothing leaks from one image of a batch to another: their kernels differ."""
    model = network(scattered=scattered)
    inputs = random_inputs(model, batch=3)
    onnx.save(model, tmp_path / "model.onnx")
    compiled = compile_model(
        tmp_path / "model.onnx", batch=batch, output=tmp_path / "b.topi", measure=False
    )
    kernels = {layer.layer: layer.kernel for layer in compiled.layers}
    assert ("sparse" in kernels["first"]) == scattered
    assert list(kernels.values()).count("dynamic_conv") == 4 - scattered
    session = Session(tmp_path / "b.topi")
    parts = [session.run(None, {"x": part})[0] for part in np.split(inputs["x"], 3 // batch)]
    assert relative_error(np.concatenate(parts), run_onnx(model, inputs)[0]) < 1e-5


def test_measuring_chooses_and_strict_repeats(tmp_path) -> None:
    """Records of dynamic layers answer for them, and a dense build has them, too."""
    net = Net(opset=17)
    model = net.model(
        dynamic_conv(net, net.input(2, 8, 8, 8), experts(net, 8, 8), (8, 8), pads=[1] * 4)
    )
    log = tmp_path / "log.jsonl"
    first = compile_model(model, log=log)
    again = compile_model(model, log=log, strict=True)
    dense = compile_model(model, log=log, dense=True)
    chosen = [[layer.kernel for layer in c.layers] for c in (first, again, dense)]
    assert all("dynamic_conv" in kernels for kernels in chosen)
