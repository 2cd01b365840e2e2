"""The demonstration: ResNet-50, pruned, compiled for this machine, verified and timed.

The network ships without weights inside the onnx package; seeded He weights stand in for trained
ones, so its speed is real and its accuracy means nothing. Run: python -m topiarist.compiler.demo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from topiarist.compiler.bench import BenchResult, bench
from topiarist.compiler.compiled import CompiledModel, LayerChoice
from topiarist.compiler.light_models import light_model
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.verify import VerifyResult, verify
from topiarist.errors import TopiaristError
from topiarist.pruning.one_shot import PrunedLayer, prune_model

SLOWEST = 8  # layers in the table

Step = Callable[[str, int, int], None]  # what is being done, how much is done, of how much


@dataclass(frozen=True)
class Files:
    """What the demonstration leaves in its folder."""

    dense: Path
    pruned: Path
    bundle: Path


@dataclass(frozen=True)
class DemoResult:
    """Everything that the closing tables show."""

    files: Files
    pruned: list[PrunedLayer]
    compiled: CompiledModel
    verified: VerifyResult
    timed: BenchResult


def run_demo(out: Path, density: float, seconds: float, step: Step) -> DemoResult:
    """All stages on ResNet-50, batch 1, one thread; the files stay in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = Files(out / "resnet50.onnx", out / "resnet50_pruned.onnx", out / "resnet50.topi")
    step("make ResNet-50", 0, 1)
    dense = light_model("resnet50", seed=0)
    onnx.save(dense, files.dense)
    step("prune", 0, 1)
    model, pruned = prune_model(dense, density=density)
    onnx.save(model, files.pruned)
    step("compile", 0, 1)
    compiled = compile_model(files.pruned, output=files.bundle, threads=1, progress=step)
    step("verify against ONNX Runtime", 0, 1)
    verified = verify(files.bundle, files.pruned)
    step("time against ONNX Runtime", 0, 1)
    timed = bench(files.bundle, files.dense, ("ort",), threads=1, seconds=seconds)
    return DemoResult(files, pruned, compiled, verified, timed)


def summary(result: DemoResult) -> Table:
    """The outcome in one small table."""
    ours, theirs = (result.timed.engines[name] for name in ("topiarist", "ort"))
    ratio = result.timed.ratio["ort"]
    pruned = _density([layer for layer in result.pruned if layer.reason_kept is None])
    table = Table("ResNet-50, 1 thread, batch 1", "")
    table.add_row(
        "weights that stay", f"{pruned:.1%} of pruned layers, {_density(result.pruned):.1%} of all"
    )
    table.add_row("ONNX Runtime, dense model", f"{theirs.median_ms:.1f} ms")
    table.add_row("Topiarist, pruned model", f"{ours.median_ms:.1f} ms")
    table.add_row(
        "speed-up", f"{ratio.median:.2f}x (95 % interval {ratio.low:.2f} to {ratio.high:.2f})"
    )
    verdict = "agrees" if result.verified.passed else "DIFFERS"
    table.add_row(
        "largest difference of outputs", f"{result.verified.max_rel:.1e} of the largest: {verdict}"
    )
    files = result.files
    table.add_row("ONNX file", f"{_megabytes(files.dense):.1f} MB")
    table.add_row("compiled bundle", f"{_megabytes(files.bundle):.1f} MB")
    return table


def _density(layers: Sequence[PrunedLayer]) -> float:
    """Share of nonzeros over all weights of the layers."""
    weights = sum(layer.weights for layer in layers)
    return sum(layer.weights * layer.density_after for layer in layers) / weights if weights else 1


def slowest_layers(layers: Sequence[LayerChoice]) -> Table:
    """The layers in which most of the time goes, as measured alone."""
    timed = [layer for layer in layers if layer.run_us is not None]
    timed.sort(key=lambda layer: layer.run_us or 0.0, reverse=True)
    table = Table("slowest layers", "kernel", "density", "µs", "GFLOP/s on nonzeros")
    for layer in timed[:SLOWEST]:
        run_us = layer.run_us or 0.0
        density = "" if layer.density is None else f"{layer.density:.2f}"
        rate = f"{layer.flops_nonzero / run_us / 1e3:.1f}" if run_us else ""
        table.add_row(escape(layer.layer), escape(layer.kernel), density, f"{run_us:.0f}", rate)
    return table


def _megabytes(path: Path) -> float:
    """Size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it with a progress bar; 0 if the outputs agree, 1 if not, 2 on an error of the user's."""
    parser = argparse.ArgumentParser(prog="python -m topiarist.compiler.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the files")
    parser.add_argument("--density", type=float, default=0.1, help="share of weights that stay")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the timing")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        with _progress(console) as progress:
            task = progress.add_task("start", total=1)

            def step(stage: str, done: int, total: int) -> None:
                progress.update(task, description=stage, completed=done, total=total)

            result = run_demo(options.out, options.density, options.seconds, step)
    except (TopiaristError, ValueError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}")
        return 2
    console.print(summary(result))
    console.print(slowest_layers(result.compiled.layers))
    console.print(f"The files are in {options.out}.")
    return 0 if result.verified.passed else 1


def _progress(console: Console) -> Progress:
    """One line: spinner, stage, bar, elapsed time."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


if __name__ == "__main__":
    sys.exit(main())
