"""A network to prune: proposals by price, and the few candidates that are compiled for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from tests.models import Net, run_onnx
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.corrections import Corrections
from topiarist.compiler.parts import Parts
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.prices import MOST_OFFERS, SPARSE_KERNELS
from topiarist.compiler.prunable import LEAST_GAIN, Prunable, narrowed
from topiarist.compiler.session import Session
from topiarist.errors import BudgetError
from topiarist.pruning.calibration import check_images
from topiarist.pruning.database import build_database
from topiarist.pruning.level import DENSE
from topiarist.pruning.level_errors import level_errors
from topiarist.targets import registry
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.record import MeasureInput


class ByDensity:
    """100 us for every dense kernel, for sparse ones 10 us and 180 us times the density."""

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[Floats, Floats]:
        times = np.array(
            [
                10 + 180 * what.sparsity["density"] if what.kernel in SPARSE_KERNELS else 100.0
                for what in whats
            ]
        )
        return times, times


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Prunable:
    folder = tmp_path_factory.mktemp("network")
    net = Net(seed=1)
    x = net.node("Relu", net.conv(net.input(1, 3, 12, 12), 16, 3, name="stem"))
    y = net.node("Relu", net.conv(x, 16, 16, name="one"))
    x = net.node("Add", x, net.conv(y, 16, 16, name="two"))
    model = net.model(x)
    onnx.save(model, folder / "model.onnx")
    random = np.random.default_rng(0)
    images = check_images(model, {"x": random.standard_normal((8, 3, 12, 12)).astype(np.float32)})
    database = build_database(model, images, folder / "calibration")
    errors = level_errors(model, database, images)
    place = folder / "model.onnx", model, database, errors, ByDensity(), registry.get("host")
    return Prunable(*place, threads=1, batch=None)


def test_what_gains_next_to_nothing_is_not_offered(network: Prunable) -> None:
    (first, *_) = network.options(network.plans[0])
    dense, *others = first.options
    assert dense.run_us == 100
    assert others[0].level.density > 0.3
    assert all(option.run_us <= (1 - LEAST_GAIN) * 100 for option in others)


def test_a_proposal_takes_what_was_asked_for(network: Prunable) -> None:
    assert network.dense_us == 300
    for way in (network, network.evenly()):
        proposal = way.propose(200.0)
        assert 150 < proposal.expected_us <= 200
    with pytest.raises(BudgetError, match="is out of reach"):
        network.propose(0.9 * network.least_us)


def test_few_candidates_are_compiled_and_one_of_them_runs(
    network: Prunable, tmp_path: Path
) -> None:
    proposal = network.propose(200.0)
    advice = network.advice(proposal)
    levels = proposal.allocation.levels
    for name, found in advice.candidates.items():
        assert 0 < len(found) <= 2 * MOST_OFFERS
        sparse = [candidate.kernel in SPARSE_KERNELS for candidate in found]
        assert sparse[0] == (levels.get(name, DENSE) != DENSE)
    onnx.save(network.with_zeros(levels), tmp_path / "zeros.onnx")
    compile_model(tmp_path / "zeros.onnx", output=tmp_path / "a.topi", advice=advice)
    manifest = read_manifest(tmp_path / "a.topi")
    last = narrowed(advice, manifest)
    for layer in manifest.layers:
        assert layer.run_us is not None
        (won,) = last.candidates[layer.layer]
        assert won in advice.candidates[layer.layer]
        assert (won.kernel, asdict(won.config)) == (layer.kernel, dict(layer.config))
    x = np.random.default_rng(1).standard_normal((1, 3, 12, 12)).astype(np.float32)
    (expected,) = run_onnx(onnx.load(tmp_path / "zeros.onnx"), {"x": x})
    (found,) = Session(tmp_path / "a.topi").run(None, {"x": x})
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_what_was_measured_corrects_prices(network: Prunable, tmp_path: Path) -> None:
    proposal = network.propose(200.0)
    path = tmp_path / "zeros.onnx"
    onnx.save(network.with_zeros(proposal.allocation.levels), path)
    compile_model(path, output=tmp_path / "a.topi", advice=network.advice(proposal))
    manifest = read_manifest(tmp_path / "a.topi")
    network.correct(proposal, manifest, 120.0)
    measured = sum(layer.run_us or 0.0 for layer in manifest.layers)
    others = sum(other.run_us for other in manifest.others)
    assert network.rest_us == pytest.approx(120 * others / (measured + others))


def test_the_sum_is_corrected_at_once_and_single_layers_by_and_by(network: Prunable) -> None:
    """Of two sparse layers one takes 1.6 times its price."""
    way = network.evenly()
    way.corrections = Corrections(way.dense_us)
    proposal = way.propose(200.0)
    levels = proposal.allocation.levels
    assert DENSE not in levels.values()
    priced = {name: o.run_us for name, o in proposal.allocation.options.items()}
    taken = {"stem": 100.0, "one": priced["one"], "two": 1.6 * priced["two"]}
    manifest = _manifest(taken)

    def now() -> dict[str, float]:
        options = way.options(proposal.plan)
        found = {layer.layer: layer.at(levels[layer.layer]) for layer in options}
        return {name: option.run_us for name, option in found.items() if option is not None}

    ratios = []
    for _ in range(3):
        way.correct(proposal, manifest, sum(taken.values()))
        assert sum(now().values()) == pytest.approx(sum(taken.values()) - 100, rel=0.1)
        ratios.append(now()["two"] / now()["one"])
    assert priced["two"] / priced["one"] < ratios[0] < ratios[1] < ratios[2]
    assert ratios[2] == pytest.approx(taken["two"] / taken["one"], rel=0.15)


def test_one_dense_layer_says_little_of_all_others(network: Prunable) -> None:
    """The stem alone was timed dense; what the others would take dense is known from before."""
    way = network.evenly()
    way.corrections = Corrections(way.dense_us)
    way.correct_dense(_manifest(dict.fromkeys(("stem", "one", "two"), 100.0)), 300.0)
    proposal = way.propose(200.0)
    sparse = {name: o.run_us for name, o in proposal.allocation.options.items()}
    way.correct(proposal, _manifest({"stem": 50.0, **sparse}), 50 + sum(sparse.values()))
    dense = [layer.options[0].run_us for layer in way.options(proposal.plan)]
    assert min(dense) > 75  # the common factor would make 50 of it


def _manifest(taken: dict[str, float]) -> Any:
    layers = tuple(SimpleNamespace(layer=name, run_us=us) for name, us in taken.items())
    return SimpleNamespace(layers=layers, others=())


def test_operators_of_two_networks_share_code_only_if_they_are_equal(tmp_path: Path) -> None:
    """A copy with fewer channels has nodes of the same names."""
    parts = Parts(registry.get("host"), 1)
    for channels in (8, 6):
        net = Net(seed=channels)
        x = net.conv(net.input(1, 3, 8, 8), channels, 3, name="stem")
        ends = [net.constant(np.array(v)) for v in ([0, 0], [8, 8], [2, 3], [2, 2])]
        y = net.node("Slice", x, *ends, name="every_second_pixel")
        model = net.model(net.conv(y, 4, channels, 1, name="last"))
        onnx.save(model, tmp_path / "model.onnx")
        compile_model(tmp_path / "model.onnx", output=tmp_path / "a.topi", parts=parts)
        image = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
        (found,) = Session(tmp_path / "a.topi").run(None, {"x": image})
        np.testing.assert_allclose(found, run_onnx(model, {"x": image})[0], atol=1e-3)
