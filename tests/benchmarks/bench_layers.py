"""How fast is each convolution kernel alone, against ONNX Runtime's dense layer?

The kernels are timed in the layouts that they have inside a network, without moves at its ends;
ONNX Runtime runs a model of that one layer. Both take turns within one run.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from topiarist.compiler.choose import Chooser
from topiarist.compiler.graph import Activation, Conv, FloatArray, Graph, Value
from topiarist.compiler.lower import lower
from topiarist.compiler.parts import Parts
from topiarist.compiler.trial import Trial
from topiarist.pruning.masks import block_mask, unstructured_mask
from topiarist.targets import registry


@dataclass(frozen=True)
class Shape:
    """[1, channels, size, size] -> [1, filters, size, size], kernel x kernel."""

    channels: int
    size: int
    filters: int
    kernel: int


LAYERS = {
    "L1": Shape(64, 56, 64, 3),
    "L2": Shape(128, 28, 128, 3),
    "L3": Shape(256, 14, 256, 3),
    "L4": Shape(512, 7, 512, 3),
    "L5": Shape(256, 56, 64, 1),
    "L6": Shape(1024, 14, 256, 1),
    "L7": Shape(2048, 7, 512, 1),
    "A2": Shape(48, 27, 128, 5),
    "A3": Shape(256, 13, 384, 3),
}
CASES = (("unstructured", 0.2), ("unstructured", 0.1), ("unstructured", 0.05), ("block4x1", 0.1))


def weights(shape: Shape, pattern: str, density: float) -> FloatArray:
    """Seeded He weights, pruned by magnitude."""
    random = np.random.default_rng(0)
    dense = random.standard_normal((shape.filters, shape.channels, shape.kernel, shape.kernel))
    weight = (dense * np.sqrt(2 / dense[0].size)).astype(np.float32)
    if density == 1:
        return weight
    mask = block_mask if pattern == "block4x1" else unstructured_mask
    return np.where(mask(np.abs(weight), density), weight, 0).astype(np.float32)


def graph_of(shape: Shape, weight: FloatArray) -> Graph:
    """The layer between values that other layers write and read."""
    values = {
        "x": Value("x", (1, shape.channels, shape.size, shape.size)),
        "y": Value("y", (1, shape.filters, shape.size, shape.size)),
    }
    node = Conv(
        name="layer",
        inputs=("x",),
        output="y",
        weight=weight,
        bias=np.zeros(shape.filters, np.float32),
        padding=(shape.kernel // 2,) * 4,
        activation=Activation(0.0),
    )
    return Graph((node,), values, ("x",), ("y",))


def ours(graph: Graph, parts: Parts) -> tuple[str, Callable[[], None]]:
    """The fastest kernel, and a call of it."""
    chooser = Chooser(graph, parts, dense=False, measure=True, progress=lambda *_: None)
    plan = chooser.plans()[0]
    program = lower(graph, plan, parts)
    at = [call.layer for call in program.calls].index("layer")
    runnable = Trial(parts).prepare(program)
    for function, args in runnable.calls:
        function(*args)
    function, args = runnable.calls[at]
    held = runnable.held
    return str(plan.choices["layer"].chosen), lambda: function(*args) if held else None


def theirs(shape: Shape, weight: FloatArray) -> Callable[[], None]:
    """A call of ONNX Runtime on the layer with dense weights."""
    pads = [shape.kernel // 2] * 4
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], pads=pads),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    size = [shape.size, shape.size]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, shape.channels, *size])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, shape.filters, *size])],
            [
                numpy_helper.from_array(weight, "w"),
                numpy_helper.from_array(np.zeros(shape.filters, np.float32), "b"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).standard_normal((1, shape.channels, *size)).astype(np.float32)
    return lambda: session.run(None, {"x": x})


def turns(calls: list[Callable[[], None]], seconds: float) -> list[list[float]]:
    """Seconds of each call, in turns, the first rounds left out."""
    samples: list[list[float]] = [[] for _ in calls]
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or rounds < 10:
        for call, sample in zip(calls, samples, strict=True):
            call()  # its data moves back into the caches
            before = time.perf_counter()
            call()
            sample.append(time.perf_counter() - before)
        rounds += 1
    return [sample[3:] for sample in samples]


def main() -> None:
    """Time all layers and cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="timing per case")
    parser.add_argument("--target", default="host")
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    target = registry.get(opts.target)
    rows = []
    for name in opts.layers.split(","):
        shape = LAYERS[name]
        for pattern, density in (*CASES, ("dense", 1.0)):
            weight = weights(shape, pattern, density)
            kernel, call = ours(graph_of(shape, weight), Parts(target, 1))
            mine, other = turns([call, theirs(shape, weight)], opts.seconds)
            flops = 2 * int(np.count_nonzero(weight)) * shape.size**2
            median = float(np.median(mine))
            rows.append(
                {
                    "layer": name,
                    "pattern": pattern,
                    "density": density,
                    "kernel": kernel,
                    "us": median * 1e6,
                    "gflops_on_nonzeros": flops / median / 1e9,
                    "ort_us": float(np.median(other)) * 1e6,
                    "ratio": float(np.median(np.divide(other, mine))),
                }
            )
    show(rows, target.name)
    if opts.json:
        setting = measure.setting()
        opts.json.write_text(json.dumps({"question": __doc__, **setting, "cases": rows}))


def show(rows: list[dict[str, object]], target: str) -> None:
    """A table of all rows."""
    table = Table(title=f"single layers, {target}, 1 thread")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
