"""The cases of the x86 table: what is measured, and the bars that it is measured against."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.benchmarks import layers, measure, networks, process
from tests.benchmarks.measure import CaseResult, Figure, figure
from topiarist.compiler import engines
from topiarist.compiler.bench import ratio_interval
from topiarist.compiler.choose import Candidate
from topiarist.targets import registry

Bars = tuple[float | None, float | None]  # at least, aim
NO_BARS: Bars = (None, None)
SQUEEZENET = networks.SHARED / "imagenet_squeezenet1.0_pruned.onnx"
HIGH_DENSITIES = (0.35, 0.5, 0.6, 0.7)
# By kernel size: what the crossings are read from. 3x3 layers have Winograd to beat, too.
CROSSING_DENSITIES = {1: HIGH_DENSITIES, 3: (0.16, 0.22, 0.28, *HIGH_DENSITIES)}
LAYER_SECONDS = 1 / 8  # of a network's time, for a single layer


@dataclass(frozen=True)
class Wanted:
    """The bars of one density of a network: over the best engine, and over our own dense build."""

    density: float
    over_best: Bars
    over_dense: Bars | None = None


def network(name: str, wanted: tuple[Wanted, ...], seconds: float) -> CaseResult:
    """A network at several densities and the other engines, all in one run in turns."""
    with tempfile.TemporaryDirectory() as tmp:
        built = {
            w.density: measure.compiled(
                _label(w.density), networks.pruned(name, w.density), Path(tmp)
            )
            for w in wanted
        }
        densest = built[max(built)]
        feeds = measure.feeds_of(densest.bundle)
        rivals = [engines.open_engine(n, densest.model, feeds, 1) for n in measure.rivals()]
        ours = [measure.bundle_engine(_label(d), b.bundle, feeds) for d, b in built.items()]
        samples = measure.in_turns([*ours, *rivals], seconds)
    figures = [
        figure(
            f"{name}, {_label(w.density)}, over the best",
            *w.over_best,
            measure.over_best(samples, _label(w.density), measure.rivals()),
        )
        for w in wanted
    ]
    figures += [
        figure(
            f"{name}, {_label(w.density)}, over our own dense build",
            *w.over_dense,
            ratio_interval(samples[_label(1.0)], samples[_label(w.density)]),
        )
        for w in wanted
        if w.over_dense is not None
    ]
    details = {"engines": measure.summary(samples)}
    return CaseResult(tuple(figures), details | {_label(d): b.details for d, b in built.items()})


def _label(density: float) -> str:
    return "no zeros" if density == 1 else f"{1 - density:.0%} zeros"


def squeezenet(seconds: float) -> CaseResult:
    """SqueezeNet 1.0 as its authors pruned it, 33 % of the weights left."""
    what = "SqueezeNet 1.0 as published (33 % left), over the best"
    if not SQUEEZENET.is_file():
        return CaseResult((Figure(what, None, None, None),), {"skipped": f"no {SQUEEZENET.name}"})
    with tempfile.TemporaryDirectory() as tmp:
        built = measure.compiled("squeezenet", onnx.load(SQUEEZENET), Path(tmp))
        feeds = measure.feeds_of(built.bundle)
        rivals = [engines.open_engine(n, built.model, feeds, 1) for n in measure.rivals()]
        samples = measure.in_turns(
            [measure.bundle_engine("ours", built.bundle, feeds), *rivals], seconds
        )
    ratio = measure.over_best(samples, "ours", measure.rivals())
    details = {"engines": measure.summary(samples), "compiled": built.details}
    return CaseResult((figure(what, *NO_BARS, ratio),), details)


def alexnet(seconds: float) -> CaseResult:
    """AlexNet's pruned convolutions, each alone."""
    target = registry.get(registry.HOST)
    weights = networks.pruned_alexnet_layers()
    results = {
        name: layers.time_layer(shape, weights[name], target, seconds * LAYER_SECONDS)
        for name, shape in layers.ALEXNET.items()
    }
    figures = [
        figure(f"AlexNet {name}, {_zeros(details)}, over the best", *NO_BARS, ratio)
        for name, (ratio, details) in results.items()
    ]
    mean = measure.geomean([ratio for ratio, _ in results.values()])
    figures.append(figure("AlexNet conv2-5, geometric mean, over the best", 5, 7.3, mean))
    return CaseResult(tuple(figures), {name: details for name, (_, details) in results.items()})


def _zeros(details: dict[str, Any]) -> str:
    return f"{1 - details['density']:.0%} zeros"


def single_layers(seconds: float) -> CaseResult:
    """Layers of ResNet-50, each alone, at several densities and in blocks."""
    target = registry.get(registry.HOST)
    figures, details = [], {}
    cases: tuple[tuple[str, float, Bars], ...] = (
        ("unstructured", 0.2, (3.5, 4.5)),
        ("unstructured", 0.1, (6, 8)),
        ("unstructured", 0.05, (9, 13)),
        ("block4x1", 0.1, (7, 9)),
        ("dense", 1.0, NO_BARS),
    )
    for pattern, density, bars in cases:
        ratios = []
        for name, shape in layers.RESNET50.items():
            weight = layers.weights(shape, pattern, density)
            ratio, found = layers.time_layer(shape, weight, target, seconds * LAYER_SECONDS)
            ratios.append(ratio)
            details[f"{name} {pattern} {density}"] = found | {"ratio": asdict(ratio)}
        what = f"layers of ResNet-50, {pattern}, {_label(density)}, geometric mean, over the best"
        figures.append(figure(what, *bars, measure.geomean(ratios)))
    return CaseResult(tuple(figures), details)


def crossings(seconds: float) -> CaseResult:
    """Up to which density the sparse kernels win against our dense ones."""
    target = registry.get(registry.HOST)
    found: dict[str, dict[str, list[float]]] = {}
    for name, shape in layers.RESNET50.items():
        speedups: dict[str, list[float]] = {"direct": [], "winograd": []}
        for density in CROSSING_DENSITIES[shape.kernel]:
            contest = layers.Contest(shape, layers.weights(shape, "unstructured", density), target)
            sparse = contest.fastest(layers.is_sparse)
            if sparse is None:
                break  # they refuse so many nonzeros
            part = seconds * LAYER_SECONDS / 2
            for rival, ratio in _sparse_over_dense(contest, sparse, part).items():
                speedups[rival].append(ratio)
        found[name] = speedups
    figures = [
        _crossing_figure("direct dense", found, "direct", 3, (0.5, 0.6)),
        _crossing_figure("direct dense", found, "direct", 1, (0.5, 0.6)),
        _crossing_figure("Winograd", found, "winograd", 3, (0.22, 0.28)),
    ]
    details = {
        f"{size}x{size}": {
            "densities": densities,
            "sparse_over_dense": {name: found[name] for name in _layers_of(size)},
        }
        for size, densities in CROSSING_DENSITIES.items()
    }
    return CaseResult(tuple(figures), details)


def _layers_of(kernel: int) -> list[str]:
    return [name for name, shape in layers.RESNET50.items() if shape.kernel == kernel]


def _sparse_over_dense(
    contest: layers.Contest, sparse: Candidate, seconds: float
) -> dict[str, float]:
    """The times of the best direct and Winograd kernels over that of the best sparse one."""
    dense = {
        "direct": contest.fastest(layers.is_direct_dense),
        "winograd": contest.fastest(layers.is_winograd),
    }
    calls = {name: contest.engine(name, c) for name, c in dense.items() if c is not None}
    samples = measure.in_turns([contest.engine("sparse", sparse), *calls.values()], seconds)
    return {name: ratio_interval(samples[name], samples["sparse"]).median for name in calls}


def _crossing_figure(
    against: str,
    found: dict[str, dict[str, list[float]]],
    rival: str,
    kernel: int,
    bars: Bars,
) -> Figure:
    """The median of the layers' crossings, their lowest and highest; 0 where sparse never wins."""
    what = (
        f"nonzeros up to which sparse wins against {against}, {kernel}x{kernel}, median of layers"
    )
    series = [found[name][rival] for name in _layers_of(kernel) if found[name][rival]]
    if not series:
        return Figure(what, *bars, value=None, unit="")
    densities = CROSSING_DENSITIES[kernel]
    at = [layers.crossing(densities[: len(s)], s) or 0.0 for s in series]
    return Figure(what, *bars, value=float(np.median(at)), low=min(at), high=max(at), unit="")


def threads(seconds: float) -> CaseResult:
    """ResNet-50 at 90 %, compiled for and run with one thread and two."""
    model = networks.pruned("resnet50", 0.1)
    with tempfile.TemporaryDirectory() as tmp:
        built = {n: measure.compiled(f"threads{n}", model, Path(tmp), threads=n) for n in (1, 2)}
        feeds = measure.feeds_of(built[1].bundle)
        # Two first: a thread's pool can be made smaller and not larger.
        contestants = [
            measure.bundle_engine(f"{n} threads", built[n].bundle, feeds, n) for n in (2, 1)
        ]
        samples = measure.in_turns(contestants, seconds)
    ratio = ratio_interval(samples["1 threads"], samples["2 threads"])
    details = {"engines": measure.summary(samples)}
    what = "resnet50, 90% zeros, two threads over one"
    return CaseResult((figure(what, 1.8, None, ratio),), details)


def processes(_: float) -> CaseResult:
    """ResNet-50 at 90 %: the start of a process, and its memory."""
    model = networks.pruned("resnet50", 0.1)
    with tempfile.TemporaryDirectory() as tmp:
        built = measure.compiled("resnet50", model, Path(tmp))
        dense = Path(tmp) / "dense.onnx"
        onnx.save(networks.resnet50(), dense)
        ratio, start = process.first_result(built.bundle, dense)
        share, memory = process.resident(built.bundle, model, dense)
    figures = (
        figure("resnet50, 90% zeros, start to first result, over ONNX Runtime", 1, None, ratio),
        Figure(
            "resnet50, 90% zeros, peak memory above the bare runtime, over weights and the "
            "largest pair of activations",
            1.3,
            None,
            share,
            at_most=True,
        ),
    )
    return CaseResult(figures, {"start": start, "memory": memory})


CASES: dict[str, Callable[[float], CaseResult]] = {
    "resnet50": partial(
        network,
        "resnet50",
        (
            Wanted(0.1, (4.5, 6), (3, 4)),
            Wanted(0.05, (6.5, 9), (4.5, 6)),
            Wanted(1.0, (1, 1.3)),
        ),
    ),
    "resnet18": partial(network, "resnet18", (Wanted(0.1, (4, 5)), Wanted(1.0, (1.2, 1.8)))),
    "resnet34": partial(network, "resnet34", (Wanted(0.1, (4.5, 6)),)),
    "vgg16_convs": partial(
        network,
        "vgg16_convs",
        (
            Wanted(0.1, (5.5, 7), (2.5, 3.5)),
            Wanted(0.05, NO_BARS, (4, 6)),
            Wanted(1.0, (1.4, 2.2)),
        ),
    ),
    "vgg16": partial(network, "vgg16", (Wanted(0.1, (6, 8)),)),
    "mobilenet_v1": partial(network, "mobilenet_v1", (Wanted(0.1, (2, 3)), Wanted(1.0, (1, 1.3)))),
    "squeezenet": squeezenet,
    "alexnet": alexnet,
    "layers": single_layers,
    "crossings": crossings,
    "threads": threads,
    "processes": processes,
}
