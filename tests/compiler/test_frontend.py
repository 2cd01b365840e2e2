"""Models of every kind are imported with their meaning unchanged, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.graph_reference import outputs_of, run_module
from tests.models import Net, random_inputs, run_onnx, worst_error
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model, load_onnx
from topiarist.errors import ModelError

TOLERANCE = 1e-5
NEWEST = onnx.defs.onnx_opset_version()


def assert_same(
    model: onnx.ModelProto,
    *,
    compiled: bool = False,
    batch: int = 1,
    reference: onnx.ModelProto | None = None,
) -> None:
    """The extracted layers, and where asked TVM's own build, compute what ONNX Runtime does."""
    inputs = random_inputs(model, batch)
    expected = run_onnx(reference or model, inputs)
    module = import_model(model, batch=batch if batch != 1 else None)
    assert worst_error(outputs_of(extract_layers(module), inputs), expected) < TOLERANCE
    if compiled:
        assert worst_error(run_module(module, list(inputs.values())), expected) < TOLERANCE


def small_net(opset: int = 13, **conv: Any) -> onnx.ModelProto:
    net = Net(opset)
    y = net.node("Relu", net.conv(net.input(1, 4, 9, 11), 6, 4, **conv))
    return net.model(y)


def classifier(opset: int, batch: int | str = 1) -> onnx.ModelProto:
    """Conv, batch norm, relu, residual, pool, fully connected: the operators of every opset."""
    net = Net(opset)
    x = net.input(batch, 3, 12, 12)
    a = net.node("Relu", net.batch_norm(net.conv(x, 8, 3, name="stem"), 8))
    b = net.batch_norm(net.conv(a, 8, 8, name="block"), 8)
    y = net.node("Relu", net.node("Add", b, a))
    y = net.node("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = net.node("Flatten", net.node("GlobalAveragePool", y))
    y = net.node("Gemm", y, net.weight(5, 8), net.weight(5), transB=1, alpha=0.5, beta=2.0)
    return net.model(net.node("Softmax", y, axis=1))


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 18, 21, NEWEST])
def test_opsets(opset: int) -> None:
    # ONNX Runtime may be behind the onnx package.
    reference = classifier(min(opset, 21))
    assert_same(classifier(opset), compiled=opset in (7, 13, NEWEST), reference=reference)


@pytest.mark.parametrize(
    "conv",
    [
        {"kernel": 3},
        {"kernel": 1},
        {"kernel": 5, "pads": [2, 1, 0, 3]},
        {"strides": [2, 2]},
        {"strides": [2, 1], "kernel": 3, "pads": [0, 0, 1, 1]},
        {"dilations": [2, 2]},
        {"group": 2},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
        {"auto_pad": "SAME_LOWER", "kernel": 4},
        {"auto_pad": "VALID"},
    ],
    ids=str,
)
def test_convolutions(conv: dict[str, Any]) -> None:
    assert_same(small_net(**conv))


def test_depthwise() -> None:
    net = Net()
    y = net.conv(net.input(1, 6, 8, 8), 6, 6, group=6, strides=[2, 2])
    assert_same(net.model(y), compiled=True)


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "pool",
    [
        {},
        {"strides": [2, 2]},
        {"strides": [2, 2], "ceil_mode": 1},
        {"strides": [2, 3], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
        {"strides": [3, 3], "ceil_mode": 1, "pads": [0, 1, 1, 0]},
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
    ],
    ids=str,
)
def test_pools(operator: str, pool: dict[str, Any]) -> None:
    net = Net(13)
    y = net.conv(net.input(1, 3, 10, 13), 4, 3)
    assert_same(net.model(net.node(operator, y, kernel_shape=[3, 3], **pool)))


@pytest.mark.parametrize("ceil_mode", [0, 1])
def test_average_pool_that_counts_its_padding(ceil_mode: int) -> None:
    net = Net(13)
    y = net.conv(net.input(1, 3, 10, 13), 4, 3)
    attributes = {"count_include_pad": 1, "ceil_mode": ceil_mode, "strides": [2, 3]}
    y = net.node("AveragePool", y, kernel_shape=[3, 3], pads=[1, 1, 1, 1], **attributes)
    assert_same(net.model(y))


def test_dilated_pool() -> None:
    net = Net(13)
    y = net.conv(net.input(1, 3, 10, 13), 4, 3)
    assert_same(net.model(net.node("MaxPool", y, kernel_shape=[2, 2], dilations=[2, 2])))


@pytest.mark.parametrize("opset", [9, 11, 13])
@pytest.mark.parametrize("bounds", [(0.0, 6.0), (0.0, None), (None, 0.5), (-0.5, 0.5)])
def test_clip(opset: int, bounds: tuple[float | None, float | None]) -> None:
    net = Net(opset)
    y = net.conv(net.input(1, 3, 8, 8), 4, 3)
    if opset < 11:
        given = {k: v for k, v in zip(("min", "max"), bounds, strict=True) if v is not None}
        y = net.node("Clip", y, **given)
    else:
        inputs = ["" if b is None else net.constant(np.float32(b)) for b in bounds]
        y = net.node("Clip", y, *inputs)
    assert_same(net.model(y))


Build = Callable[[Net, str], str]


def _pad(mode: str, opset_18: bool = False) -> Build:
    def build(net: Net, y: str) -> str:
        if net.opset < 11:
            return net.node("Pad", y, pads=[0, 0, 1, 2, 0, 0, 0, 1], mode=mode)
        pads = net.constant(np.array([0, 0, 1, 2, 0, 0, 0, 1]))
        return net.node("Pad", y, pads, mode=mode)

    return build


def _shape_arithmetic(net: Net, y: str) -> str:
    """What exporters write for x.view(x.size(0), -1)."""
    first = net.node("Gather", net.node("Shape", y), net.constant(np.int64(0)), axis=0)
    batch = net.node("Unsqueeze", first, net.constant(np.array([0])))
    rest = net.node("Constant", value=numpy_helper.from_array(np.array([-1])))
    return net.node("Reshape", y, net.node("Concat", batch, rest, axis=0))


def _resize(net: Net, y: str) -> str:
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    return net.node("Resize", y, "", scales, mode="nearest")


def _upsample(net: Net, y: str) -> str:
    return net.node("Upsample", y, net.constant(np.array([1, 1, 2, 2], np.float32)))


def _slice_1(net: Net, y: str) -> str:
    return net.node("Slice", y, starts=[1, 0], ends=[3, 100], axes=[1, 2])


def _hard_swish(net: Net, y: str) -> str:
    return net.node("Mul", y, net.node("HardSigmoid", y, alpha=1 / 6, beta=0.5))


def _squeeze_excite(net: Net, y: str) -> str:
    gate = net.node("ReduceMean", y, axes=[2, 3], keepdims=1)
    gate = net.node("Sigmoid", net.conv(gate, 4, 4, kernel=1))
    return net.node("Mul", y, gate)


def _preprocessing(net: Net, y: str) -> str:
    y = net.node("Sub", y, net.constant(net.rng.random((1, 4, 1, 1)).astype("f")))
    y = net.node("Div", y, net.constant(net.rng.random((4, 1, 1)).astype("f") + 1))
    return net.node("Sub", net.constant(np.float32(1)), y)


def _split(net: Net, y: str) -> str:
    first, second = net.nodes_of("Split", y, count=2, axis=1)
    return net.node("Concat", second, first, axis=1)


def _split_11(net: Net, y: str) -> str:
    first, second = net.nodes_of("Split", y, count=2, axis=1, split=[1, 3])
    return net.node("Concat", second, first, axis=1)


def _top_k(net: Net, y: str) -> str:
    values, indices = net.nodes_of("TopK", y, net.constant(np.array([3])), count=2, axis=1)
    return net.node("Add", values, net.node("Cast", indices, to=TensorProto.FLOAT))


def _dropout(net: Net, y: str) -> str:
    return net.node("Identity", net.node("Dropout", y))


def _mean(net: Net, y: str) -> str:
    return net.node("ReduceMean", y, axes=[-1, -2], keepdims=0)


def _sum(net: Net, y: str) -> str:
    return net.node("Sum", y, net.node("Relu", y), y)


def _max(net: Net, y: str) -> str:
    return net.node("Max", y, net.node("Neg", y), net.constant(np.float32(0.3)))


def _lrn(size: int) -> Build:
    return lambda net, y: net.node("LRN", y, size=size, alpha=0.5, beta=0.6, bias=1.5)


def _unary(operator: str, **attributes: Any) -> Build:
    return lambda net, y: net.node(operator, y, **attributes)


def _prelu(net: Net, y: str) -> str:
    return net.node("PRelu", y, net.weight(4, 1, 1))


def _transposed_conv(net: Net, y: str) -> str:
    weight = net.weight(4, 3, 3, 3)
    return net.node("ConvTranspose", y, weight, net.weight(3), strides=[2, 2], pads=[1, 1, 1, 1])


def _matmul(net: Net, y: str) -> str:
    y = net.node("Flatten", net.node("GlobalAveragePool", y))
    return net.node("Add", net.node("MatMul", y, net.weight(4, 7)), net.weight(7))


def _linear_and_norm(net: Net, y: str) -> str:
    return net.node("Relu", net.batch_norm(_matmul(net, y), 7))


def _gemm_plain(net: Net, y: str) -> str:
    y = net.node("Flatten", net.node("GlobalAveragePool", y))
    return net.node("Gemm", y, net.weight(4, 7))


def _norm_shared(net: Net, y: str) -> str:
    """The raw convolution has a second reader, so the batch norm can't be folded into it."""
    return net.node("Concat", net.batch_norm(y, 4), y, axis=1)


def _dynamic_kernel(net: Net, y: str) -> str:
    kernel = net.node("Reshape", y, net.constant(np.array([-1, 4, 1, 1])))
    return net.node("Conv", y, kernel)


def _quantized(net: Net, y: str) -> str:
    """Activations and weights through int8, as quantization-aware exporters write it."""
    scale, zero = net.constant(np.float32(0.05)), net.constant(np.int8(3))
    y = net.node("DequantizeLinear", net.node("QuantizeLinear", y, scale, zero), scale, zero)
    weight = net.constant(net.rng.integers(-99, 99, (5, 4, 3, 3)).astype(np.int8))
    scales = net.constant(net.rng.uniform(0.001, 0.01, 5).astype(np.float32))
    weight = net.node(
        "DequantizeLinear", weight, scales, net.constant(np.zeros(5, np.int8)), axis=0
    )
    return net.node("Conv", y, weight)


def _along_width(net: Net, y: str) -> str:
    """A 1-D convolution over rows."""
    y = net.node("Reshape", y, net.constant(np.array([0, 0, -1])))
    return net.node("Conv", y, net.weight(6, 2, 3), net.weight(6), group=2, auto_pad="SAME_UPPER")


def _three_dimensional(net: Net, y: str) -> str:
    y = net.node("Reshape", y, net.constant(np.array([1, 1, 4, 6, 7])))
    y = net.node("Conv", y, net.weight(2, 1, 3, 3, 3), strides=[1, 2, 2])
    return net.node("MaxPool", y, kernel_shape=[2, 1, 1])


CASES: list[tuple[str, int, Build]] = [
    ("pad-2", 9, _pad("constant")),
    ("pad-constant", 13, _pad("constant")),
    ("pad-reflect", 13, _pad("reflect")),
    ("pad-edge", 13, _pad("edge")),
    ("pad-wrap", 19, _pad("wrap")),
    ("shape-arithmetic", 13, _shape_arithmetic),
    ("resize", 13, _resize),
    ("upsample-9", 9, _upsample),
    ("slice-1", 9, _slice_1),
    ("hard-swish", 13, _hard_swish),
    ("hard-swish-14", 14, _unary("HardSwish")),
    ("squeeze-excite", 13, _squeeze_excite),
    ("preprocessing", 13, _preprocessing),
    ("split", 13, _split),
    ("split-11", 11, _split_11),
    ("top-k", 13, _top_k),
    ("dropout", 13, _dropout),
    ("mean", 13, _mean),
    ("sum", 13, _sum),
    ("max", 13, _max),
    ("lrn-5", 13, _lrn(5)),
    ("leaky-relu", 13, _unary("LeakyRelu", alpha=0.2)),
    ("elu", 13, _unary("Elu", alpha=0.7)),
    ("softmax-11", 11, _unary("Softmax", axis=2)),
    ("transpose", 13, _unary("Transpose", perm=[0, 2, 3, 1])),
    ("depth-to-space", 13, _unary("DepthToSpace", blocksize=2)),
    ("global-max-pool", 13, _unary("GlobalMaxPool")),
    (
        "instance-norm",
        13,
        lambda n, y: n.node("InstanceNormalization", y, n.weight(4), n.weight(4)),
    ),
    ("prelu", 13, _prelu),
    ("conv-transpose", 13, _transposed_conv),
    ("matmul", 13, _matmul),
    ("linear-and-norm", 13, _linear_and_norm),
    ("gemm-plain", 13, _gemm_plain),
    ("norm-shared", 13, _norm_shared),
    ("dynamic-kernel", 13, _dynamic_kernel),
    ("quantized", 13, _quantized),
    ("conv-1d", 13, _along_width),
    ("conv-3d", 13, _three_dimensional),
]


@pytest.mark.parametrize(("opset", "build"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_operators(opset: int, build: Build) -> None:
    net = Net(opset)
    y = net.conv(net.input(1, 3, 6, 7), 4, 3)
    assert_same(net.model(build(net, y)))


def test_no_opaque_padding_before_a_convolution() -> None:
    net = Net()
    pads = net.constant(np.array([0, 0, 1, 0, 0, 0, 2, 3]))
    y = net.conv(net.node("Pad", net.input(1, 3, 8, 8), pads), 4, 3, strides=[2, 2])
    model = net.model(y)
    assert_same(model)
    (conv,) = extract_layers(import_model(model)).nodes
    assert conv.padding == (2, 1, 3, 4)  # type: ignore[attr-defined]


def test_bytes_as_input() -> None:
    net = Net()
    x = net.node("Cast", net.input(1, 3, 8, 8, dtype=TensorProto.UINT8), to=TensorProto.FLOAT)
    x = net.node("Div", x, net.constant(np.float32(255)))
    model = net.model(net.conv(x, 4, 3))
    graph = extract_layers(import_model(model))
    assert graph.values["x"].dtype == "uint8"
    inputs = {"x": net.rng.integers(0, 255, (1, 3, 8, 8), np.uint8)}
    assert worst_error(outputs_of(graph, inputs), run_onnx(model, inputs)) < TOLERANCE


def test_several_inputs_and_outputs() -> None:
    net = Net()
    y = net.conv(net.input(1, 3, 8, 8, name="left"), 4, 3)
    z = net.conv(net.input(1, 3, 8, 8, name="right/in:0"), 4, 3)
    outputs = (net.node("Add", y, z), z, net.node("Identity", z), net.node("Identity", "left"), y)
    model = net.model(*outputs)
    graph = extract_layers(import_model(model))
    assert graph.inputs == ("left", "right/in:0")
    assert graph.outputs == outputs
    assert_same(model)


def test_a_slice_to_the_end_of_a_shape() -> None:
    """As PyTorch exports `unflatten`: the end is the largest int64, from a Constant node."""
    net = Net()
    y = net.conv(net.input(1, 3, 4, 5), 6, 3)
    start, end, split = (
        net.node("Constant", value=numpy_helper.from_array(np.array(values, np.int64)))
        for values in ([2], [np.iinfo(np.int64).max], [1, 3, -1])
    )
    shape = net.node("Concat", split, net.node("Slice", net.node("Shape", y), start, end), axis=0)
    y = net.node("ReduceSum", net.node("Reshape", y, shape), net.constant([1]), keepdims=0)
    assert_same(net.model(y))


class TestBatch:
    def test_a_dynamic_batch_becomes_one(self) -> None:
        graph = extract_layers(import_model(classifier(13, "N")))
        assert graph.values["x"].shape == (1, 3, 12, 12)

    def test_a_dynamic_batch_can_be_chosen(self) -> None:
        assert_same(classifier(13, "N"), batch=3)

    def test_a_fixed_batch_can_be_changed(self) -> None:
        model, changed = classifier(13, 1), classifier(13, 4)
        inputs = random_inputs(changed)
        found = outputs_of(extract_layers(import_model(model, batch=4)), inputs)
        assert worst_error(found, run_onnx(changed, inputs)) < TOLERANCE

    def test_a_batch_inside_a_reshape_follows(self) -> None:
        net = Net()
        y = net.conv(net.input(1, 3, 4, 4), 2, 3)
        y = net.node("Reshape", y, net.constant(np.array([1, 32])))
        graph = extract_layers(import_model(net.model(y), batch=5))
        assert graph.values[y].shape == (5, 32)

    def test_zero_is_refused(self) -> None:
        with pytest.raises(ModelError, match="at least 1"):
            import_model(classifier(13), batch=0)


class TestUnusualFiles:
    def test_weights_listed_as_inputs(self) -> None:
        model = classifier(9)
        for tensor in model.graph.initializer:
            shape = list(tensor.dims)
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
            model.graph.input.append(info)
        model.ir_version = 3
        assert extract_layers(import_model(model)).inputs == ("x",)

    @pytest.mark.parametrize("linear_indices", [True, False])
    def test_sparse_initializer(self, linear_indices: bool) -> None:
        dense_model = small_net()
        model = onnx.ModelProto()
        model.CopyFrom(dense_model)
        for candidate in (dense_model, model):
            weight = candidate.graph.initializer[0]
            array = numpy_helper.to_array(weight).copy()
            array[np.abs(array) < 0.2] = 0
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        indices = np.argwhere(array)
        if linear_indices:
            indices = np.flatnonzero(array)
        sparse = helper.make_sparse_tensor(
            numpy_helper.from_array(array[array != 0], model.graph.initializer[0].name),
            numpy_helper.from_array(indices.astype(np.int64), ""),
            array.shape,
        )
        del model.graph.initializer[0]
        model.graph.sparse_initializer.append(sparse)
        inputs = random_inputs(dense_model)
        found = outputs_of(extract_layers(import_model(model)), inputs)
        assert worst_error(found, run_onnx(dense_model, inputs)) < TOLERANCE

    def test_local_function(self) -> None:
        model = small_net()
        body = [helper.make_node("Relu", ["a"], ["b"])]
        opset = [helper.make_opsetid("", 13)]
        model.functions.append(helper.make_function("own", "Act", ["a"], ["b"], body, opset))
        model.opset_import.append(helper.make_opsetid("own", 1))
        model.graph.node[1].op_type, model.graph.node[1].domain = "Act", "own"
        assert_same(model)

    def test_external_data(self, tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        save_external(small_net(), path)
        inputs = random_inputs(small_net())
        found = outputs_of(extract_layers(import_model(path)), inputs)
        assert worst_error(found, run_onnx(small_net(), inputs)) < TOLERANCE


def save_external(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, path, save_as_external_data=True, location="net.bin", size_threshold=0)


def refused(path: str | Path | onnx.ModelProto) -> str:
    with pytest.raises(ModelError) as caught:
        import_model(path)
    return str(caught.value)


class TestRefusedFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no model file"):
            load_onnx(tmp_path / "none.onnx")

    def test_folder(self, tmp_path: Path) -> None:
        assert "folder" in refused(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x00\x01\x02" * 50])
    def test_not_onnx(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "net.onnx"
        path.write_bytes(content)
        assert "not an ONNX model" in refused(path)

    def test_name_that_is_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        content = small_net().SerializeToString()
        path.write_bytes(content.replace(b"Relu", b"Re\xffu"))
        assert "not UTF-8" in refused(path) or "not an ONNX model" in refused(path)

    @pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
    def test_truncated(self, tmp_path: Path, part: float) -> None:
        path = tmp_path / "net.onnx"
        content = classifier(13).SerializeToString()
        path.write_bytes(content[: int(len(content) * part)])
        assert refused(path)

    def test_external_data_missing(self, tmp_path: Path) -> None:
        save_external(small_net(), tmp_path / "net.onnx")
        (tmp_path / "net.bin").unlink()
        assert "no such file" in refused(tmp_path / "net.onnx")

    def test_external_data_truncated(self, tmp_path: Path) -> None:
        save_external(small_net(), tmp_path / "net.onnx")
        (tmp_path / "net.bin").write_bytes(b"1234")
        assert "truncated" in refused(tmp_path / "net.onnx")

    @pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin"])
    def test_external_data_outside(self, tmp_path: Path, location: str) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (tmp_path / "secret.bin").write_bytes(bytes(10_000))
        (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
        save_external(small_net(), folder / "net.onnx")
        model = onnx.load(folder / "net.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            tensor.external_data[0].value = location
        (folder / "net.onnx").write_bytes(model.SerializeToString())
        assert "outside the model's folder" in refused(folder / "net.onnx")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_bad_weight(self, value: float) -> None:
        model = small_net()
        weight = model.graph.initializer[0]
        array = numpy_helper.to_array(weight).copy()
        array[0, 0, 0, 0] = value
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        assert repr(weight.name) in refused(model)

    def test_broken_sparse_tensor(self) -> None:
        model = small_net()
        values = numpy_helper.from_array(np.ones(1, np.float32), model.graph.initializer[0].name)
        indices = numpy_helper.from_array(np.array([10**6]), "")
        sparse = helper.make_sparse_tensor(values, indices, list(model.graph.initializer[0].dims))
        del model.graph.initializer[0]
        model.graph.sparse_initializer.append(sparse)
        assert repr(values.name) in refused(model)

    def test_external_data_not_loaded(self, tmp_path: Path) -> None:
        save_external(small_net(), tmp_path / "net.onnx")
        assert "was not read" in refused(onnx.load(tmp_path / "net.onnx", load_external_data=False))

    def test_damaged_tensor(self) -> None:
        model = small_net()
        model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
        assert repr(model.graph.initializer[0].name) in refused(model)

    @pytest.mark.parametrize("opset", [6, NEWEST + 1])
    def test_opset(self, opset: int) -> None:
        assert f"opset {opset}" in refused(small_net(opset))


class TestRefusedModels:
    def test_no_convolution(self) -> None:
        net = Net()
        assert "no convolution" in refused(net.model(net.node("Relu", net.input(1, 3, 4, 4))))

    def test_custom_operator(self) -> None:
        net = Net()
        y = net.conv(net.input(1, 3, 8, 8), 4, 3)
        message = refused(net.model(net.node("Fancy", y, name="mine", domain="com.example")))
        assert "'mine'" in message and "Fancy" in message and "com.example" in message

    def test_unknown_standard_operator(self) -> None:
        net = Net(15)
        y = net.conv(net.input(1, 3, 8, 8), 4, 3)
        message = refused(net.model(net.node("Bernoulli", y, name="random")))
        assert "'random'" in message and "Bernoulli" in message

    def test_dynamic_height(self) -> None:
        net = Net()
        message = refused(net.model(net.conv(net.input(1, 3, "height", 8), 4, 3)))
        assert "'x'" in message and "height" in message

    def test_shape_that_does_not_fit(self) -> None:
        net = Net()
        y = net.conv(net.input(1, 3, 8, 8), 4, 3, name="first")
        assert "'second'" in refused(net.model(net.conv(y, 4, 5, name="second")))

    def test_window_larger_than_its_input(self) -> None:
        net = Net()
        wide = {"dilations": [3, 2], "pads": [1, 2, 1, 2], "name": "wide"}
        y = net.conv(net.input(1, 1, 4, 4), 1, 1, **wide)
        assert "'wide' has an empty output" in refused(net.model(y))

    def test_indices_of_a_pool(self) -> None:
        net = Net()
        y = net.conv(net.input(1, 3, 8, 8), 4, 3)
        outputs = net.nodes_of("MaxPool", y, count=2, kernel_shape=[2, 2], name="pool")
        model = net.model(*outputs)
        model.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
        assert "'pool'" in refused(model)

    def test_training_mode(self) -> None:
        net = Net(15)
        y = net.conv(net.input(1, 3, 8, 8), 4, 3)
        assert "model.eval()" in refused(net.model(net.batch_norm(y, 4, training_mode=1)))
