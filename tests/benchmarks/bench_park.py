"""Our kernels against Park et al.'s own, layer by layer, and the alpha of both.

    python -m tests.benchmarks.bench_park [--seconds 1] [--json FILE]

AlexNet's convolutions as published by the authors, and 3x3 layers of ResNet-50 with 90 % zeros;
one thread, batch 1, fp32. Each kernel reads and writes the layout that it is made for. Ours is the
fastest of the contest. Alpha is the rate of BLAS over the rate of a sparse kernel on its nonzeros,
with half of the weights zero: ours is then the fastest sparse one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tvm
from rich.console import Console
from rich.table import Table

from tests.benchmarks import layers, measure, networks
from tests.benchmarks.layers import Contest, Shape
from topiarist.compiler.bench import ratio_interval
from topiarist.compiler.engines import Engine
from topiarist.compiler.graph import FloatArray
from topiarist.pruning.cores import one_blas_thread
from topiarist.schedules.cpu.park import ParkSparse
from topiarist.schedules.kernel import ConvSite, ConvViews
from topiarist.schedules.layout import LaneLayout, make_grid, whole
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

RESNET_DENSITY = 0.1
ALPHA_DENSITY = 0.5  # the authors measured it above 0.4
ALPHA_LAYERS = ("conv3", "conv5")  # of AlexNet: without groups and with
GEMM = 1024  # rows and columns of the matrices that BLAS multiplies
PARK, OURS, BLAS = "park", "ours", "blas"


@dataclass(frozen=True)
class Row:
    """A layer: microseconds of both kernels, Park's over ours, and rates on nonzeros."""

    layer: str
    density: float
    kernel: str
    park_us: float
    ours_us: float
    speedup: float
    low: float
    high: float
    park_gflops: float
    ours_gflops: float
    blas_gflops: float

    @property
    def alphas(self) -> tuple[float, float]:
        """Of Park's kernel and ours."""
        return self.blas_gflops / self.park_gflops, self.blas_gflops / self.ours_gflops


def plane_views(shape: Shape) -> ConvViews:
    """Row-major planes at both ends of a layer."""
    grid = make_grid(shape.size, shape.size, 1, 1)
    return ConvViews(
        whole(LaneLayout(shape.channels, grid)), whole(LaneLayout(shape.filters, grid))
    )


def park_engine(contest: Contest, shape: Shape, weight: FloatArray, target: TargetSpec) -> Engine:
    """Their kernel on the layer."""
    kernel, views = ParkSparse(), plane_views(shape)
    site = ConvSite(contest.plan.workloads["layer"], views, target)
    config = kernel.knobs(site)[0]
    module = tvm.IRModule({PARK: kernel.prim_func(site, config, PARK)})
    function = tvm.compile(module, target=tvm.target.Target(target.tvm_target))[PARK]
    x = np.random.default_rng(1).standard_normal(views.x.layout.size, np.float32)
    constants = (*kernel.pack(site, config, weight), np.zeros(shape.filters, np.float32))
    arrays = (x, *constants, np.zeros(views.y.layout.size, np.float32))
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    return Engine(PARK, 1, "", lambda: function(*tensors))


def blas_engine() -> Engine:
    """A product of two matrices by NumPy's BLAS."""
    a, b = np.random.default_rng(2).standard_normal((2, GEMM, GEMM), np.float32)
    out = np.empty_like(a)
    return Engine(BLAS, 1, "", lambda: np.matmul(a, b, out))


def time_layer(
    name: str,
    shape: Shape,
    weight: FloatArray,
    accepts: Callable[[str], bool],
    seconds: float,
    target: TargetSpec,
) -> Row:
    """Both kernels and BLAS, in turns; ours is the fastest of the accepted."""
    contest = Contest(shape, weight, target)
    ours = contest.fastest(accepts)
    assert ours is not None
    engines = [park_engine(contest, shape, weight, target), contest.engine(OURS, ours)]
    with one_blas_thread():
        samples = measure.in_turns([*engines, blas_engine()], seconds)
    nonzeros = int(np.count_nonzero(weight))
    flops = 2 * nonzeros * shape.size**2
    median = {engine: float(np.median(values)) for engine, values in samples.items()}
    ratio = ratio_interval(samples[PARK], samples[OURS])
    return Row(
        layer=name,
        density=nonzeros / weight.size,
        kernel=ours.kernel,
        park_us=median[PARK] * 1e6,
        ours_us=median[OURS] * 1e6,
        speedup=ratio.median,
        low=ratio.low,
        high=ratio.high,
        park_gflops=flops / median[PARK] / 1e9,
        ours_gflops=flops / median[OURS] / 1e9,
        blas_gflops=2 * GEMM**3 / median[BLAS] / 1e9,
    )


def measured(seconds: float) -> tuple[list[Row], list[Row]]:
    """The comparison's rows, and those for alpha."""
    target = registry.get(registry.HOST)
    published = networks.pruned_alexnet_layers()
    compared = [
        time_layer(f"AlexNet {name}", shape, published[name], lambda _: True, seconds, target)
        for name, shape in layers.ALEXNET.items()
    ]
    for shape in layers.RESNET50.values():
        if shape.kernel == 3:
            weight = layers.weights(shape, "unstructured", RESNET_DENSITY)
            label = f"ResNet-50 {shape.channels}x{shape.size}x{shape.size}"
            compared.append(time_layer(label, shape, weight, lambda _: True, seconds, target))
    alphas = []
    for name in ALPHA_LAYERS:
        shape = layers.ALEXNET[name]
        weight = layers.weights(shape, "unstructured", ALPHA_DENSITY)
        row = time_layer(f"AlexNet {name}", shape, weight, layers.is_sparse, seconds, target)
        alphas.append(row)
    return compared, alphas


def comparison_table(rows: list[Row]) -> Table:
    """One line a layer."""
    table = Table("layer", "nonzeros", "Park, us", "ours, us", "Park / ours (95 %)", "our kernel")
    for row in rows:
        times = f"{row.park_us:.0f}", f"{row.ours_us:.0f}"
        ratio = f"{row.speedup:.2f} ({row.low:.2f} - {row.high:.2f})"
        table.add_row(row.layer, f"{row.density:.1%}", *times, ratio, row.kernel)
    mean = float(np.exp(np.mean([np.log(row.speedup) for row in rows])))
    table.add_row("geometric mean", "", "", "", f"{mean:.2f}", "")
    return table


def alpha_table(rows: list[Row]) -> Table:
    """One line a layer."""
    table = Table("layer", "nonzeros", "BLAS, GFLOP/s", "Park", "ours", "alpha Park", "alpha ours")
    for row in rows:
        rates = [f"{rate:.0f}" for rate in (row.blas_gflops, row.park_gflops, row.ours_gflops)]
        alphas = [f"{alpha:.2f}" for alpha in row.alphas]
        table.add_row(row.layer, f"{row.density:.0%}", *rates, *alphas)
    return table


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=1.0, help="timing per layer")
    parser.add_argument("--json", type=Path, help="write everything here")
    opts = parser.parse_args()
    compared, alphas = measured(opts.seconds)
    console = Console(width=110)
    console.print(comparison_table(compared), alpha_table(alphas))
    if opts.json:
        rows = {"compared": compared, "alphas": alphas}
        found = {name: [asdict(row) for row in part] for name, part in rows.items()}
        opts.json.write_text(json.dumps(measure.setting() | found), encoding="utf-8")


if __name__ == "__main__":
    main()
