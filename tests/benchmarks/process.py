"""Fresh processes: how long until the first result, and how much memory a running network holds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx

from tests.benchmarks import measure
from topiarist.compiler.bench import ratio_interval
from topiarist.compiler.bundle import WEIGHTS
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Graph
from topiarist.compiler.simplify import simplify

ROUNDS = 15
RUNS = 5  # inferences before memory is read

# Each program imports what a user of the engine would, and prints when its first result is there
# (on the clock that all processes share) and the most memory that it ever had resident.
_START = "import json, sys, time\nimport numpy as np\n"
_END = """
first = time.monotonic()
for _ in range(int(sys.argv[2])):
    run()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"first": first, "peak_bytes": peak}))
"""
PROGRAMS = {
    "topiarist": _START
    + """
from topiarist.compiler.session import Session
session = Session(sys.argv[1])
x = {i.name: np.ones(i.shape, i.dtype) for i in session.inputs}
run = lambda: session.run(None, x)
run()
"""
    + _END,
    "ort": _START
    + """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
run = lambda: session.run(None, x)
run()
"""
    + _END,
    # The same process as ours without a network: Python, NumPy, TVM's runtime.
    "bare runtime": _START
    + """
import topiarist.compiler.session
from topiarist.compiler import runtime
runtime.load()
run = lambda: None
"""
    + _END,
    "bare ort": _START
    + """
import onnxruntime
run = lambda: None
"""
    + _END,
    "bare python": _START + "run = lambda: None\n" + _END,
}


def start(program: str, path: Path) -> dict[str, float]:
    """Run one program: `seconds` until its first result, and `peak_bytes`."""
    command = (sys.executable, "-c", PROGRAMS[program], str(path), str(RUNS))
    before = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    said = json.loads(done.stdout)
    return {"seconds": said["first"] - before, "peak_bytes": said["peak_bytes"]}


def first_result(bundle: Path, model: Path) -> tuple[measure.Ratio, dict[str, Any]]:
    """ONNX Runtime's seconds from the start of its process to the first result, over ours.

    Both in turns, after a start of each that brings their files into memory.
    """
    paths = {"topiarist": bundle, "ort": model, "bare runtime": bundle, "bare python": bundle}
    samples: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(ROUNDS + 1):
        for name, path in paths.items():
            seconds = start(name, path)["seconds"]
            if i:
                samples[name].append(seconds)
    ratio = ratio_interval(samples["ort"], samples["topiarist"])
    return ratio, {"engines": measure.summary(samples)}


def resident(bundle: Path, model: onnx.ModelProto, source: Path) -> tuple[float, dict[str, Any]]:
    """Peak memory above the bare runtime's over the weights and the largest pair of activations."""
    peaks = {
        name: min(start(name, path)["peak_bytes"] for _ in range(3))
        for name, path in (
            ("topiarist", bundle),
            ("ort", source),
            ("bare runtime", bundle),
            ("bare ort", bundle),
            ("bare python", bundle),
        )
    }
    weight_bytes = (bundle / WEIGHTS).stat().st_size
    pair_bytes = largest_pair(simplify(extract_layers(import_model(model))))
    above = peaks["topiarist"] - peaks["bare runtime"]
    details = {
        "peak_bytes": peaks,
        "above_bare_runtime_bytes": above,
        "weight_bytes": weight_bytes,
        "largest_pair_bytes": pair_bytes,
    }
    return above / (weight_bytes + pair_bytes), details


def largest_pair(graph: Graph) -> int:
    """Bytes of a layer's input and output, the largest over all layers."""

    def size(name: str) -> int:
        value, count = graph.values[name], 1
        for extent in value.shape:
            count *= extent
        return 4 * count

    return max(size(node.inputs[0]) + size(node.output) for node in graph.nodes)
