"""What the latency model says of a bundle's layers: with the zeros they have, and with others."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from topiarist.compiler.graph import Conv, Graph, Linear
from topiarist.compiler.layouts import LayoutPlan
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.model_files import open_source
from topiarist.compiler.prices import Prices, all_prices
from topiarist.compiler.read_graph import read_graph
from topiarist.compiler.recorded import Device
from topiarist.compiler.report.inputs import Curve, Point, Predictions
from topiarist.errors import BundleError
from topiarist.pruning.level import BLOCK_ROWS, Level
from topiarist.pruning.patterns import DENSE_FROM
from topiarist.pruning.signatures import signatures_at
from topiarist.schedules.workload import SparsitySignature

DENSITIES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)

Times = tuple[float, ...]  # microseconds at DENSITIES


def forecast(manifest: Manifest, model: Path, latency_model: Path | None = None) -> Predictions:
    """The predictions for a bundle; `model` is the ONNX file that it was compiled from.

    Without `latency_model` the user's counts, and without one for the bundle's target the analytic
    formula. Raises ModelError, CostModelError, BundleError if the model isn't the bundle's.
    """
    batch = next((tensor.shape[0] for tensor in manifest.inputs if tensor.shape), None)
    graph = read_graph(model, manifest.target, batch=batch)
    check_model(manifest, graph, model)
    device = _device(manifest)
    source = open_source(manifest.target, manifest.threads, latency_model, device)
    every = all_prices(graph, device, manifest.threads, source.pricer)
    prices = max(every, key=lambda one: _alike(manifest, graph, one.layouts))
    own = prices.prices([(name, None) for name in prices.layers])
    times = _times(prices)
    layer_us = {name: price.run_us for name, price in zip(prices.layers, own, strict=True)}
    curves = [
        Curve(layer.layer, DENSITIES, times[layer.layer], _measured(layer.density, layer.run_us))
        for layer in manifest.layers
    ]
    return Predictions(source.name, layer_us, (*curves, _network(manifest, graph, layer_us, times)))


def check_model(manifest: Manifest, graph: Graph, model: Path) -> None:
    """Raise BundleError unless the file has the bundle's layers, with as many zeros."""
    nodes = [node for node in graph.nodes if isinstance(node, Conv | Linear)]
    again = "give the ONNX file that the bundle was compiled from"
    if manifest.source is not None:
        again += f" ({manifest.source.path})"
    names, wanted = [node.name for node in nodes], [layer.layer for layer in manifest.layers]
    if names != wanted:
        missing = next((name for name in wanted if name not in names), None)
        what = "its layers come in another order" if missing is None else f"it lacks {missing}"
        if missing is None and len(names) > len(wanted):
            what = f"it has {len(names)} layers, not {len(wanted)}"
        raise BundleError(f"{model} is not this bundle's model: {what}; {again}")
    for node, layer in zip(nodes, manifest.layers, strict=True):
        if layer.weight_shape and layer.weight_shape != node.weight.shape:
            have, want = ("x".join(map(str, s)) for s in (node.weight.shape, layer.weight_shape))
            raise BundleError(f"{model}: {node.name} has weights {have}, not {want}; {again}")
        density = float(np.count_nonzero(node.weight)) / node.weight.size
        if layer.density is not None and abs(density - layer.density) > 1e-6:
            raise BundleError(
                f"{model}: {100 * density:.1f} % of the weights of {node.name} are not zero, in "
                f"the bundle {100 * layer.density:.1f} %; {again}"
            )


def _device(manifest: Manifest) -> Device:
    """The one that the bundle was compiled on, this one where it doesn't say."""
    named = bool(manifest.target.device_model)
    return (Device.named if named else Device.here)(manifest.target, manifest.threads)


def _alike(manifest: Manifest, graph: Graph, layouts: LayoutPlan) -> int:
    """How many layers have the bundle's layouts."""
    bundle = {c.layer: (c.input_layout, c.output_layout) for c in manifest.layers}
    return sum(
        bundle[node.name]
        == tuple(
            str(getattr(place.view, "layout", place.view))
            for place in (layouts.reads[node.name][0], layouts.places[node.output])
        )
        for node in graph.nodes
        if isinstance(node, Conv | Linear)
    )


def _times(prices: Prices) -> dict[str, Times]:
    """Each layer's predicted times in its pattern; layers that are alike share them."""
    groups: dict[tuple[Hashable, str], list[str]] = {}
    for name in prices.layers:
        groups.setdefault((prices.place(name), _pattern(prices, name)), []).append(name)
    asked: list[tuple[str, SparsitySignature | None]] = []
    for (_, pattern), names in groups.items():
        node = prices.layers[names[0]]
        levels = [Level(pattern, density) for density in DENSITIES]
        weight = node.weight if isinstance(node, Conv) else node.weight[:, :, None, None]
        share = node.groups if isinstance(node, Conv) else 1
        asked += [(names[0], found) for found in signatures_at(weight, levels, share)]
    found = prices.prices(asked)
    times: dict[str, Times] = {}
    for i, names in enumerate(groups.values()):
        part = found[i * len(DENSITIES) : (i + 1) * len(DENSITIES)]
        times |= dict.fromkeys(names, tuple(price.run_us for price in part))
    return times


def _pattern(prices: Prices, name: str) -> str:
    """The one that a layer has, where it can be had at any density."""
    own = prices.workloads[name].sparsity.pattern if name in prices.workloads else ""
    return own if own in BLOCK_ROWS else "unstructured"


def _measured(density: float | None, us: float | None) -> Point | None:
    return (density, us) if density and us else None


def _network(
    manifest: Manifest,
    graph: Graph,
    layer_us: dict[str, float],
    times: dict[str, Times],
) -> Curve:
    """All pruned layers at one density, the others as they are; all, where none is pruned."""
    sizes = {n.name: n.weight.size for n in graph.nodes if isinstance(n, Conv | Linear)}
    density = {layer.layer: layer.density or 1.0 for layer in manifest.layers}
    pruned = {name for name in sizes if density[name] < DENSE_FROM} or set(sizes)
    fixed = [name for name in sizes if name not in pruned]
    all_weights = sum(sizes.values())
    fixed_weights = sum(sizes[name] * density[name] for name in fixed)
    pruned_weights = sum(sizes[name] for name in pruned)
    others_us = sum(work.run_us for work in manifest.others)
    fixed_us = others_us + sum(layer_us[name] for name in fixed)
    nonzero = fixed_weights + sum(sizes[name] * density[name] for name in pruned)
    return Curve(
        None,
        tuple((fixed_weights + d * pruned_weights) / all_weights for d in DENSITIES),
        tuple(fixed_us + sum(times[n][i] for n in pruned) for i in range(len(DENSITIES))),
        _measured(nonzero / all_weights, _measured_us(manifest)),
    )


def _measured_us(manifest: Manifest) -> float | None:
    """The network's time, or that of its layers where nothing else was timed."""
    layers: Sequence[float | None] = [layer.run_us for layer in manifest.layers]
    known = [us for us in layers if us]
    if not known or len(known) < len(layers):
        return None
    if manifest.network_us and manifest.others:
        return manifest.network_us
    return sum(known) + sum(work.run_us for work in manifest.others)
