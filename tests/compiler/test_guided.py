"""Pruning to a latency: a small network through the command line, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

from tests.models import Net, run_onnx
from topiarist.compiler import guided, timed_builds
from topiarist.compiler.cli import app
from topiarist.compiler.compiled import LayerChoice, OtherWork
from topiarist.compiler.contest import TOLERANCE
from topiarist.compiler.guided import Goal, GuidedPruner
from topiarist.compiler.model_files import Source
from topiarist.compiler.report.inputs import read_sweep
from topiarist.errors import BudgetError
from topiarist.pruning.calibration import Images, check_images
from topiarist.pruning.database import Database, build_database
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.level import DENSE
from topiarist.targets import registry
from topiarist.tuning_logs.record import MeasureInput

IMAGES = 24
MATCHING_S = 0.5


def small_network(path: Path) -> Path:
    """A stem and three convolutions of different sizes; ten classes."""
    net = Net(seed=1)
    x = net.node("Relu", net.conv(net.input(1, 3, 16, 16), 16, 3, name="stem"))
    x = net.node("Relu", net.conv(x, 32, 16, name="first"))
    x = net.node("Relu", net.conv(x, 32, 32, name="second"))
    x = net.node("Relu", net.conv(x, 64, 32, 1, name="third"))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    onnx.save(net.model(net.node("Gemm", x, net.weight(10, 64), transB=1, name="fc")), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_network(tmp_path_factory.mktemp("model") / "small.onnx")


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "calib.npz"
    random = np.random.default_rng(0)
    images = random.standard_normal((IMAGES, 3, 16, 16)).astype(np.float32)
    np.savez(path, x=images, labels=random.integers(0, 10, IMAGES))
    return path


@dataclass
class InventedMachine:
    """A network whose layers take what they would by a formula that prices don't know.

    `slowness` is the factor of each layer's true time over its price, where it has zeros.
    """

    model: Path
    slowness: dict[str, float]
    compiled: list[Path] = field(default_factory=list)

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[np.ndarray, np.ndarray]:
        """100 us for any dense layer, 5 us and 120 us times the density for a sparse one."""
        found = np.array(
            [
                5 + 120 * what.sparsity.get("density", 1.0) if "sparse" in what.kernel else 100.0
                for what in whats
            ]
        )
        return found, found

    def layers(self, model: Path) -> tuple[LayerChoice, ...]:
        """What a bundle's manifest would say."""
        return tuple(
            replace(EMPTY, layer=layer.name, run_us=self.run_us(layer.name, layer.weight))
            for layer in weighted_layers(onnx.load(model))
        )

    def run_us(self, name: str, weight: Any) -> float:
        """The true time of a layer."""
        density = np.count_nonzero(weight) / weight.size
        if density == 1:
            return 80.0
        return min(80.0, 0.8 * (5 + 120 * density) * self.slowness.get(name, 1.0))


class StubbornMachine(InventedMachine):
    """Zeros save a fifth of a layer's time at most; fewer channels save as much as they are."""

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[np.ndarray, np.ndarray]:
        """By weights, and by zeros where they are skipped."""
        found = []
        for what in whats:
            names = ("in_channels", "out_channels", "inputs", "outputs")
            size = math.prod(what.workload.get(name, 1) for name in names)
            kernel = math.prod(what.workload.get("kernel", (1, 1)))
            density = what.sparsity.get("density", 1.0) if "sparse" in what.kernel else 1.0
            found.append(1e-2 * size * kernel * (0.8 + 0.2 * density))
        return np.array(found), np.array(found)

    def run_us(self, name: str, weight: Any) -> float:
        """The true time, in which nothing else counts."""
        return 0.9e-2 * weight.size * (0.8 + 0.2 * np.count_nonzero(weight) / weight.size)


EMPTY = LayerChoice("", "conv", "", {}, "", "", 1.0, 0, 0, 0.0, "")


@dataclass(frozen=True)
class _Manifest:
    layers: tuple[LayerChoice, ...]
    others: tuple[OtherWork, ...] = (OtherWork("pool", "pool", 20.0),)

    @property
    def us(self) -> float:
        return sum(layer.run_us or 0.0 for layer in (*self.layers, *self.others))


@pytest.fixture(scope="module")
def database(model: Path, calib: Path, tmp_path_factory: pytest.TempPathFactory) -> Database:
    loaded = onnx.load(model)
    folder = tmp_path_factory.mktemp("calibration")
    return build_database(loaded, images_of(calib, loaded), folder)


def images_of(calib: Path, model: onnx.ModelProto) -> Images:
    return check_images(model, {"x": np.load(calib)["x"]})


MakePruner = Callable[..., GuidedPruner]


@pytest.fixture
def make_pruner(
    database: Database, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakePruner:
    """`make_pruner(machine, even=..., channels=...)`: on an invented machine; nothing compiled."""

    def make(machine: InventedMachine, **options: bool) -> GuidedPruner:
        return _pruner(machine, database, calib, tmp_path, monkeypatch, **options)

    return make


def _pruner(
    machine: InventedMachine,
    database: Database,
    calib: Path,
    folder: Path,
    patch: pytest.MonkeyPatch,
    **options: bool,
) -> GuidedPruner:
    manifests: dict[Path, _Manifest] = {}

    def compile_model(model: Path, *, output: Path, dense: bool = False, **_: Any) -> None:
        manifests[output] = _Manifest(machine.layers(model))
        machine.compiled.append(model)

    def in_turns(bundles: Sequence[Path], threads: int) -> list[list[float]]:
        return [[manifests[bundle].us * 1e-6] * 9 for bundle in bundles]

    patch.setattr(timed_builds, "compile_model", compile_model)
    patch.setattr(timed_builds, "read_manifest", manifests.__getitem__)
    patch.setattr(timed_builds, "_in_turns", in_turns)
    return GuidedPruner(
        machine.model,
        database,
        images_of(calib, onnx.load(machine.model)),
        registry.get("host"),
        Source(machine, "an invention"),
        folder,
        matching_s=MATCHING_S,
        **options,
    )


@pytest.mark.parametrize("speedup", [1.3, 1.8, 2.2])
def test_the_measured_latency_is_the_one_asked_for(
    speedup: float, model: Path, make_pruner: MakePruner
) -> None:
    machine = InventedMachine(model, {"first": 1.5, "second": 0.8})
    pruner = make_pruner(machine)
    assert pruner.dense_us == pytest.approx(5 * 80 + 20)
    found = pruner.prune(Goal(speedup=speedup))
    assert found.reached
    assert found.run_us == pytest.approx(pruner.dense_us / speedup, rel=TOLERANCE)
    assert found.speedup[0] == pytest.approx(speedup, rel=TOLERANCE)
    weights = {layer.name: layer.weight for layer in weighted_layers(found.model)}
    for name, level in found.levels.items():
        kept = np.count_nonzero(weights[name]) / weights[name].size
        assert kept <= level.density + 0.01
    assert np.count_nonzero(weights["stem"]) == weights["stem"].size
    assert np.count_nonzero(weights["fc"]) == weights["fc"].size


def test_a_goal_in_milliseconds(model: Path, make_pruner: MakePruner) -> None:
    machine = InventedMachine(model, {})
    pruner = make_pruner(machine)
    assert pruner.prune(Goal(latency_ms=0.3)).run_us == pytest.approx(300, rel=TOLERANCE)


def test_a_layer_that_zeros_make_no_faster_stays_dense(
    model: Path, make_pruner: MakePruner
) -> None:
    """Prices promise a gain for "second" that the first round shows to be none."""
    machine = InventedMachine(model, {"second": 100.0})
    pruner = make_pruner(machine)
    found = pruner.prune(Goal(speedup=1.4))
    assert found.reached
    assert len(found.rounds) > 1
    assert found.levels["first"] != DENSE
    assert found.rounds[0].measured_us > found.rounds[0].expected_us


def test_what_is_out_of_reach_is_refused_with_what_is_not(
    model: Path, make_pruner: MakePruner
) -> None:
    machine = InventedMachine(model, {})
    pruner = make_pruner(machine)
    reach = pruner.reach
    assert 1 < reach.speedup < 5
    with pytest.raises(BudgetError, match=f"{reach.speedup:.2f}x, is the least"):
        pruner.prune(Goal(speedup=50))
    assert machine.compiled == [model]  # only the dense build was needed to know


def test_channels_are_cut_where_zeros_are_not_enough(model: Path, make_pruner: MakePruner) -> None:
    machine = StubbornMachine(model, {})
    with pytest.raises(BudgetError):
        make_pruner(machine).prune(Goal(speedup=1.6))
    pruner = make_pruner(machine, channels=True)
    assert [network.cut for network in pruner.networks] == [0.0, *guided.CUTS, 0.0]
    found = pruner.prune(Goal(speedup=1.6))
    assert found.cut in guided.CUTS
    assert found.run_us <= (1 + TOLERANCE) * pruner.dense_us / 1.6
    sizes = {layer.name: layer.weight.size for layer in weighted_layers(onnx.load(model))}
    left = {layer.name: layer.weight.size for layer in weighted_layers(found.model)}
    assert sum(left.values()) < 0.9 * sum(sizes.values())
    assert found.density < 0.9
    images = np.zeros((1, 3, 16, 16), np.float32)
    assert run_onnx(found.model, {"x": images})[0].shape == (1, 10)


def test_even_levels_are_the_baseline(model: Path, make_pruner: MakePruner) -> None:
    machine = InventedMachine(model, {})
    pruner = make_pruner(machine, even=True)
    found = pruner.prune(Goal(speedup=1.8))
    assert len({level for level in found.levels.values() if level != DENSE}) == 1


@pytest.mark.parametrize(
    "goal", [{}, {"speedup": 2.0, "latency_ms": 1.0}, {"speedup": 0.0}, {"latency_ms": -1.0}]
)
def test_a_goal_is_one_positive_number(goal: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="one of speedup and latency_ms"):
        Goal(**goal)


def call(*arguments: object) -> Result:
    given = ["prune", *map(str, arguments), "--matching", str(MATCHING_S)]
    return CliRunner().invoke(app, given)


def test_a_family_from_one_calibration(calib: Path, tmp_path: Path) -> None:
    """For real: compiled and timed here. A tiny network's times jump, so none is claimed."""
    net = Net(seed=1)
    x = net.node("Relu", net.conv(net.input(1, 3, 16, 16), 16, 3, name="stem", strides=[2, 2]))
    x = net.node("GlobalAveragePool", net.conv(x, 32, 16, 1, name="wide"))
    onnx.save(net.model(net.node("Flatten", x)), tmp_path / "small.onnx")
    family = tmp_path / "family"
    given = ["--sweep", "1.05", "--calib", calib, "--work", tmp_path / "work", "--json"]
    result = call(tmp_path / "small.onnx", "-o", family, *given)
    if result.exit_code != 0:  # so small a network may get no faster at all
        assert "out of reach" in result.stderr
        return
    document = json.loads(result.stdout)
    assert [Path(one["output"]).name for one in document["pruned"]] == ["small-1.05x.onnx"]
    for one in document["pruned"]:
        assert one["accuracy"]["images"] == IMAGES
        assert onnx.load(one["output"]).graph.node
    sweep = read_sweep(family / "sweep.json")
    assert [point.label for point in sweep.points] == ["dense", "1.05x"]
    assert sweep.quantity == f"top-1 accuracy on {IMAGES} calibration images"


def test_a_density_with_images(model: Path, calib: Path, tmp_path: Path) -> None:
    output = tmp_path / "half.onnx"
    result = call(model, "-o", output, "--density", "0.5", "--calib", calib, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {layer["layer"] for layer in document["layers"]} == {"first", "second", "third"}
    for layer in weighted_layers(onnx.load(output)):
        density = np.count_nonzero(layer.weight) / layer.weight.size
        assert density == pytest.approx(1.0 if layer.name in ("stem", "fc") else 0.5, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speedup", "2"], "need --calib"),
        (["--speedup", "2", "--latency", "1", "--calib", "CALIB"], "one of --speedup"),
        (["--calib", "CALIB"], "give one of --density"),
        (["--speedup", "2", "--density", "0.5", "--calib", "CALIB"], "give one of --density"),
        (["--sweep", "2,x", "--calib", "CALIB"], "--sweep takes speedups"),
        (["--density", "2", "--calib", "CALIB"], "above 0 and at most 1"),
        (["--density", "0.5", "--criterion", "luck", "--calib", "CALIB"], "--criterion takes obs"),
        (["--density", "0.5", "--pattern", "spots", "--calib", "CALIB"], "spots"),
        (["--density", "0.5", "--pattern", "2:4", "--pattern", "block4x1"], "takes one --pattern"),
        (["--density", "0.5", "--calib", "missing.npz"], "missing.npz"),
        (["--speedup", "2", "--calib", "CALIB", "-m", "missing.json"], "missing.json"),
        (["--speedup", "2", "--calib", "CALIB", "--pattern", "filter"], "goes with another one"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], message: str, model: Path, calib: Path, tmp_path: Path
) -> None:
    given = [str(calib) if argument == "CALIB" else argument for argument in arguments]
    result = call(model, "-o", tmp_path / "out.onnx", *given)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out.onnx").exists()
