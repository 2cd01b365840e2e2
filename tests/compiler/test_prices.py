"""Prices: of many layers at once, shared by those that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from tests.models import Net
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.graph import Graph
from topiarist.compiler.prices import SPARSE_KERNELS, Prices, all_prices
from topiarist.compiler.recorded import Device
from topiarist.compiler.simplify import simplify
from topiarist.pruning.one_shot import prune_model
from topiarist.schedules.workload import SparsitySignature
from topiarist.targets import registry
from topiarist.tuning_logs.cost_model import Floats
from topiarist.tuning_logs.record import MeasureInput

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
