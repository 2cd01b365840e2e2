"""What each layer of a network would take, predicted: with the zeros it has, or with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
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
from topiarist.compiler.parts import ANY_SPARSITY, Parts
from topiarist.compiler.recorded import Device, strip
from topiarist.compiler.tune import candidates_of
from topiarist.compiler.worker import Variant
from topiarist.schedules.cpu.kernels import MAX_SPARSE_DENSITY
from topiarist.schedules.cpu.linear import LinearShape
from topiarist.schedules.kernel import ConvSite, KernelConfig
from topiarist.schedules.kernels import CONV_KERNELS, kernels_for
from topiarist.schedules.workload import ConvWorkload, SparsitySignature, signature
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.cost_model import LatencyModel
from topiarist.tuning_logs.costs import Costs
from topiarist.tuning_logs.features import columns_of, features, table
from topiarist.tuning_logs.record import MeasureInput
from topiarist.tuning_logs.roofline import Roofline

SPARSE_KERNELS = frozenset({k.name for k in CONV_KERNELS if k.sparse} | {"sparse_linear"})
SHORTLIST = 24  # candidates of a kernel by estimate, whose times are predicted
MOST_OFFERS = 4  # candidates of a layer, dense and sparse apart, that are remembered


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
        return self.model.expected_and_upper_us(whats, "in network")


@dataclass(frozen=True)
class Analytic:
    """By the formula, which knows no knobs; twice that as the upper bound."""

    roofline: Roofline

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        """Expected, and a rough bound."""
        times = [self.roofline.run_us(w, sparse=w.kernel in SPARSE_KERNELS) for w in whats]
        return np.array(times), 2 * np.array(times)


@dataclass(frozen=True)
class Counted:
    """By counts at costs that nothing was measured for; twice that as the upper bound."""

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        """Expected, and a rough bound."""
        rows = [features(what) for what in whats]
        columns = columns_of(rows)
        times = Costs.rough().predict_us(table(rows, columns), columns)
        return times, 2 * times


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


@dataclass(frozen=True)
class Offer:
    """A candidate with its predicted time; fully connected kernels have no knobs."""

    what: MeasureInput = field(repr=False)
    config: KernelConfig | None
    run_us: float
    upper_us: float


class Prices:
    """The prices of a network's layers in one of its layouts; layers that are alike share them.

    Dense kernels take the same time whatever the zeros: they are asked for once, without zeros.
    `workloads` are those of the graph's convolutions.
    """

    def __init__(
        self,
        graph: Graph,
        workloads: Mapping[str, ConvWorkload],
        layouts: LayoutPlan,
        parts: Parts,
        device: Device,
        pricer: Pricer,
    ) -> None:
        self.graph = graph
        self.workloads = workloads
        self.layouts = layouts
        self.parts = parts
        self.device = device
        self.pricer = pricer
        self.layers = {n.name: n for n in graph.nodes if isinstance(n, Conv | Linear)}
        self._error = layer_error(len(workloads))
        self._known: dict[Hashable, list[Offer]] = {}

    def price(self, layer: str, sparsity: SparsitySignature | None = None) -> Price:
        """The layer's price, with other zeros than it has if they are given."""
        return self.prices([(layer, sparsity)])[0]

    def prices(self, asked: Sequence[tuple[str, SparsitySignature | None]]) -> list[Price]:
        """As `price`, of many at once, which takes far less time than one by one."""
        return [_price(dense, sparse) for dense, sparse in self.offers(asked)]

    def offers(
        self, asked: Sequence[tuple[str, SparsitySignature | None]]
    ) -> list[tuple[list[Offer], list[Offer]]]:
        """The most promising dense and sparse candidates of each, fastest first."""
        kinds = []
        wanted: dict[Hashable, tuple[str, SparsitySignature | None]] = {}
        for layer, zeros in asked:
            place = self.place(layer)
            sparsity = self._own(layer) if zeros is None else zeros
            kinds.append(((place, None), (place, sparsity)))
            wanted |= {(place, None): (layer, None), (place, sparsity): (layer, sparsity)}
        self._find({key: one for key, one in wanted.items() if key not in self._known})
        return [(self._known[dense], self._known[sparse]) for dense, sparse in kinds]

    def _find(self, wanted: Mapping[Hashable, tuple[str, SparsitySignature | None]]) -> None:
        """Ask for the best dense (no zeros) or sparse candidates, all of them at once."""
        candidates = {key: self._candidates(*one) for key, one in wanted.items()}
        whats = [what for some in candidates.values() for what, _ in some]
        times, upper = self.pricer.prices_us(whats) if whats else (np.empty(0), np.empty(0))
        prices = zip(times.tolist(), upper.tolist(), strict=True)
        for key, some in candidates.items():
            found = [Offer(*one, *next(prices)) for one in some]
            self._known[key] = sorted(found, key=lambda offer: offer.run_us)[:MOST_OFFERS]

    @property
    def total_us(self) -> float:
        """All layers with the zeros they have."""
        return sum(price.run_us for price in self.prices([(name, None) for name in self.layers]))

    def place(self, layer: str) -> Hashable:
        """What layers have in common whose prices differ by their zeros alone."""
        node = self.layers[layer]
        if isinstance(node, Linear):
            return self._shape(node)
        views = strip(conv_views(node, self.layouts))
        return replace(self.workloads[layer], sparsity=ANY_SPARSITY), views

    def _own(self, layer: str) -> SparsitySignature:
        """The zeros that a layer has."""
        node = self.layers[layer]
        if isinstance(node, Conv):
            return self.workloads[layer].sparsity
        density = float(np.count_nonzero(node.weight)) / max(node.weight.size, 1)
        return SparsitySignature(round(density, 3), "any", (0, 0, 0))

    def _candidates(
        self, layer: str, sparsity: SparsitySignature | None
    ) -> list[tuple[MeasureInput, KernelConfig | None]]:
        """Those of dense kernels where no zeros are given, else those of sparse ones."""
        node = self.layers[layer]
        if isinstance(node, Linear):
            return self._linear(node, sparsity)
        sparse = sparsity is not None
        if sparsity is None:
            sparsity = signature(np.ones(node.weight.shape, np.float32), "dense")
        workload = replace(self.workloads[layer], sparsity=sparsity)
        site = self.parts.site(workload, conv_views(node, self.layouts))
        kernels = [k for k in kernels_for(site.target) if k.mixes or k.sparse == sparse]
        variants = candidates_of(kernels, site, self._error)
        return [
            (self.device.what_conv(site, v.kernel, v.config), v.config)
            for v in shortlist(variants, site)
        ]

    def _shape(self, node: Linear) -> LinearShape:
        return linear_shape(node, self.graph.values[node.inputs[0]].shape[0])

    def _linear(
        self, node: Linear, sparsity: SparsitySignature | None
    ) -> list[tuple[MeasureInput, KernelConfig | None]]:
        density = {"density": 1.0 if sparsity is None else sparsity.density}
        whats = [
            self.device.what_linear(node, self._shape(node), kernel)
            for kernel in LINEAR_KERNELS
            if (kernel in SPARSE_KERNELS) == (sparsity is not None)
            and (sparsity is None or sparsity.density <= MAX_SPARSE_DENSITY)
        ]
        return [
            (replace(w, workload={**w.workload, "sparsity": {**w.sparsity, **density}}), None)
            for w in whats
        ]


def _price(all_dense: Sequence[Offer], all_sparse: Sequence[Offer]) -> Price:
    dense, sparse = all_dense[0], next(iter(all_sparse), None)
    best = dense if sparse is None or dense.run_us <= sparse.run_us else sparse
    return Price(
        what=best.what,
        kernel=best.what.kernel,
        run_us=best.run_us,
        upper_us=best.upper_us,
        dense_us=dense.run_us,
        sparse_us=None if sparse is None else sparse.run_us,
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


def all_prices(graph: Graph, device: Device, threads: int, pricer: Pricer) -> list[Prices]:
    """The prices in each of the layouts that compiling would try."""
    parts = Parts(device.target, threads)
    workloads = {n.name: workload_of(n, graph) for n in graph.nodes if isinstance(n, Conv)}
    return [
        Prices(graph, workloads, layouts, parts, device, pricer)
        for layouts in layout_plans(graph, parts)
    ]


def open_prices(graph: Graph, target: TargetSpec, threads: int, pricer: Pricer) -> list[Prices]:
    """Those of `all_prices` on this machine or the target's, cheapest first."""
    found = all_prices(graph, Device.of(target, threads), threads, pricer)
    return sorted(found, key=lambda prices: prices.total_us)
