"""Single layers: our kernels in the layouts that they have inside a network, against engines.

The kernels are timed without moves at their ends; the other engines run a model of that one layer,
with dense weights for all they care, and pay for what they do at its ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.benchmarks import measure
from topiarist.compiler.choose import Candidate, Chooser, Plan
from topiarist.compiler.engines import OURS, Engine, open_engine
from topiarist.compiler.graph import Activation, Conv, FloatArray, Graph, Value
from topiarist.compiler.lower import lower
from topiarist.compiler.parts import Parts
from topiarist.compiler.runtime import ThreadPool
from topiarist.compiler.trial import Trial
from topiarist.pruning.masks import block_mask, unstructured_mask
from topiarist.schedules.kernels import conv_kernel
from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class Shape:
    """[1, channels, size, size] -> [1, filters, size, size], kernel x kernel."""

    channels: int
    size: int
    filters: int
    kernel: int
    groups: int = 1


RESNET50 = {
    "L1": Shape(64, 56, 64, 3),
    "L2": Shape(128, 28, 128, 3),
    "L3": Shape(256, 14, 256, 3),
    "L4": Shape(512, 7, 512, 3),
    "L5": Shape(256, 56, 64, 1),
    "L6": Shape(1024, 14, 256, 1),
    "L7": Shape(2048, 7, 512, 1),
}
ALEXNET = {
    "conv2": Shape(96, 27, 256, 5, groups=2),
    "conv3": Shape(256, 13, 384, 3),
    "conv4": Shape(384, 13, 384, 3, groups=2),
    "conv5": Shape(384, 13, 256, 3, groups=2),
}


def weights(shape: Shape, pattern: str, density: float) -> FloatArray:
    """Seeded He weights, pruned by magnitude."""
    size = (shape.filters, shape.channels // shape.groups, shape.kernel, shape.kernel)
    dense = np.random.default_rng(0).standard_normal(size)
    weight = (dense * np.sqrt(2 / dense[0].size)).astype(np.float32)
    if density == 1:
        return weight
    mask = block_mask if pattern == "block4x1" else unstructured_mask
    return np.where(mask(np.abs(weight), density), weight, 0).astype(np.float32)


def time_layer(
    shape: Shape, weight: FloatArray, target: TargetSpec, seconds: float
) -> tuple[measure.Ratio, dict[str, Any]]:
    """The best engine's time over our fastest kernel's, and the details."""
    contest = Contest(shape, weight, target)
    others = measure.rivals()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "layer.onnx"
        onnx.save(_one_layer(shape, weight), model)
        size = (1, shape.channels, shape.size, shape.size)
        feeds = {"x": np.random.default_rng(1).standard_normal(size, np.float32)}
        rivals = [open_engine(name, model, feeds, 1) for name in others]
    samples = measure.in_turns([contest.engine(OURS, contest.fastest()), *rivals], seconds)
    flops = 2 * int(np.count_nonzero(weight)) * shape.size**2
    median = float(np.median(samples[OURS]))
    details = {
        "density": np.count_nonzero(weight) / weight.size,
        "kernel": str(contest.fastest()),
        "gflops_on_nonzeros": flops / median / 1e9,
        "engines": measure.summary(samples),
    }
    return measure.over_best(samples, OURS, others), details


class Contest:
    """All kernels of one layer, timed alone by the compiler, and any of them to run again."""

    def __init__(self, shape: Shape, weight: FloatArray, target: TargetSpec) -> None:
        self.graph = graph_of(shape, weight)
        self.parts = Parts(target, 1)
        self.plan: Plan = Chooser(
            self.graph, self.parts, dense=False, mode="measure", progress=lambda *_: None
        ).plans()[0]
        self.pool = ThreadPool(1)

    def fastest(self, accepts: Callable[[str], bool] = lambda kernel: True) -> Candidate | None:
        """The fastest candidate of the kernels whose name is accepted, None without one."""
        timed = self.plan.choices["layer"].timed
        return next((c for c in timed if accepts(c.kernel)), None)

    def engine(self, name: str, candidate: Candidate) -> Engine:
        """The candidate's call inside its program."""
        choice = replace(self.plan.choices["layer"], chosen=candidate)
        program = lower(self.graph, replace(self.plan, choices={"layer": choice}), self.parts)
        at = [call.layer for call in program.calls].index("layer")
        runnable = Trial(self.parts).prepare(program)
        for function, args in runnable.calls:
            self.pool.call(lambda f=function, a=args: f(*a))
        function, args = runnable.calls[at]
        held = runnable.held
        return Engine(name, 1, "", lambda: function(*args) if held else None)


def is_sparse(kernel: str) -> bool:
    """Whether a convolution kernel of ours skips zeros."""
    return conv_kernel(kernel).sparse


def is_winograd(kernel: str) -> bool:
    """Whether a dense kernel of ours saves multiplications by transforming."""
    return "winograd" in kernel


def is_direct_dense(kernel: str) -> bool:
    """Whether a kernel of ours multiplies by all weights as they are."""
    return not is_sparse(kernel) and not is_winograd(kernel)


def crossing(densities: Sequence[float], speedups: Sequence[float]) -> float | None:
    """The largest density up to which the sparse kernel wins, None if it never does.

    Densities ascend; between two of them the speed-up is taken for linear in the logarithms.
    """
    wins = [i for i, speedup in enumerate(speedups) if speedup >= 1]
    if not wins:
        return None
    last = wins[-1]
    if last == len(densities) - 1:
        return densities[-1]
    x0, x1 = np.log(densities[last : last + 2])
    y0, y1 = np.log(speedups[last : last + 2])
    return float(np.exp(x0 + (x1 - x0) * y0 / (y0 - y1)))


def graph_of(shape: Shape, weight: FloatArray, batch: int = 1) -> Graph:
    """The layer between values that other layers write and read."""
    values = {
        "x": Value("x", (batch, shape.channels, shape.size, shape.size)),
        "y": Value("y", (batch, shape.filters, shape.size, shape.size)),
    }
    node = Conv(
        name="layer",
        inputs=("x",),
        output="y",
        weight=weight,
        bias=np.zeros(shape.filters, np.float32),
        padding=(shape.kernel // 2,) * 4,
        groups=shape.groups,
        activation=Activation(0.0),
    )
    return Graph((node,), values, ("x",), ("y",))


def _one_layer(shape: Shape, weight: FloatArray) -> onnx.ModelProto:
    """The layer as a model."""
    pads = [shape.kernel // 2] * 4
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=pads, group=shape.groups),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    size = [shape.size, shape.size]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, shape.channels, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, shape.filters, *size])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.zeros(shape.filters, np.float32), "b"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
