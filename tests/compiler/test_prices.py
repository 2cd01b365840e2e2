"""Prices: of many layers at once, shared by those that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.models import Net
from topiarist.compiler.choose import conv_views
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Conv, Graph
from topiarist.compiler.prices import (
    SHORTLIST,
    SPARSE_KERNELS,
    Analytic,
    Prices,
    all_prices,
    open_prices,
    shortlist,
)
from topiarist.compiler.recorded import Device
from topiarist.compiler.simplify import simplify
from topiarist.compiler.tune import candidates
from topiarist.pruning.one_shot import prune_model
from topiarist.schedules.kernels import CONV_KERNELS
from topiarist.schedules.workload import SparsitySignature
from topiarist.targets import registry
from topiarist.tuning_logs import features
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.record import MeasureInput
from topiarist.tuning_logs.roofline import LayerWork, Roofline

TWENTIETH = SparsitySignature(0.05, "unstructured", (5, 14, 23))


class Counting:
    """Takes nonzeros for time, with some overhead for kernels that skip zeros."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        self.calls.append(len(whats))
        times = np.array([self.us(what) for what in whats])
        return times, 2 * times

    def us(self, what: MeasureInput) -> float:
        tile = what.config.get("rows", 1) * what.config.get("cols", 1)
        return 1 + 1 / tile + (300 * what.sparsity["density"] if self.skips(what) else 100)

    def skips(self, what: MeasureInput) -> bool:
        return what.kernel in SPARSE_KERNELS


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Two layers that are alike, a larger one and a classifier; the first three are pruned."""
    net = Net()
    x = net.input(1, 16, 8, 8)
    x = net.conv(x, 16, 16, name="one")
    x = net.conv(x, 16, 16, name="two")
    x = net.conv(x, 32, 16, name="three")
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    x = net.node("Gemm", x, net.weight(10, 32), name="fc", transB=1)
    densities = dict.fromkeys(("one", "two", "three"), 0.1)
    model, _ = prune_model(net.model(x), density=1, layer_density=densities)
    return simplify(extract_layers(import_model(model)))


@pytest.fixture
def prices(graph: Graph) -> Prices:
    device = Device.named(registry.get("x86-avx2"), 1)
    return all_prices(graph, device, 1, Counting())[0]


def test_many_at_once_are_as_one_by_one(prices: Prices, graph: Graph) -> None:
    """But the pricer is asked once."""
    asked = [(name, zeros) for name in prices.layers for zeros in (None, TWENTIETH)]
    together = prices.prices(asked)
    assert isinstance(prices.pricer, Counting) and len(prices.pricer.calls) == 1
    alone = all_prices(graph, prices.device, 1, Counting())[0]
    assert [alone.price(*one) for one in asked] == together
    assert prices.prices(asked) == together and len(prices.pricer.calls) == 1
    assert prices.prices([]) == []


def test_layers_that_are_alike_share(prices: Prices) -> None:
    first = prices.price("one", TWENTIETH)
    asked = list(prices.pricer.calls)  # type: ignore[attr-defined]
    assert prices.price("two", TWENTIETH) == first and prices.place("one") == prices.place("two")
    assert prices.pricer.calls == asked  # type: ignore[attr-defined]
    assert prices.place("three") != prices.place("one")


def test_the_best_kernel_decides(prices: Prices) -> None:
    """Sparse below a third here; a dense kernel takes the same time whatever the zeros."""
    sparse, dense = (
        prices.price("one", TWENTIETH),
        prices.price("one", replace(TWENTIETH, density=0.7)),
    )
    assert sparse.kernel in SPARSE_KERNELS and sparse.run_us == sparse.sparse_us
    assert dense.kernel not in SPARSE_KERNELS and dense.run_us == dense.dense_us
    assert sparse.dense_us == dense.dense_us and sparse.upper_us == 2 * sparse.run_us
    assert dense.sparse_us is not None and dense.sparse_us > dense.run_us
    assert prices.price("one", replace(TWENTIETH, density=0.9)).sparse_us is None
    assert prices.price("fc").kernel == "dense_linear"
    assert prices.price("fc", TWENTIETH).kernel == "sparse_linear"


def test_the_sum_is_of_layers_with_their_zeros(prices: Prices) -> None:
    assert prices.total_us == pytest.approx(sum(prices.price(n).run_us for n in prices.layers))
    assert prices.price("one") != prices.price("one", TWENTIETH)


FORMULA = Roofline(dense_gflops=100.0, bandwidth_gbs=10.0, alpha=2.5)


class Formula:
    """The analytic model, noting what it is asked."""

    def __init__(self) -> None:
        self.asked: list[MeasureInput] = []

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        self.asked += whats
        return Analytic(FORMULA).prices_us(whats)


def zeros(density: float, pattern: str = "unstructured") -> SparsitySignature:
    n = round(288 * density)
    return SparsitySignature(density, pattern, (n // 2, n, n * 2))


@pytest.fixture
def formula() -> Formula:
    return Formula()


@pytest.fixture
def priced(graph: Graph, formula: Formula) -> Prices:
    return open_prices(graph, registry.get("host"), 1, formula)[0]


def test_the_cheapest_layouts_come_first(graph: Graph, formula: Formula) -> None:
    found = open_prices(graph, registry.get("host"), 1, formula)
    totals = [one.total_us for one in found]
    assert len(found) > 1 and totals == sorted(totals)
    total = sum(found[0].price(name).run_us for name in found[0].layers)
    assert totals[0] == pytest.approx(total)


@pytest.mark.parametrize("layer", ["one", "three", "fc"])
def test_zeros_never_cost(priced: Prices, layer: str) -> None:
    """However many: the dense kernels are the same, and the best of all counts."""
    dense = priced.price(layer, zeros(1.0, "dense"))
    assert dense.sparse_us is None and dense.run_us == dense.dense_us
    before = dense.run_us
    for density in (0.9, 0.7, 0.5, 0.3, 0.1, 0.03):
        price = priced.price(layer, zeros(density))
        assert price.dense_us == dense.dense_us
        assert price.run_us == min(price.dense_us, price.sparse_us or np.inf)
        assert price.run_us <= before and price.upper_us >= price.run_us
        assert (price.kernel in SPARSE_KERNELS) == (price.run_us < price.dense_us)
        before = price.run_us
    assert before < dense.run_us


def test_the_analytic_price_is_that_of_the_formula(priced: Prices) -> None:
    price = priced.price("one", zeros(0.1))
    work = LayerWork.of(price.what)
    assert work is not None and work.density == 0.1
    assert price.run_us == FORMULA.sparse_us(work)
    assert price.dense_us == FORMULA.dense_us(work)


def test_a_pattern_that_a_kernel_is_made_for_is_offered_to_it(
    priced: Prices, formula: Formula
) -> None:
    formula.asked.clear()
    priced.price("one", zeros(0.1, "block4x1"))
    assert "block_sparse" in {what.kernel for what in formula.asked}
    formula.asked.clear()
    priced.price("one", zeros(1.0, "dense"))
    assert not {what.kernel for what in formula.asked} & SPARSE_KERNELS


def test_the_shortlist_has_the_best_of_each_kernel(priced: Prices) -> None:
    (node, *_) = (n for n in priced.graph.nodes if isinstance(n, Conv))
    site = priced.parts.site(priced.workloads[node.name], conv_views(node, priced.layouts))
    variants = candidates("one", site, 1e-4)
    found = shortlist(variants, site)
    for kernel in {variant.kernel.name for variant in variants}:
        times = sorted(
            v.kernel.estimate_us(site, v.config) for v in variants if v.kernel.name == kernel
        )
        listed = [v.kernel.estimate_us(site, v.config) for v in found if v.kernel.name == kernel]
        assert listed == times[:SHORTLIST]


def test_as_json(priced: Prices) -> None:
    document = priced.price("one", zeros(0.1)).to_json()
    assert {*document} == {"kernel", "run_us", "upper_us", "dense_us", "sparse_us"}


def test_features_know_which_kernels_skip_zeros() -> None:
    """The features can't ask the kernels, whose import would bring TVM."""
    assert features._SKIP_ZEROS == SPARSE_KERNELS
    assert {k.name for k in CONV_KERNELS if not k.sparse}.isdisjoint(features._SKIP_ZEROS)
