"""Prices of zeros that training makes: what bounds are, and that where zeros lie is seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from tests.models import Net
from topiarist.compiler.prices import SPARSE_KERNELS
from topiarist.compiler.zero_prices import DENSITIES, ZeroPrices
from topiarist.pruning.guidance import Rules, check, start
from topiarist.pruning.layers import weighted_layers
from topiarist.targets import registry
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.record import MeasureInput


class ByDensity:
    """100 us dense, sparse 10 us and 180 us times the density; notes the patterns it is asked."""

    def __init__(self) -> None:
        self.patterns: set[str] = set()

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        self.patterns |= {w.sparsity["pattern"] for w in whats if w.kernel in SPARSE_KERNELS}
        times = np.array(
            [
                10 + 180 * what.sparsity["density"] if what.kernel in SPARSE_KERNELS else 100.0
                for what in whats
            ]
        )
        return times, times


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    net = Net(seed=1)
    x = net.node("Relu", net.conv(net.input("N", 3, 12, 12), 16, 3, name="one"))
    x = net.node("Relu", net.conv(x, 16, 16, name="many", group=16))
    x = net.node("GlobalAveragePool", net.conv(x, 16, 16, name="two"))
    return net.model(net.node("Gemm", net.node("Flatten", x), net.weight(16, 10, name="fc.w")))


@pytest.mark.parametrize("pattern", ["unstructured", "block4x1", "filter", "position"])
def test_bounds_are_those_of_the_fastest_density(model: onnx.ModelProto, pattern: str) -> None:
    pricer = ByDensity()
    names = [layer.name for layer in weighted_layers(model)]
    prices = ZeroPrices(model, names, pattern, pricer, registry.get("host"))
    bounds = prices.bounds()
    assert list(bounds) == names
    least_us = bounds["two"].least_us
    assert least_us is not None and 10 < least_us <= 10 + 180 * max(DENSITIES)
    assert bounds["two"].dense_us == 100
    assert {"position": "kernel"}.get(pattern, pattern) in pricer.patterns


def test_what_is_there_now_is_priced(model: onnx.ModelProto) -> None:
    weights = {layer.name: layer.weight.copy() for layer in weighted_layers(model)}
    prices = ZeroPrices(model, ["one", "two"], "unstructured", ByDensity(), registry.get("host"))
    random = np.random.default_rng(0)
    kept = random.random(weights["two"].shape) < 0.25
    found = prices.sparse_us({"two": weights["two"] * kept})
    assert found["two"] == pytest.approx(10 + 180 * kept.mean(), abs=0.2)
    paths = check(
        start(prices.bounds(), Rules()), {"one": 1, "two": 0.25}, {**found, "one": None}, Rules()
    )
    assert paths["two"].state == "pruned"


def test_a_layer_that_the_compiler_does_not_know_is_excluded(model: onnx.ModelProto) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    pair = [onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), n) for n in ("p.w", "q.w")]
    copy.graph.initializer.extend(pair)
    copy.graph.node.append(onnx.helper.make_node("MatMul", ["p.w", "q.w"], ["pq"], "constant"))
    prices = ZeroPrices(
        copy, ["two", "constant"], "unstructured", ByDensity(), registry.get("host")
    )
    assert start(prices.bounds(), Rules())["constant"].state == "excluded"
    assert prices.sparse_us({"constant": np.ones((2, 2, 1, 1))}) == {"constant": None}
