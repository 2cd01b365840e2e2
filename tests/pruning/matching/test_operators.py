"""Each operator against ONNX Runtime, and its gradient against differences in float64."""

import numpy as np
import pytest
from onnx import helper

from tests.models import Net, random_inputs, relative_error, run_onnx
from topiarist.errors import TrainingError
from topiarist.pruning.matching import convolution
from topiarist.pruning.matching.call import Call, Scratch
from topiarist.pruning.matching.network import Network
from topiarist.pruning.matching.operators import OPERATORS

SMALL = 1e-6
RNG = np.random.default_rng(0)


def _values(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def _ints(*values):
    return np.array(values, np.int64)


def _convolution(channels, out, kernel, size, groups=1, bias=True, **attributes):
    inputs = [_values(3, channels, *size), _values(out, channels // groups, *kernel)]
    return "Conv", [*inputs, _values(out)] if bias else inputs, {"group": groups, **attributes}


IMAGES = _values(2, 4, 7, 6)

CASES = {
    "conv": _convolution(4, 6, (3, 3), (7, 5), pads=[1] * 4),
    "conv without padding": _convolution(4, 6, (3, 2), (7, 5), bias=False),
    "conv with strides": _convolution(4, 6, (3, 3), (8, 7), strides=[2, 3], pads=[1] * 4),
    "conv with uneven pads": _convolution(3, 4, (3, 3), (6, 8), strides=[2, 2], pads=[0, 0, 1, 2]),
    "conv with wide pads": _convolution(3, 4, (2, 1), (5, 4), pads=[3, 2, 1, 2]),
    "conv with dilations": _convolution(3, 4, (3, 2), (9, 8), dilations=[2, 3], pads=[2, 1, 2, 1]),
    "conv of groups": _convolution(6, 9, (3, 3), (5, 5), groups=3, pads=[1] * 4),
    "conv of strided groups": _convolution(6, 4, (3, 3), (7, 7), groups=2, strides=[2, 2]),
    "conv that leaves rows unread": _convolution(3, 4, (1, 1), (6, 6), strides=[4, 4]),
    "conv, same": _convolution(3, 4, (3, 3), (7, 6), auto_pad="SAME_UPPER", strides=[2, 2]),
    "depthwise": _convolution(5, 5, (3, 3), (6, 7), groups=5, pads=[1] * 4),
    "depthwise with strides": _convolution(
        5, 5, (3, 2), (9, 7), groups=5, strides=[2, 2], dilations=[2, 1], pads=[0, 1, 2, 1]
    ),
    "depthwise, twice the channels": _convolution(3, 6, (3, 3), (5, 5), groups=3),
    "pointwise": _convolution(5, 7, (1, 1), (4, 6)),
    "pointwise of groups": _convolution(6, 4, (1, 1), (4, 6), groups=2),
    "conv 1-D": _convolution(4, 6, (3,), (9,), pads=[1, 2], strides=[2]),
    "depthwise 1-D": _convolution(4, 4, (3,), (9,), groups=4, pads=[1, 1]),
    "norm": (
        "BatchNormalization",
        [IMAGES, _values(4), _values(4), _values(4), np.abs(_values(4)) + 0.5],
        {"epsilon": 1e-3},
    ),
    "gemm": ("Gemm", [_values(3, 5), _values(5, 4), _values(4)], {}),
    "gemm, all else": (
        "Gemm",
        [_values(5, 3), _values(4, 5), _values(3, 1)],
        {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0},
    ),
    "gemm without bias": ("Gemm", [_values(3, 5), _values(5, 4)], {}),
    "matmul": ("MatMul", [_values(2, 3, 5), _values(5, 4)], {}),
    "add": ("Add", [IMAGES, _values(1, 4, 1, 6)], {}),
    "sum": ("Sum", [IMAGES, _values(6), _values(2, 4, 7, 6)], {}),
    "sub": ("Sub", [_values(4, 1, 1), IMAGES], {}),
    "mul": ("Mul", [IMAGES, _values(2, 4, 1, 1)], {}),
    "div": ("Div", [IMAGES, np.abs(_values(6)) + 1], {}),
    "relu": ("Relu", [IMAGES], {}),
    "leaky": ("LeakyRelu", [IMAGES], {"alpha": 0.3}),
    "clip": ("Clip", [IMAGES, np.float32(-0.2), np.float32(0.6)], {}),
    "sigmoid": ("Sigmoid", [IMAGES], {}),
    "tanh": ("Tanh", [IMAGES], {}),
    "hard sigmoid": ("HardSigmoid", [2 * IMAGES], {"alpha": 0.25}),
    "hard swish": ("HardSwish", [3 * IMAGES], {}),
    "max pool": ("MaxPool", [IMAGES], {"kernel_shape": [3, 2], "strides": [2, 1]}),
    "max pool with pads": (
        "MaxPool",
        [IMAGES],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1], "ceil_mode": 1},
    ),
    "max pool 1-D": ("MaxPool", [IMAGES[0]], {"kernel_shape": [2], "strides": [2]}),
    "average pool": ("AveragePool", [IMAGES], {"kernel_shape": [2, 3], "pads": [1, 1, 0, 1]}),
    "average pool, rounded up": (
        "AveragePool",
        [IMAGES],
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ),
    "average pool that counts pads": (
        "AveragePool",
        [IMAGES],
        {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
    ),
    "global average": ("GlobalAveragePool", [IMAGES], {}),
    "global max": ("GlobalMaxPool", [IMAGES], {}),
    "mean": ("ReduceMean", [IMAGES], {"axes": [2, -1], "keepdims": 0}),
    "mean of all": ("ReduceMean", [IMAGES], {}),
    "concat": ("Concat", [IMAGES, _values(2, 3, 7, 6)], {"axis": 1}),
    "flatten": ("Flatten", [IMAGES], {"axis": -2}),
    "reshape": ("Reshape", [IMAGES, _ints(0, -1, 3)], {}),
    "squeeze": ("Squeeze", [IMAGES[:1], _ints(0)], {}),
    "unsqueeze": ("Unsqueeze", [IMAGES, _ints(0, -1)], {}),
    "transpose": ("Transpose", [IMAGES], {"perm": [2, 0, 3, 1]}),
    "turned": ("Transpose", [IMAGES], {}),
    "pad": ("Pad", [IMAGES, _ints(0, 1, 2, 0, 0, 2, 0, 1), np.float32(0.5)], {}),
    "slice": ("Slice", [IMAGES, _ints(1, 0), _ints(-1, 99), _ints(2, 3), _ints(1, 2)], {}),
    "slice backwards": ("Slice", [IMAGES, _ints(-1), _ints(-99), _ints(2), _ints(-2)], {}),
    "identity": ("Identity", [IMAGES], {}),
    "dropout": ("Dropout", [IMAGES], {}),
}
FIXED = {"Clip": 1, "Pad": 1, "BatchNormalization": 3}  # the inputs from here on are constants


def _moving(operator, inputs):
    """The places of the inputs that have a gradient."""
    most = FIXED.get(operator, len(inputs))
    return [i for i, array in enumerate(inputs[:most]) if array.dtype == np.float32]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    _check(*CASES[name])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] == "Conv"])
def test_convolutions_in_small_pieces(name, monkeypatch):
    monkeypatch.setattr(convolution, "PIECE_BYTES", 300)
    _check(*CASES[name])


def _check(operator, inputs, attributes):
    """Forward and backward."""
    net = Net(opset=14)
    names = [net.constant(array) for array in inputs[1:]]
    x = net.input(*inputs[0].shape)
    model = net.model(net.node(operator, x, *names, **attributes))
    node, moving = model.graph.node[0], _moving(operator, inputs)
    (expected,) = run_onnx(model, {"x": inputs[0]})

    places = [i in moving for i in range(len(inputs))]
    scratch = Scratch()
    call = Call(node, tuple(places), scratch=scratch)
    function = OPERATORS[operator]
    found, _ = function(call, *inputs)
    assert found.dtype == np.float32
    assert relative_error(found, expected) < 2e-6

    exact = [a.astype(np.float64) if a.dtype == np.float32 else a for a in inputs]
    y, pull = function(call, *exact)
    slope = RNG.standard_normal(y.shape)
    copy = slope.copy()
    gradients = pull(slope)
    assert (slope == copy).all(), "other readers of the output have the same gradient"
    for place in moving:
        direction = RNG.standard_normal(exact[place].shape)
        ends = []
        for sign in (1, -1):
            moved = list(exact)
            moved[place] = exact[place] + sign * SMALL * direction
            ends.append(float((function(call, *moved)[0] * slope).sum()))
        assert gradients[place].shape == exact[place].shape
        along = float((gradients[place] * direction).sum())
        assert along == pytest.approx((ends[0] - ends[1]) / (2 * SMALL), rel=1e-5, abs=1e-6)


def test_there_is_no_gradient_for_images():
    net = Net()
    model = net.model(net.conv(net.input(1, 3, 5, 5), 4, 3))
    operator, inputs, attributes = CASES["conv"]
    node = helper.make_node(operator, ["x", "w", "b"], ["y"], **attributes)
    y, pull = OPERATORS["Conv"](Call(node, (False, True, True)), *inputs)
    assert pull(y)[0] is None
    assert len(Network(model, [model.graph.output[0].name]).parameters) == 2


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "reason"),
    [
        ("Conv", [_values(1, 2, 3, 3, 3), _values(4, 2, 1, 1, 1)], {}, "3 dimensions"),
        ("MaxPool", [_values(1, 2, 3, 3, 3)], {"kernel_shape": [1, 1, 1]}, "3 dimensions"),
        ("Pad", [IMAGES, _ints(*[0] * 8)], {"mode": "reflect"}, "constants"),
        ("Pad", [IMAGES, _ints(*[-1] * 8)], {}, "constants"),
        ("MatMul", [_values(3), _values(3, 2)], {}, "vector"),
    ],
)
def test_what_has_no_gradient_is_named(operator, inputs, attributes, reason):
    node = helper.make_node(operator, ["x"], ["y"], name="odd", **attributes)
    with pytest.raises(TrainingError, match=f"{operator} node 'odd': .*{reason}"):
        OPERATORS[operator](Call(node), *inputs)


def test_older_files_have_attributes_for_inputs():
    net = Net(opset=9)
    x = net.node("Slice", net.input(2, 4, 6, 6), axes=[2], starts=[1], ends=[5])
    x = net.node("Clip", net.node("Pad", x, pads=[0, 0, 1, 0, 0, 1, 0, 0]), min=-0.5, max=0.5)
    model = net.model(net.node("Unsqueeze", net.node("ReduceMean", x, axes=[1]), axes=[0]))
    inputs = random_inputs(model)
    (found,), _ = Network(model, [model.graph.output[0].name]).run(inputs, {})
    assert relative_error(found, run_onnx(model, inputs)[0]) < 1e-6
