"""Would it pay to skip zeros of activations, too?

    python -m tests.benchmarks.bench_activations

First, how many there are: the share of nonzeros that each convolution of a trained ResNet-20 reads,
mean over images (its files lie beside the repository; without them this part is left out). Then
what they would have to be: layers of ResNet-50 with 90 % zeros in their weights, by the fastest
kernel of this compiler, by the plain operator with dense activations, and by the scatter operator
on activations of several densities. All in turns in one run; one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.layers import RESNET50, Contest, Shape, crossing, weights
from tests.benchmarks.networks import SHARED
from tests.graph_reference import evaluate
from topiarist.compiler.choose import workload_of
from topiarist.compiler.engines import OURS, Engine
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Conv, Graph
from topiarist.compiler.simplify import simplify
from topiarist.schedules.formats.convolution import sparse_dense_prim_func, sparse_sparse_prim_func
from topiarist.schedules.formats.tensors import SparseActivation, SparseWeight
from topiarist.targets import registry

MODEL, IMAGES = SHARED / "cifar10_resnet20.onnx", SHARED / "cifar10_test500.npz"
LAYERS = ("L1", "L2", "L3", "L6")
WEIGHT_DENSITY = 0.1
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of activations
PLAIN = "plain, dense activations"

FloatArray = NDArray[np.float32]


def main() -> None:
    """Count, time, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--images", type=int, default=100, help="to count zeros on")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing per layer")
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    console = Console()
    counted: dict[str, float] = {}
    if MODEL.is_file() and IMAGES.is_file():
        counted = resnet20_densities(opts.images)
        console.print(density_table(counted))
    timed = {name: time_layer(RESNET50[name], opts.seconds) for name in LAYERS}
    console.print(time_table(timed))
    if opts.json:
        found = {"resnet20_densities": counted, "layers": timed}
        opts.json.write_text(json.dumps({"question": __doc__, **measure.setting(), **found}))


def resnet20_densities(images: int) -> dict[str, float]:
    """Of the first test images."""
    with np.load(IMAGES) as file:
        pixels = file["images"][:images]
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    scaled = ((pixels / 255 - mean) / deviation).transpose(0, 3, 1, 2)
    graph = simplify(extract_layers(import_model(MODEL, batch=1)))
    return input_densities(graph, np.ascontiguousarray(scaled, np.float32))


def input_densities(graph: Graph, images: FloatArray) -> dict[str, float]:
    """Share of nonzeros in what each convolution reads, mean over images [N, C, H, W]."""
    (name,) = graph.inputs
    convolutions = [node for node in graph.nodes if isinstance(node, Conv)]
    shares: dict[str, list[float]] = {node.name: [] for node in convolutions}
    for image in images:
        values = evaluate(graph, {name: image[None]})
        for node in convolutions:
            read = values[node.inputs[0]]
            shares[node.name].append(np.count_nonzero(read) / read.size)
    return {layer: float(np.mean(found)) for layer, found in shares.items()}


def time_layer(shape: Shape, seconds: float) -> dict[str, Any]:
    """Milliseconds of all ways, and up to which density sparse activations win."""
    weight = weights(shape, "unstructured", WEIGHT_DENSITY)
    contest = Contest(shape, weight, registry.get(registry.HOST))
    (node,) = contest.graph.nodes
    assert isinstance(node, Conv)
    fastest = contest.fastest()
    assert fastest is not None
    contestants = [contest.engine(OURS, fastest), *operators(node, contest.graph)]
    samples = measure.in_turns(contestants, seconds)
    median_ms = {name: 1e3 * float(np.median(values)) for name, values in samples.items()}
    return {"shape": vars(shape), "ms": median_ms, "wins_up_to": wins_up_to(median_ms)}


def wins_up_to(median_ms: Mapping[str, float]) -> dict[str, float | None]:
    """The largest density of activations at which they win over each other way; None: at none."""
    return {
        rival: crossing(DENSITIES, [median_ms[rival] / median_ms[label(d)] for d in DENSITIES])
        for rival in (OURS, PLAIN)
    }


def label(density: float) -> str:
    """The name of an engine."""
    return f"scatter, {density:.0%} of activations"


def operators(node: Conv, graph: Graph) -> list[Engine]:
    """The plain operator, and scattering at all densities; compressing is not in their times."""
    workload = replace(workload_of(node, graph), residual=False)
    functions = {
        "dense": sparse_dense_prim_func("dense", workload, 1),
        "sparse": sparse_sparse_prim_func("sparse", workload, 1),
    }
    target = tvm.target.Target(registry.get(registry.HOST).tvm_target)
    built = tvm.compile(tvm.IRModule(functions), target=target)
    constants = (*SparseWeight.from_dense(node.weight).constants, node.bias)
    y = np.empty(workload.out_channels * workload.out_height * workload.out_width, np.float32)
    pairs = np.empty(workload.out_channels, np.int32)
    rng = np.random.default_rng(2)
    x = np.abs(rng.standard_normal(graph.values[node.inputs[0]].shape[1:], np.float32))
    found = [_engine(PLAIN, built["dense"], (x.ravel(), *constants, y))]
    for density in DENSITIES:
        kept = np.where(rng.random(x.shape) < density, x, np.float32(0))
        rows = SparseActivation.from_dense(kept).buffers
        found.append(_engine(label(density), built["sparse"], (*rows, *constants, y, pairs)))
    return found


def _engine(name: str, function: Any, arrays: Sequence[NDArray[Any]]) -> Engine:
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    return Engine(name, 1, tvm.__version__, lambda: function(*arguments))


def density_table(densities: Mapping[str, float]) -> Table:
    """One line a layer."""
    shown = Table("layer of ResNet-20", "nonzeros in its input")
    for layer, density in densities.items():
        shown.add_row(layer, f"{density:.0%}")
    return shown


def time_table(timed: Mapping[str, dict[str, Any]]) -> Table:
    """One line for each way, in ms, and the density up to which scattering wins."""
    shown = Table("ms, 90 % zeros in weights", *timed)
    for name in (OURS, PLAIN, *map(label, DENSITIES)):
        shown.add_row(name, *(f"{found['ms'][name]:.2f}" for found in timed.values()))
    for rival in (OURS, PLAIN):
        ends = [found["wins_up_to"][rival] for found in timed.values()]
        cells = ["never" if end is None else f"up to {end:.1%}" for end in ends]
        shown.add_row(f"scatter wins over {rival}", *cells)
    return shown


if __name__ == "__main__":
    main()
