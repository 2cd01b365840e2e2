"""How many cycles do ARM processors take at least: sparse kernels against dense ones?

Nothing runs: llvm-mca's cycles of the generated loops, times how often these run.
`bench_static.py` shows how far such figures are from a clock's.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks import layers, measure
from tests.benchmarks.layers import Shape
from tests.benchmarks.static_cycles import Core, count, need_mca
from topiarist.compiler.choose import conv_views, layout_plans, workload_of
from topiarist.compiler.parts import Parts
from topiarist.schedules.kernel import ConvKernel, ConvSite, KernelConfig
from topiarist.schedules.kernels import conv_kernel
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

# llvm-mca's model of the A76 is that of the A57; the Neoverse N1 is an A76 by other caches.
CORES = {
    "rpi4": Core("aarch64-linux-gnu", "cortex-a72"),
    "rpi5": Core("aarch64-linux-gnu", "neoverse-n1"),
}
DENSITIES = (0.2, 0.1, 0.05)
KERNELS = ("direct_sparse", "direct_dense", "winograd_dense")

Found = tuple[ConvKernel[Any], ConvSite, KernelConfig]


def best(shape: Shape, weight: layers.FloatArray, target: TargetSpec, name: str) -> Found | None:
    """The kernel's best configuration by estimate, in any of the layouts that are tried."""
    graph, kernel = layers.graph_of(shape, weight), conv_kernel(name)
    node: Any = graph.nodes[0]
    workload = workload_of(node, graph)
    if kernel.refuses(workload, target) is not None:
        return None
    sites = [
        ConvSite(workload, conv_views(node, plan), target)
        for plan in layout_plans(graph, Parts(target, 1))
    ]
    found = [
        (kernel.estimate_us(site, config), i, config)
        for i, site in enumerate(sites)
        for config in kernel.knobs(site)[: 3 * kernel.tries]
        if kernel.fits(site, config)
    ]
    _, i, config = min(found, key=lambda option: option[0])
    return kernel, sites[i], config


def static(target: TargetSpec, core: Core, shape: Shape) -> dict[str, dict[str, Any]]:
    """Of each kernel and density, cycles and the configuration; dense ones have no density."""
    rows: dict[str, dict[str, Any]] = {}
    for name in KERNELS:
        for density in DENSITIES if conv_kernel(name).sparse else (1,):
            weight = layers.weights(shape, "unstructured", density)
            found = best(shape, weight, target, name)
            if found is not None:
                counted = asdict(count(*found, weight, core))
                label = name if density == 1 else f"{name} {density}"
                rows[label] = {**counted, "config": str(found[2])}
    return rows


def table(results: dict[str, dict[str, Any]], title: str) -> Table:
    """Ratios of cycles."""
    found = Table(title=title)
    for column in ("layer", "dense, M cycles", "Winograd, M cycles", *map(str, DENSITIES)):
        found.add_column(column)
    for layer, rows in results.items():
        dense = rows["direct_dense"]["cycles"]
        winograd = rows.get("winograd_dense", {}).get("cycles")
        cells = [layer, f"{dense / 1e6:.2f}", f"{winograd / 1e6:.2f}" if winograd else "-"]
        for density in DENSITIES:
            took = rows[f"direct_sparse {density}"]["cycles"]
            over = f", {winograd / took:.1f}" if winograd else ""
            cells.append(f"{dense / took:.1f}{over}")
        found.add_row(*cells)
    return found


def main() -> None:
    """Count, show, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    need_mca()
    found: dict[str, Any] = {}
    for name, core in CORES.items():
        target = registry.get(name)
        found[name] = {
            layer: static(target, core, shape) for layer, shape in layers.RESNET50.items()
        }
        Console().print(table(found[name], f"{name}, as {core.mcpu}: cycles over sparse cycles"))
    if opts.json:
        opts.json.write_text(json.dumps({"question": __doc__, **measure.setting(), **found}))


if __name__ == "__main__":
    main()
