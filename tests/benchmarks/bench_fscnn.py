"""From how many zeros on is a pruned network faster than a dense one?

    python -m tests.benchmarks.bench_fscnn [--network resnet50] [--sparsities 0,70,90,99]

FSCNN (Ji and Chen, 2022) claims that fine-grained sparsity beats PyTorch on VGG16 "if the sparsity
is sufficiently high". Here are that curve for naive CSR convolutions and for this compiler, and the
sparsities where they cross the dense engines, all measured in turns in one run: one thread, batch
1, fp32. Of the naive network only the convolutions run, so its curve is a lower bound.

Networks are compiled by timing kernels, which takes minutes for each sparsity; bundles are kept in
--out and used again for as long as they are there. PyTorch takes part where it is installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure, networks
from tests.benchmarks.layers import crossing
from tests.benchmarks.plain_engines import CsrConvolutions, has_torch, torch_engine
from topiarist.compiler import engines
from topiarist.compiler.engines import Engine
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Graph
from topiarist.compiler.simplify import simplify

FOLDER = measure.ROOT / "build" / "benchmarks" / "fscnn"
SPARSITIES = (0, 50, 70, 80, 90, 95, 99)  # %
OURS, NAIVE = "topiarist", "naive CSR"
TITLES = {"vgg16_convs": "VGG16's convolutions", "resnet50": "ResNet-50"}
COLOURS = {OURS: "#0072b2", NAIVE: "#d55e00", "pytorch": "#009e73", "ort": "#999999"}

Samples = dict[str, list[float]]  # seconds by engine, one value a round


@dataclass(frozen=True)
class Curves:
    """Median milliseconds: `series` has a value for each sparsity, `dense` one for all."""

    sparsities: tuple[int, ...]
    series: Mapping[str, Sequence[float]]
    dense: Mapping[str, float]

    def crossing(self, name: str, dense: str) -> float | None:
        """From which sparsity in % on a series is faster than a dense engine; None: nowhere."""
        upwards = range(len(self.sparsities) - 1, -1, -1)
        densities = [1 - self.sparsities[i] / 100 for i in upwards]
        found = crossing(densities, [self.dense[dense] / self.series[name][i] for i in upwards])
        return None if found is None else 100 * (1 - found)

    @property
    def worst(self) -> float:
        """Our own time without zeros over our time, at the sparsity where that is least."""
        ours = self.series[OURS]
        return min(ours[0] / value for value in ours)


def main() -> None:
    """Compile what isn't there, time everything in turns, show."""
    opts = _options()
    console = Console()
    folder = opts.out / opts.network
    folder.mkdir(parents=True, exist_ok=True)
    with console.status("compile") as status:
        for sparsity in opts.sparsities:
            status.update(f"compile {opts.network}, {sparsity} % zeros")
            compiled(opts.network, sparsity, folder)
    if opts.compile_only:
        return
    samples = measure.in_turns(contestants(opts.sparsities, folder), opts.seconds)
    found = curves_of(opts.sparsities, samples)
    console.print(table(opts.network, found))
    for line in crossings(found):
        console.print(line)
    if opts.picture:
        draw(opts.network, found, opts.picture)
    if opts.json:
        opts.json.write_text(json.dumps(report(opts.network, found, samples), indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_fscnn")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--network", choices=TITLES, default="vgg16_convs")
    parser.add_argument("--sparsities", type=_sparsities, default=SPARSITIES, help="in %%")
    parser.add_argument("--seconds", type=float, default=60.0, help="timing, all engines together")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the bundles")
    parser.add_argument("--compile-only", action="store_true", help="and time nothing")
    parser.add_argument("--picture", type=Path, help="write the curves to this PNG")
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser.parse_args()


def _sparsities(text: str) -> tuple[int, ...]:
    values = tuple(sorted({0, *map(int, text.split(","))}))
    if not 0 <= values[0] <= values[-1] < 100:
        raise argparse.ArgumentTypeError(f"sparsities are from 0 to 99, got {text}")
    return values


def compiled(network: str, sparsity: int, folder: Path) -> None:
    """A bundle that agrees with ONNX Runtime, and its model, unless they are there."""
    if not paths(sparsity, folder)[1].exists():
        model = networks.pruned(network, 1 - sparsity / 100)
        measure.compiled(paths(sparsity, folder)[0].stem, model, folder)


def paths(sparsity: int, folder: Path) -> tuple[Path, Path]:
    """Model and bundle."""
    return folder / f"{sparsity}.onnx", folder / f"{sparsity}.topi"


def contestants(sparsities: Sequence[int], folder: Path) -> list[Engine]:
    """Both series at all sparsities, and the dense engines, which are as fast at any."""
    model, bundle = paths(0, folder)
    feeds = measure.feeds_of(bundle)
    dense = layers_of(model)
    csr = CsrConvolutions(dense)
    found = [engines.open_engine("ort", model, feeds, 1)]
    if has_torch():
        found.append(torch_engine(dense, feeds, 1))
    for sparsity in sparsities:
        model, bundle = paths(sparsity, folder)
        found.append(measure.bundle_engine(label(OURS, sparsity), bundle, feeds))
        found.append(csr.engine(label(NAIVE, sparsity), layers_of(model)))
    return found


def layers_of(model: Path) -> Graph:
    """The network as layers."""
    return simplify(extract_layers(import_model(model)))


def label(series: str, sparsity: int) -> str:
    """The name of an engine."""
    return f"{series}, {sparsity} %"


def curves_of(sparsities: Sequence[int], samples: Samples) -> Curves:
    """Medians."""
    median_ms = {name: 1e3 * float(np.median(values)) for name, values in samples.items()}
    series = {s: [median_ms[label(s, at)] for at in sparsities] for s in (OURS, NAIVE)}
    dense = {name: median_ms[name] for name in ("pytorch", "ort") if name in median_ms}
    return Curves(tuple(sparsities), series, dense)


def table(network: str, curves: Curves) -> Table:
    """Milliseconds."""
    shown = Table("% zeros", *curves.series, *curves.dense, title=f"{TITLES[network]}, ms")
    for i, sparsity in enumerate(curves.sparsities):
        values = [series[i] for series in curves.series.values()] + [*curves.dense.values()]
        shown.add_row(str(sparsity), *(f"{value:.1f}" for value in values))
    return shown


def crossings(curves: Curves) -> list[str]:
    """Where the curves cross, in words."""
    lines = []
    for name in curves.series:
        for dense in curves.dense:
            found = curves.crossing(name, dense)
            where = "at no sparsity" if found is None else f"from {found:.0f} % zeros on"
            lines.append(f"{name} is faster than {dense} {where}")
    lines.append(f"{OURS} has at least {curves.worst:.2f} times the speed of its own dense build")
    return lines


def report(network: str, curves: Curves, samples: Samples) -> dict[str, Any]:
    """Everything as plain JSON values."""
    crossed = {
        f"{name} over {dense}": curves.crossing(name, dense)
        for name in curves.series
        for dense in curves.dense
    }
    return {
        "question": __doc__,
        **measure.setting(),
        "network": network,
        **asdict(curves),
        "crossings": crossed,
        "worst_over_own_dense": curves.worst,
        "engines": measure.summary(samples),
    }


def draw(network: str, curves: Curves, path: Path) -> None:
    """Latency over sparsity; needs matplotlib (the extra `plots`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, values in curves.series.items():
        axes.plot(curves.sparsities, values, label=name, color=COLOURS[name], marker="o", lw=1.8)
    for name, value in curves.dense.items():
        axes.axhline(value, label=f"{name}, dense", color=COLOURS[name], lw=1.4, ls="--")
    axes.set_yscale("log")
    axes.set_xlabel("zeros, %")
    axes.set_ylabel("ms")
    axes.set_title(f"{TITLES[network]}: one thread, batch 1, fp32", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
