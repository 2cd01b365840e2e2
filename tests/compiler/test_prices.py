"""What layers would take: dense kernels stay at hand, and nothing is asked twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from topiarist.compiler.choose import LINEAR_KERNELS
from topiarist.compiler.graph import Conv, Graph, Linear, Value, View
from topiarist.compiler.prices import (
    SHORTLIST,
    SPARSE_KERNELS,
    Analytic,
    Prices,
    open_prices,
    shortlist,
)
from topiarist.compiler.tune import candidates
from topiarist.schedules.kernels import CONV_KERNELS
from topiarist.schedules.workload import SparsitySignature
from topiarist.targets import registry
from topiarist.tuning_logs import features
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.record import MeasureInput
from topiarist.tuning_logs.roofline import LayerWork, Roofline

FORMULA = Roofline(dense_gflops=100.0, bandwidth_gbs=10.0, alpha=2.5)


@dataclass
class Counting:
    """The formula, counting what it is asked."""

    asked: list[MeasureInput] = field(default_factory=list)

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        self.asked += whats
        return Analytic(FORMULA).prices_us(whats)


def net() -> Graph:
    """Four 3x3 layers, two of them in the same layouts; a 1x1 layer, a fully connected one."""
    random = np.random.default_rng(0)
    shapes = {**dict.fromkeys(("first", "a", "b", "last"), (64, 64, 3, 3)), "c": (32, 64, 1, 1)}
    weights = {n: random.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    values = {"x": Value("x", (1, 64, 14, 14))}
    nodes: list[Conv | View | Linear] = []
    for before, (name, weight) in zip(("x", *weights), weights.items(), strict=False):
        pad = weight.shape[2] // 2
        bias = np.zeros(len(weight), np.float32)
        nodes.append(
            Conv(name=name, inputs=(before,), output=name, weight=weight, bias=bias,
                 padding=(pad,) * 4)
        )  # fmt: skip
        values[name] = Value(name, (1, len(weight), 14, 14))
    nodes.append(View(name="flat", inputs=("c",), output="flat"))
    values["flat"] = Value("flat", (1, 32 * 14 * 14))
    weight = random.standard_normal((16, 32 * 14 * 14)).astype(np.float32)
    bias = np.zeros(16, np.float32)
    nodes.append(Linear(name="fc", inputs=("flat",), output="fc", weight=weight, bias=bias))
    values["fc"] = Value("fc", (1, 16))
    return Graph(tuple(nodes), values, ("x",), ("fc",))


def zeros(density: float, pattern: str = "unstructured") -> SparsitySignature:
    n = round(288 * density)
    return SparsitySignature(density, pattern, (n // 2, n, n * 2))


@pytest.fixture
def pricer() -> Counting:
    return Counting()


@pytest.fixture
def prices(pricer: Counting) -> Prices:
    return open_prices(net(), registry.get("host"), 1, pricer)[0]


def test_the_cheapest_layouts_come_first(pricer: Counting) -> None:
    found = open_prices(net(), registry.get("host"), 1, pricer)
    totals = [prices.total_us for prices in found]
    assert len(found) > 1 and totals == sorted(totals)
    total = sum(found[0].price(name).run_us for name in ("first", "a", "b", "last", "c", "fc"))
    assert totals[0] == pytest.approx(total)


@pytest.mark.parametrize("layer", ["a", "c", "fc"])
def test_zeros_never_cost(prices: Prices, layer: str) -> None:
    """However many: the dense kernels are the same, and the best of all counts."""
    dense = prices.price(layer)
    assert dense.sparse_us is None and dense.run_us == dense.dense_us
    before = dense.run_us
    for density in (0.9, 0.7, 0.5, 0.3, 0.1, 0.03):
        price = prices.price(layer, zeros(density))
        assert price.dense_us == dense.dense_us
        assert price.run_us == min(price.dense_us, price.sparse_us or np.inf)
        assert price.run_us <= before and price.upper_us >= price.run_us
        assert (price.kernel in SPARSE_KERNELS) == (price.run_us < price.dense_us)
        before = price.run_us
    assert before < dense.run_us


def test_the_analytic_price_is_that_of_the_formula(prices: Prices) -> None:
    price = prices.price("a", zeros(0.1))
    work = LayerWork.of(price.what)
    assert work is not None and work.density == 0.1
    assert price.run_us == FORMULA.sparse_us(work)
    assert price.dense_us == FORMULA.dense_us(work)


def test_layers_alike_cost_alike_and_prices_are_remembered(
    prices: Prices, pricer: Counting
) -> None:
    first = prices.price("a", zeros(0.2))
    count = len(pricer.asked)
    assert prices.price("a", zeros(0.2)) is first
    assert prices.price("b", zeros(0.2)) == first
    assert len(pricer.asked) == count
    assert prices.price("c", zeros(0.2)) != first


def test_a_pattern_that_a_kernel_is_made_for_is_offered_to_it(
    prices: Prices, pricer: Counting
) -> None:
    pricer.asked.clear()
    prices.price("a", zeros(0.1, "block4x1"))
    assert "block_sparse" in {what.kernel for what in pricer.asked}
    pricer.asked.clear()
    prices.price("a", zeros(1.0, "dense"))
    assert not {what.kernel for what in pricer.asked} & SPARSE_KERNELS


def test_a_fully_connected_layer_with_other_zeros(prices: Prices, pricer: Counting) -> None:
    pricer.asked.clear()
    price = prices.price("fc", zeros(0.1))
    assert {what.kernel for what in pricer.asked} == {*LINEAR_KERNELS}
    assert {what.sparsity["density"] for what in pricer.asked} == {0.1}
    assert price.kernel == "sparse_linear"


def test_the_shortlist_has_the_best_of_each_kernel(prices: Prices) -> None:
    workload, views = prices._places["a"]
    site = prices.parts.site(workload, views)
    variants = candidates("a", site, 1e-4)
    found = shortlist(variants, site)
    for kernel in {variant.kernel.name for variant in variants}:
        times = sorted(
            v.kernel.estimate_us(site, v.config) for v in variants if v.kernel.name == kernel
        )
        listed = [v.kernel.estimate_us(site, v.config) for v in found if v.kernel.name == kernel]
        assert listed == times[:SHORTLIST]


def test_as_json(prices: Prices) -> None:
    document = prices.price("a", zeros(0.1)).to_json()
    assert {*document} == {"kernel", "run_us", "upper_us", "dense_us", "sparse_us"}


def test_features_know_which_kernels_skip_zeros() -> None:
    """The features can't ask the kernels, whose import would bring TVM."""
    assert features._SKIP_ZEROS == SPARSE_KERNELS
    assert {k.name for k in CONV_KERNELS if not k.sparse}.isdisjoint(features._SKIP_ZEROS)
