"""What each layer of a network would take, predicted: with the zeros it has, or with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from topiarist.compiler.choose import (
    LINEAR_KERNELS,
    conv_views,
    layer_error,
    layout_plans,
    linear_shape,
    workload_of,
)
from topiarist.compiler.graph import Conv, Graph, Linear
from topiarist.compiler.layouts import LayoutPlan
from topiarist.compiler.parts import Parts
from topiarist.compiler.recorded import Device, strip
from topiarist.compiler.tune import candidates
from topiarist.compiler.worker import Variant
from topiarist.schedules.cpu.kernels import MAX_SPARSE_DENSITY
from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.kernels import CONV_KERNELS
from topiarist.schedules.workload import SparsitySignature
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.cost_model import LatencyModel
from topiarist.tuning_logs.record import MeasureInput
from topiarist.tuning_logs.roofline import Roofline

SPARSE_KERNELS = frozenset({k.name for k in CONV_KERNELS if k.sparse} | {"sparse_linear"})
SHORTLIST = 24  # candidates of a kernel by estimate, whose times are predicted


class Pricer(Protocol):
    """What predicts the microseconds of candidates inside a network, and an upper bound."""

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        """Expected and upper microseconds."""
        ...


@dataclass(frozen=True)
class Learned:
    """By a latency model."""

    model: LatencyModel

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        """Expected, and the upper quantile."""
        return self.model.predict_us(whats, "in network"), self.model.upper_us(whats, "in network")


@dataclass(frozen=True)
class Analytic:
    """By the formula, which knows no knobs; twice that as the upper bound."""

    roofline: Roofline

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        """Expected, and a rough bound."""
        times = [self.roofline.run_us(w, sparse=w.kernel in SPARSE_KERNELS) for w in whats]
        return np.array(times), 2 * np.array(times)


@dataclass(frozen=True)
class Price:
    """A layer's predicted microseconds with its best candidate, dense and sparse apart."""

    what: MeasureInput = field(repr=False)
    kernel: str
    run_us: float
    upper_us: float
    dense_us: float
    sparse_us: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        names = ("kernel", "run_us", "upper_us", "dense_us", "sparse_us")
        return {name: getattr(self, name) for name in names}


class Prices:
    """The prices of a network's layers in one of its layouts; remembers what it was asked."""

    def __init__(
        self, graph: Graph, layouts: LayoutPlan, parts: Parts, device: Device, pricer: Pricer
    ) -> None:
        self.graph = graph
        self.layouts = layouts
        self.parts = parts
        self.device = device
        self.pricer = pricer
        self.layers = {n.name: n for n in graph.nodes if isinstance(n, Conv | Linear)}
        self._error = layer_error(sum(isinstance(n, Conv) for n in graph.nodes))
        self._places = {
            n.name: (workload_of(n, graph), conv_views(n, layouts))
            for n in graph.nodes
            if isinstance(n, Conv)
        }
        self._variants: dict[Hashable, list[Variant]] = {}
        self._known: dict[Hashable, Price] = {}

    def price(self, layer: str, sparsity: SparsitySignature | None = None) -> Price:
        """The layer's price, with other zeros than it has if they are given."""
        node = self.layers[layer]
        if isinstance(node, Linear):
            key: Hashable = layer, sparsity
            if key not in self._known:
                self._known[key] = self._linear(node, sparsity)
            return self._known[key]
        workload, views = self._places[layer]
        if sparsity is not None:
            workload = replace(workload, sparsity=sparsity)
        key = workload, strip(views)  # layers that are alike share a price
        if key not in self._known:
            self._known[key] = self._conv(layer, self.parts.site(workload, views))
        return self._known[key]

    @property
    def total_us(self) -> float:
        """All layers with the zeros they have."""
        return sum(self.price(name).run_us for name in self.layers)

    def _conv(self, layer: str, site: ConvSite) -> Price:
        variants = shortlist(self._candidates(layer, site), site)
        whats = [self.device.what_conv(site, v.kernel, v.config) for v in variants]
        return self._best(whats, [v.kernel.sparse for v in variants])

    def _candidates(self, layer: str, site: ConvSite) -> list[Variant]:
        """Zeros decide which kernels take a layer; which knobs fit doesn't depend on them."""
        takers = [k.name for k in CONV_KERNELS if k.refuses(site.workload, site.target) is None]
        key = layer, *takers
        if key not in self._variants:
            self._variants[key] = candidates(layer, site, self._error)
        return self._variants[key]

    def _linear(self, node: Linear, sparsity: SparsitySignature | None) -> Price:
        shape = linear_shape(node, self.graph.values[node.inputs[0]].shape[0])
        whats = [self.device.what_linear(node, shape, kernel) for kernel in LINEAR_KERNELS]
        if sparsity is not None:
            density = {"density": sparsity.density}
            whats = [
                replace(w, workload={**w.workload, "sparsity": {**w.sparsity, **density}})
                for w in whats
            ]
        whats = [
            w
            for w in whats
            if w.kernel not in SPARSE_KERNELS or w.sparsity["density"] <= MAX_SPARSE_DENSITY
        ]
        return self._best(whats, [w.kernel in SPARSE_KERNELS for w in whats])

    def _best(self, whats: Sequence[MeasureInput], sparse: Sequence[bool]) -> Price:
        times, upper = self.pricer.prices_us(whats)
        skips = np.array(sparse)
        best = int(np.lexsort((skips, times))[0])  # of equals a dense one
        return Price(
            what=whats[best],
            kernel=whats[best].kernel,
            run_us=float(times[best]),
            upper_us=float(upper[best]),
            dense_us=float(times[~skips].min()),
            sparse_us=float(times[skips].min()) if skips.any() else None,
        )


def shortlist(variants: Sequence[Variant], site: ConvSite) -> list[Variant]:
    """Of each kernel the candidates that promise most by estimate."""
    ranked = sorted(variants, key=lambda v: v.kernel.estimate_us(site, v.config))
    seen: Counter[str] = Counter()
    found = []
    for variant in ranked:
        seen[variant.kernel.name] += 1
        if seen[variant.kernel.name] <= SHORTLIST:
            found.append(variant)
    return found


def open_prices(graph: Graph, target: TargetSpec, threads: int, pricer: Pricer) -> list[Prices]:
    """The prices in each of the layouts that compiling would try, cheapest first."""
    device, parts = Device.here(target, threads), Parts(target, threads)
    found = [
        Prices(graph, layouts, parts, device, pricer)
        for layouts in layout_plans(graph, target.lanes)
    ]
    return sorted(found, key=lambda prices: prices.total_us)
