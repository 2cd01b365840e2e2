"""Guided sparsity learning against the same training unguided: accuracy over measured latency.

The trained CIFAR-10 ResNet-20, pruned by dynamic network surgery at several rates, fine-tuned,
compiled and timed in turns with its dense build. Needs PyTorch, matplotlib and the data beside the
repository. What was trained and compiled is kept in the work folder: a run that was interrupted
goes on.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tests.benchmarks.measure import ROOT, bundle_engine, feeds_of, in_turns, setting
from tests.benchmarks.networks import SHARED
from topiarist.compiler.bench import ratio_interval
from topiarist.compiler.model_files import open_source
from topiarist.compiler.parts import Parts
from topiarist.compiler.pipeline import compile_model
from topiarist.pruning.accuracy import Accuracy, predicted_classes
from topiarist.pruning.calibration import Images, check_images
from topiarist.pruning.layers import weighted_layers
from topiarist.targets import registry

MODEL = SHARED / "cifar10_resnet20.onnx"
MEAN, DEVIATION = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))
RATES = (1.0, 1.5, 2.0, 2.5)  # of surgery: standard deviations above the mean magnitude
WAYS = ("guided", "unguided")
STEPS, ROUNDS, TUNE_ROUNDS = 30, 5, 5
LEARNING_RATE = 0.006
STAGES = ("train", "compile", "time")
DENSE = "dense"
COLOURS = {"guided": "#2a7d5f", "unguided": "#b3592b", DENSE: "#2b3a35"}


@dataclass(frozen=True)
class Point:
    """A network; milliseconds are medians, `speedup` is over the dense build with its interval."""

    way: str
    rate: float
    accuracy: float
    agreement: float
    density: float
    latency_ms: float
    speedup: tuple[float, float, float]
    states: Mapping[str, int]


def main() -> None:
    """Train, compile, time, show."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, all together")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks" / "gsl")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--png", type=Path, help="the picture; default: in the work folder")
    opts = parser.parse_args()
    console = Console()
    if not MODEL.exists():
        console.print(f"needs {MODEL.name}")
        return
    opts.work.mkdir(parents=True, exist_ok=True)
    names = [name_of(way, rate) for rate in opts.rates for way in WAYS]
    if "train" in opts.stages:
        for rate in opts.rates:
            for way in WAYS:
                _train(way, rate, opts.work, console)
    if "compile" in opts.stages:
        _compile(names, opts.work, console)
    if "time" not in opts.stages:
        return
    points = list(_points(opts.rates, opts.work, opts.seconds))
    console.print(_table(points))
    draw(points, opts.png or opts.work / "gsl.png")
    if opts.json:
        document = {**setting(), "points": [asdict(point) for point in points]}
        opts.json.write_text(json.dumps(document, indent=1))


def name_of(way: str, rate: float) -> str:
    """What files of a network are called."""
    return f"{way}-{rate:g}"


def _train(way: str, rate: float, work: Path, console: Console) -> None:
    import torch

    from topiarist.compiler.train_prune import Teaching, train_prune
    from topiarist.pruning.gsl.methods import Surgery
    from topiarist.pruning.gsl.training import GslSettings, RoundReport

    output = work / f"{name_of(way, rate)}.onnx"
    if output.exists():
        return
    torch.set_num_threads(1)
    target = registry.get(registry.HOST)
    settings = GslSettings(
        Surgery(rate, ramp=round(0.8 * ROUNDS * STEPS)),
        rounds=ROUNDS,
        tune_rounds=TUNE_ROUNDS,
        steps=STEPS,
        learning_rate=LEARNING_RATE,
    )

    def show(report: RoundReport) -> None:
        states = "".join(path.state[0] for path in report.paths.values())
        text = f"{output.stem}: {report.stage} {report.number + 1}/{report.rounds}"
        console.print(f"{text}, loss {report.loss:.3f}, {states}")

    model = onnx.load(MODEL)
    found = train_prune(
        *(model, _images(model, "train5000"), settings),
        Teaching(batch=48, shift=4, distil=True),
        open_source(target, 1, None).pricer if way == "guided" else None,
        target,
        checkpoint=work / f"{output.stem}.checkpoint",
        progress=show,
    )
    states = {name: path.state for name, path in found.paths.items()}
    output.with_suffix(".json").write_text(json.dumps(states, indent=1))
    onnx.save(found.model, output)


def _compile(names: Sequence[str], work: Path, console: Console) -> None:
    """The dense build and all others, on timings that they share."""
    target = registry.get(registry.HOST)
    parts = Parts(target, 1)
    for name in (DENSE, *names):
        model = MODEL if name == DENSE else work / f"{name}.onnx"
        bundle = work / f"{name}.topi"
        if model.exists() and not bundle.exists():
            console.print(f"compile {name}")
            compile_model(
                model,
                target=target,
                output=bundle,
                dense=name == DENSE,
                log=work / "timings.jsonl",
                parts=parts,
            )


def _points(rates: Sequence[float], work: Path, seconds: float) -> Iterator[Point]:
    """Those of the networks that are there, timed in turns."""
    named = {name_of(way, rate): (way, rate) for rate in rates for way in WAYS}
    bundles = {name: work / f"{name}.topi" for name in (DENSE, *named)}
    bundles = {name: bundle for name, bundle in bundles.items() if bundle.exists()}
    feeds = feeds_of(bundles[DENSE])
    samples = in_turns([bundle_engine(n, path, feeds) for n, path in bundles.items()], seconds)
    dense = onnx.load(MODEL)
    images = _images(dense, "test500")
    classes = predicted_classes(dense, images)
    for name in bundles:
        way, rate = named.get(name, (DENSE, 0.0))
        model = dense if name == DENSE else onnx.load(work / f"{name}.onnx")
        accuracy = Accuracy.of(predicted_classes(model, images), classes, images.labels)
        ratio = ratio_interval(samples[DENSE], samples[name])
        yield Point(
            *(way, rate, accuracy.share, accuracy.agreement, _density(model)),
            latency_ms=1e3 * float(np.median(samples[name])),
            speedup=(ratio.median, ratio.low, ratio.high),
            states=_states(work / f"{name}.json"),
        )


def _states(path: Path) -> dict[str, int]:
    """How many layers ended in each state."""
    found = list(json.loads(path.read_text()).values()) if path.exists() else []
    return {state: found.count(state) for state in sorted(set(found))}


def _density(model: onnx.ModelProto) -> float:
    weights = [layer.weight for layer in weighted_layers(model)]
    return sum(int(np.count_nonzero(w)) for w in weights) / sum(w.size for w in weights)


def _images(model: onnx.ModelProto, name: str) -> Images:
    """Pixels scaled as the network was trained, with classes."""
    data = np.load(SHARED / f"cifar10_{name}.npz")
    pixels = (data["images"].astype(np.float32) / 255 - MEAN) / DEVIATION
    planes: NDArray[np.float32] = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)
    labels = data["labels"].astype(np.int64)
    return check_images(model, {model.graph.input[0].name: planes}, labels)


def _table(points: Sequence[Point]) -> Table:
    table = Table(
        "way", "rate", "top-1", "as dense", "weights", "ms", "speedup", "low", "high", "layers"
    )
    for p in points:
        median, low, high = p.speedup
        table.add_row(
            *(p.way, f"{p.rate:g}", f"{p.accuracy:.1%}", f"{p.agreement:.1%}"),
            *(f"{p.density:.1%}", f"{p.latency_ms:.3f}", f"{median:.2f}"),
            *(f"{low:.2f}", f"{high:.2f}"),
            ", ".join(f"{count} {state}" for state, count in p.states.items()),
        )
    return table


def draw(points: Sequence[Point], output: Path) -> None:
    """Accuracy over latency, a line for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for way in (*WAYS, DENSE):
        line = sorted((p for p in points if p.way == way), key=lambda p: p.rate)
        times, shares = [p.latency_ms for p in line], [100 * p.accuracy for p in line]
        axes.plot(times, shares, "o-", color=COLOURS[way], label=way)
        for point in line if way != DENSE else ():
            axes.annotate(
                f"{point.rate:g}",
                (point.latency_ms, 100 * point.accuracy),
                xytext=(6, 6 if way == "guided" else -12),
                textcoords="offset points",
                color=COLOURS[way],
                fontsize=8,
            )
    axes.set_xlabel("latency, measured, ms")
    axes.set_ylabel("top-1 on 500 test images, %")
    axes.set_title("ResNet-20, pruned while training; numbers are surgery's rates", fontsize=10)
    axes.margins(x=0.08, y=0.12)
    axes.grid(color="#dfe5e2")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(output, metadata={"Software": None})


if __name__ == "__main__":
    main()
