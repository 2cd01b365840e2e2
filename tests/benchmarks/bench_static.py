"""How far are static cycles (`static_cycles.py`) from a clock's, on this machine?

Kernels of ResNet-50's layers, alone and repeated, with their constants in the caches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from rich.console import Console
from rich.table import Table

from tests.benchmarks import layers, measure
from tests.benchmarks.bench_arm import KERNELS, best
from tests.benchmarks.static_cycles import Core, count, need_mca
from topiarist.compiler.measure import Timer
from topiarist.compiler.parts import Parts
from topiarist.compiler.program import Ref
from topiarist.compiler.roofline import with_roofline
from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.layout import View
from topiarist.targets import registry

DENSITY = 0.1
REPEATS = 5
CORE_SUMS = 2  # multiply-adds of vectors that this machine's core starts in a cycle


def measured_us(found: tuple[Any, ConvSite, Any], weight: layers.FloatArray, parts: Parts) -> float:
    """The least of several repeats."""
    kernel, site, config = found
    name = parts.convolution(kernel, site, config, weight)
    constants = [*kernel.pack(site, config, weight), np.zeros(len(weight), np.float32)]
    args = [_buffer("x", site.views.x), *map(tvm.runtime.tensor, constants)]
    args.append(_buffer("y", site.views.y))
    timer = Timer(1)
    compiled = parts.compiled([name])[name]
    return 1e6 * min(min(timer.seconds(compiled, args)) for _ in range(REPEATS))


def _buffer(name: str, view: View) -> Ref:
    return Ref(name, (view.layout.size,))


def main() -> None:
    """Count, time, show, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mcpu", default="skylake-avx512", help="llvm-mca's name of this core")
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    need_mca()
    host = with_roofline(registry.get(registry.HOST))
    assert host.peak_gflops is not None
    clock_ghz = host.peak_gflops / (2 * CORE_SUMS * host.lanes)
    core, parts = Core("x86_64-linux-gnu", opts.mcpu), Parts(host, 1)
    found: dict[str, dict[str, Any]] = {}
    for layer, shape in layers.RESNET50.items():
        for name in KERNELS:
            weight = layers.weights(shape, "unstructured", DENSITY)
            chosen = best(shape, weight, host, name)
            if chosen is not None:
                static_us = count(*chosen, weight, core).cycles / clock_ghz / 1e3
                us = measured_us(chosen, weight, parts)
                found[f"{layer} {name}"] = {"static_us": static_us, "measured_us": us}
    table = Table("", "static, us", "measured, us", "measured / static")
    for what, us in found.items():
        ratio = us["measured_us"] / us["static_us"]
        table.add_row(what, f"{us['static_us']:.0f}", f"{us['measured_us']:.0f}", f"{ratio:.2f}")
    Console().print(table)
    if opts.json:
        opts.json.write_text(json.dumps({"question": __doc__, **measure.setting(), **found}))


if __name__ == "__main__":
    main()
