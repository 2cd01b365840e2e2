"""Does a DPPNet run as much faster as it saves multiply-adds?

    python -m tests.benchmarks.bench_dppnet [--seconds 60] [--json FILE]

ResNet-34 at 224 x 224 with four experts in every 3x3 layer but the first, and unions of masks that
save 65.6 % of the multiply-adds, as the network of the paper does; the weights are random, for
speed doesn't depend on them. How far masks overlap decides what is to be read, so there are three
networks: each position of a union is in one, two, or all four of the experts. They are compared
with the dense network, with Winograd and without it, and with ONNX Runtime, all in turns in one
run; one thread, batch 1. The floor is what multiply-adds take at the peak, and weights at the
bandwidth, that were measured here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure, networks
from topiarist.compiler import engines
from topiarist.compiler.bench import Ratio, ratio_interval
from topiarist.compiler.engines import Engine
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Conv, DynamicConv, Linear
from topiarist.compiler.roofline import with_roofline
from topiarist.targets import registry

FOLDER = measure.ROOT / "build" / "benchmarks" / "dppnet"
HOLDERS = (1, 2, 4)
DENSE, DIRECT, ORT = "dense", "dense without Winograd", "ort"
PLAIN = "ort, experts"  # what ONNX Runtime makes of the exported experts


@dataclass(frozen=True)
class Work:
    """What a network has to do for an image: billions of multiply-adds, megabytes of weights."""

    gmacs: float
    weight_mb: float

    @staticmethod
    def of(model: Path) -> Work:
        """Experts are read where they have weights; multiplied where the mixed kernel has any."""
        graph = extract_layers(import_model(model))
        macs, weights = 0, 0
        for node in graph.nodes:
            if isinstance(node, Conv):
                macs += np.count_nonzero(node.weight) * math.prod(
                    graph.values[node.output].shape[2:]
                )
            elif isinstance(node, Linear):
                macs += node.weight.size
            if isinstance(node, Conv | Linear):
                held = node.experts if isinstance(node, DynamicConv) else node.weight
                weights += int(np.count_nonzero(held))
        return Work(macs / 1e9, 4 * weights / 1e6)

    def floor_ms(self, peak_gflops: float, bandwidth_gbs: float) -> tuple[float, float]:
        """Of arithmetic and of reading weights."""
        return 2 * self.gmacs / peak_gflops * 1e3, self.weight_mb / bandwidth_gbs


@dataclass(frozen=True)
class Row:
    """A network of experts: milliseconds, how much faster it is, and the share of the theory."""

    holders: int
    work: Work
    theory: float
    ms: float
    over: dict[str, Ratio]

    def share(self, rival: str) -> float:
        """Of the speedup that would be if time followed the multiply-adds."""
        return self.over[rival].median / self.theory


def name_of(holders: int) -> str:
    """Of a network and of its engine."""
    return f"experts_{holders}"


def main() -> None:
    """Compile what isn't there, time everything in turns, show."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_dppnet")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=60.0, help="timing, all engines together")
    parser.add_argument("--holders", type=int, nargs="+", default=HOLDERS, help="1 to 4")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the bundles")
    parser.add_argument("--compile-only", action="store_true", help="and time nothing")
    parser.add_argument("--json", type=Path, help="write the results here")
    opts = parser.parse_args()
    opts.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    with console.status("compile"):
        compile_all(opts.holders, opts.out)
    if opts.compile_only:
        return
    samples = measure.in_turns(contestants(opts.holders, opts.out), opts.seconds)
    rows = rows_of(samples, opts.holders, opts.out)
    spec = with_roofline(registry.get(registry.HOST))
    assert spec.peak_gflops is not None and spec.bandwidth_gbs is not None
    console.print(table(rows, spec.peak_gflops, spec.bandwidth_gbs))
    console.print({name: f"{np.median(s) * 1e3:.1f} ms" for name, s in samples.items()})
    if opts.json:
        found = {"rows": [asdict(row) for row in rows], "ms": measure.summary(samples)}
        rates = {"peak_gflops": spec.peak_gflops, "bandwidth_gbs": spec.bandwidth_gbs}
        opts.json.write_text(json.dumps({**measure.setting(), **rates, **found}, indent=1))


def compile_all(every: Sequence[int], folder: Path) -> None:
    """Bundles that agree with ONNX Runtime, unless they are there."""
    wanted: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
        "dense": (networks.resnet34(), ()),
        "direct": (networks.resnet34(), ("--max-error", "0")),
    }
    wanted |= {name_of(h): (networks.dynamic_resnet34(h), ()) for h in every}
    for name, (model, options) in wanted.items():
        if not (folder / f"{name}.topi").exists():
            measure.compiled(name, model, folder, options=options)


def contestants(every: Sequence[int], folder: Path) -> list[Engine]:
    """Ours and ONNX Runtime's, on the same image."""
    feeds = measure.feeds_of(folder / "dense.topi")
    ours = {DENSE: "dense", DIRECT: "direct"} | {name_of(h): name_of(h) for h in every}
    experts = engines.open_engine("ort", folder / f"{name_of(every[-1])}.onnx", feeds, 1)
    return [
        engines.open_engine("ort", folder / "dense.onnx", feeds, 1),
        replace(experts, name=PLAIN),
        *(measure.bundle_engine(n, folder / f"{f}.topi", feeds) for n, f in ours.items()),
    ]


def rows_of(samples: dict[str, list[float]], every: Sequence[int], folder: Path) -> list[Row]:
    """Ratios of times that were taken in one round."""
    dense = Work.of(folder / "dense.onnx")
    rows = []
    for holders in every:
        ours, work = samples[name_of(holders)], Work.of(folder / f"{name_of(holders)}.onnx")
        over = {rival: ratio_interval(samples[rival], ours) for rival in (ORT, DIRECT, DENSE)}
        theory = dense.gmacs / work.gmacs
        rows.append(Row(holders, work, theory, float(np.median(ours)) * 1e3, over))
    return rows


def table(rows: list[Row], peak_gflops: float, bandwidth_gbs: float) -> Table:
    """One line a network; bars are 1.7x over ONNX Runtime, and 60 % of the theory."""
    title = f"ResNet-34 of experts; {peak_gflops:.0f} GFLOP/s, {bandwidth_gbs:.0f} GB/s"
    heads = ("experts that have a position", "saved", "ms", "floor: arithmetic + weights, ms")
    shown = Table(*heads, "over ONNX Runtime", "over direct", "over Winograd", title=title)
    for row in rows:
        arithmetic, weights = row.work.floor_ms(peak_gflops, bandwidth_gbs)
        shares = [
            f"{row.over[rival].median:.2f}x [{row.over[rival].low:.2f}, {row.over[rival].high:.2f}]"
            f", {row.share(rival):.0%} of the theory"
            for rival in (ORT, DIRECT, DENSE)
        ]
        shown.add_row(
            str(row.holders),
            f"{1 - 1 / row.theory:.1%}",
            f"{row.ms:.1f}",
            f"{arithmetic:.1f} + {weights:.1f}",
            *shares,
        )
    return shown


if __name__ == "__main__":
    main()
