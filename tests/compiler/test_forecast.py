"""The latency model's word on a bundle: every layer, every density, and only the right model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from tests.models import Net
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.cli import app
from topiarist.compiler.compiled import OtherWork
from topiarist.compiler.extract import extract_layers
from topiarist.compiler.frontend import import_model
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.prices import all_prices
from topiarist.compiler.recorded import Device
from topiarist.compiler.report.forecast import DENSITIES, forecast
from topiarist.compiler.report.inputs import Curve, Predictions
from topiarist.compiler.simplify import simplify
from topiarist.errors import BundleError, CostModelError
from topiarist.pruning.one_shot import prune_model
from topiarist.targets import registry
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.cost_model import Dataset, LatencyModel
from topiarist.tuning_logs.costs import Costs
from topiarist.tuning_logs.features import columns_of, features, table
from topiarist.tuning_logs.record import MeasureInput

NAMES = ["one", "two", "three", "fc"]


def save(path: Path, **densities: float) -> Path:
    net = Net()
    x = net.input(1, 16, 8, 8)
    x = net.conv(x, 16, 16, name="one")
    x = net.conv(x, 16, 16, name="two")
    x = net.conv(x, 32, 16, name="three")
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    x = net.node("Gemm", x, net.weight(10, 32), name="fc", transB=1)
    onnx.save(prune_model(net.model(x), density=1, layer_density=densities)[0], path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers that are alike and pruned, a third one that isn't, and a classifier."""
    return save(tmp_path_factory.mktemp("model") / "net.onnx", one=0.1, two=0.1)


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    """Chosen by estimate, for a device that this machine is not, with its roofline stated."""
    target = dataclasses.replace(
        registry.get("x86-avx2"), device_model="Some CPU", peak_gflops=100.0, bandwidth_gbs=10.0
    )
    compile_model(model, target=target, measure=False, output=model.with_name("net.topi"))
    return model.with_name("net.topi")


@pytest.fixture(scope="module")
def measured(bundle: Path) -> Manifest:
    """As if it had been timed."""
    manifest = read_manifest(bundle)
    layers = tuple(dataclasses.replace(c, run_us=10.0 + i) for i, c in enumerate(manifest.layers))
    others = (OtherWork("pool", "pooling", 4.0),)
    return dataclasses.replace(manifest, layers=layers, others=others, network_us=51.0)


@pytest.fixture(scope="module")
def latency_model(bundle: Path, model: Path) -> Path:
    """Trained on all candidates, as if rough costs were true."""
    manifest, seen = read_manifest(bundle), Seen()
    graph = simplify(extract_layers(import_model(model)))
    for prices in all_prices(graph, Device.named(manifest.target, 1), 1, seen):
        prices.prices([(name, None) for name in prices.layers])
    rows = tuple(map(features, seen.whats))
    columns = columns_of(rows)
    times = Costs.rough().predict_us(table(rows, columns), columns)
    data = Dataset(tuple(seen.whats), rows, np.zeros(len(rows), np.bool_), times)
    path = model.with_name("latency.json")
    LatencyModel.train(data, {"records": len(data)}).save(path)
    return path


class Seen:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.whats: list[MeasureInput] = []

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        self.whats += whats
        return np.ones(len(whats)), np.ones(len(whats))


def curve_of(predictions: Predictions, layer: str | None) -> Curve:
    return next(curve for curve in predictions.curves if curve.layer == layer)


def test_every_layer_and_the_network(bundle: Path, model: Path) -> None:
    """By the formula: more zeros are never slower, and nothing is called measured."""
    predictions = forecast(read_manifest(bundle), model)
    assert list(predictions.layer_us) == NAMES and "analytic formula" in predictions.source
    assert [curve.layer for curve in predictions.curves] == [*NAMES, None]
    for curve in predictions.curves:
        assert curve.measured is None
        times = [us for _, us in curve.points()]
        assert times == sorted(times, reverse=True)
    assert curve_of(predictions, "one").densities == DENSITIES
    assert curve_of(predictions, "one").microseconds == curve_of(predictions, "two").microseconds
    one = curve_of(predictions, "one")
    assert one.microseconds[-1] < predictions.layer_us["one"] < one.microseconds[0]
    assert predictions.layer_us["three"] == curve_of(predictions, "three").microseconds[0]


def test_the_network_is_its_parts(measured: Manifest, model: Path) -> None:
    """Pruned layers at one density, the others as they are, and the work without weights."""
    predictions = forecast(measured, model)
    network, one = curve_of(predictions, None), curve_of(predictions, "one")
    rest = predictions.layer_us["three"] + predictions.layer_us["fc"] + 4.0
    assert network.microseconds == pytest.approx([2 * us + rest for us in one.microseconds])
    pruned, fixed = 2 * 16 * 16 * 9, 32 * 16 * 9 + 320
    assert network.densities[-1] == pytest.approx((0.01 * pruned + fixed) / (pruned + fixed))
    assert network.measured is not None and network.measured[1] == 51.0
    assert network.measured[0] == pytest.approx((0.1 * pruned + fixed) / (pruned + fixed), rel=0.01)
    assert one.measured == (measured.layers[0].density, 10.0)
    layers = dataclasses.replace(measured, others=(), network_us=None)
    measured_us = curve_of(forecast(layers, model), None).measured
    assert measured_us is not None and measured_us[1] == 10 + 11 + 12 + 13


def test_of_a_network_without_zeros(tmp_path: Path, bundle: Path) -> None:
    """All layers are pruned in the network's curve."""
    dense = save(tmp_path / "dense.onnx")
    manifest = read_manifest(bundle)
    layers = tuple(dataclasses.replace(layer, density=1.0) for layer in manifest.layers)
    predictions = forecast(dataclasses.replace(manifest, layers=layers), dense)
    assert curve_of(predictions, None).densities == pytest.approx(DENSITIES)


def test_by_a_latency_model(bundle: Path, model: Path, latency_model: Path) -> None:
    predictions = forecast(read_manifest(bundle), model, latency_model)
    assert "latency.json" in predictions.source and "records)" in predictions.source
    one = curve_of(predictions, "one")
    assert one.microseconds[-1] < predictions.layer_us["one"] < one.microseconds[0]


def test_a_latency_model_of_another_device_is_refused(
    bundle: Path, model: Path, latency_model: Path
) -> None:
    manifest = read_manifest(bundle)
    for change in ({"threads": 2}, {"target": registry.get("x86-avx2")}):
        with pytest.raises(CostModelError, match="the latency model is for"):
            forecast(dataclasses.replace(manifest, **change), model, latency_model)


def test_only_the_model_that_was_compiled(bundle: Path, tmp_path: Path) -> None:
    """Says which layer tells it apart, and where the right file was."""
    manifest = read_manifest(bundle)
    other = save(tmp_path / "other.onnx", one=0.1, two=0.3)
    with pytest.raises(BundleError, match=r"30\.0 % of the weights of two .*net\.onnx"):
        forecast(manifest, other)
    with pytest.raises(BundleError, match="it lacks four"):
        (*rest, last) = manifest.layers
        layers = (*rest, dataclasses.replace(last, layer="four"))
        forecast(dataclasses.replace(manifest, layers=layers), other)
    with pytest.raises(BundleError, match="it has 4 layers, not 3"):
        forecast(dataclasses.replace(manifest, layers=manifest.layers[:3]), other)
    with pytest.raises(BundleError, match="another order"):
        forecast(dataclasses.replace(manifest, layers=manifest.layers[::-1]), other)
    with pytest.raises(BundleError, match="one has weights 16x16x3x3, not 8x16x3x3"):
        first = dataclasses.replace(manifest.layers[0], weight_shape=(8, 16, 3, 3))
        forecast(dataclasses.replace(manifest, layers=(first, *manifest.layers[1:])), other)


def test_the_command(bundle: Path, model: Path, latency_model: Path, tmp_path: Path) -> None:
    """The model may be found by itself; the page says who predicts."""
    page = tmp_path / "report.html"
    base = ["report", str(bundle), "-o", str(page)]
    for more in (["--latency-model", str(latency_model)], ["--model", str(model)]):
        result = CliRunner().invoke(app, [*base, *more, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["plot"] is None
        text = page.read_text()
        assert 'id="next"' in text and 'id="curves"' in text
        assert ("latency.json" in text) == ("--latency-model" in more)
    result = CliRunner().invoke(app, [*base, "--latency-model", str(tmp_path / "no.json")])
    assert result.exit_code == 2 and "there is no latency model" in result.stderr
