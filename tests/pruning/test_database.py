"""The database of reconstructions: right values, and safe against everything that stops it."""

import errno
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.pruning.networks import near, small_images, small_network
from topiarist.errors import OutputError
from topiarist.pruning import database as module
from topiarist.pruning.batch_scale import output_scale
from topiarist.pruning.calibration import check_images
from topiarist.pruning.database import build_database
from topiarist.pruning.layers import replace_weights, weighted_layers
from topiarist.pruning.level import DENSE, Level, levels_of
from topiarist.pruning.masks import unstructured_mask
from topiarist.pruning.moments import gather_moments
from topiarist.pruning.patterns import find_pattern
from topiarist.pruning.removal import output_energy

PATTERNS = ("unstructured", "block4x1", "2:4", "kernel4")
MODEL = small_network()
IMAGES = check_images(MODEL, {"x": small_images()})
LAYERS = {layer.name: layer for layer in weighted_layers(MODEL)}


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("database")
    return {
        criterion: build_database(MODEL, IMAGES, folder, patterns=PATTERNS, criterion=criterion)
        for criterion in ("obs", "magnitude")
    }


@pytest.fixture(scope="module")
def moments():
    layers = list(LAYERS.values())
    return dict(zip(LAYERS, gather_moments(MODEL, layers, IMAGES), strict=True))


def test_stem_depthwise_and_classifier_stay_dense_unless_named(databases, tmp_path):
    assert databases["obs"].layers == ("conv1", "conv2", "grouped", "point")
    named = build_database(MODEL, IMAGES, tmp_path, layers=["fc", "stem"])
    assert named.layers == ("stem", "fc")
    level = near("unstructured", 0.2)
    assert level in named.levels("fc")
    assert np.count_nonzero(named.weight("fc", level)) == round(160 * level.density)


def test_levels_are_those_of_the_patterns_that_suit_a_layer(databases):
    wide = [level for pattern in PATTERNS for level in levels_of(pattern)]
    assert databases["obs"].levels("conv1") == tuple(wide)
    assert Level("kernel4", 4 / 9) not in databases["obs"].levels("point")


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
@pytest.mark.parametrize("layer", ["conv1", "grouped", "point"])
def test_weights_have_the_level_and_the_error_that_is_promised(
    databases, moments, criterion, layer
):
    database, dense = databases[criterion], LAYERS[layer]
    scale = output_scale(MODEL, dense)
    energy = output_energy(dense.weight, scale, moments[layer])
    for level in database.levels(layer)[::3]:
        weight = database.weight(layer, level)
        assert weight.dtype == np.float32
        assert np.count_nonzero(weight) / weight.size == pytest.approx(level.density, abs=0.006)
        lost = output_energy(weight - dense.weight, scale, moments[layer])
        assert lost / energy == pytest.approx(database.error(layer, level), rel=0.03, abs=2e-3)
    assert database.error(layer, DENSE) == 0
    assert (database.weight(layer, DENSE) == dense.weight).all()


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
def test_weights_have_the_pattern(databases, criterion):
    found = {
        pattern: str(find_pattern(databases[criterion].weight("conv1", near(pattern, density))))
        for pattern, density in (("2:4", 0.5), ("kernel4", 4 / 9), ("block4x1", 0.3))
    }
    assert found == {"2:4": "2:4", "kernel4": "kernel", "block4x1": "block4x1"}


def test_reconstruction_loses_less_than_magnitude_at_every_level(databases):
    obs, magnitude = databases["obs"], databases["magnitude"]
    for layer in obs.layers:
        for level in obs.levels(layer):
            assert obs.error(layer, level) <= magnitude.error(layer, level) + 1e-9


def test_errors_rise_as_density_falls(databases):
    errors = [databases["obs"].error("conv1", v) for v in levels_of("unstructured")]
    assert errors == sorted(errors)


def test_a_scale_of_the_batch_norm_moves_the_zeros_to_its_small_channels(tmp_path):
    model = small_network()
    node = next(n for n in model.graph.node if n.op_type == "BatchNormalization")
    gain = np.ones(16, np.float32)
    gain[:8] = 0.01
    for tensor in model.graph.initializer:
        if tensor.name == node.input[1]:
            tensor.CopyFrom(numpy_helper.from_array(gain, tensor.name))
    database = build_database(model, IMAGES, tmp_path, layers=["conv1"])
    weight = database.weight("conv1", near("unstructured", 0.5))
    assert np.count_nonzero(weight[8:]) > 4 * np.count_nonzero(weight[:8])


@pytest.mark.parametrize("criterion", ["obs", "magnitude"])
def test_a_pruned_model_keeps_its_zeros(tmp_path, criterion):
    model = small_network()
    layer = next(v for v in weighted_layers(model) if v.name == "conv1")
    mask = unstructured_mask(np.abs(layer.weight), 0.5)
    replace_weights(model, {layer.weight_name: np.where(mask, layer.weight, 0).astype("f4")})
    database = build_database(
        model, IMAGES, tmp_path, patterns=["unstructured", "block4x1"], criterion=criterion
    )
    levels = database.levels("conv1")
    assert max(level.density for level in levels) < 0.5
    for level in levels[::5]:
        assert not database.weight("conv1", level)[~mask].any()
    assert database.error("conv1", levels[0]) < 0.02


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    first = build_database(MODEL, IMAGES, tmp_path, patterns=PATTERNS[:2])
    monkeypatch.setattr(module, "gather_moments", None)
    monkeypatch.setattr(module, "order_removals", None)
    second = build_database(MODEL, IMAGES, tmp_path, patterns=PATTERNS[:2])
    for layer in first.layers:
        for level in first.levels(layer):
            assert first.error(layer, level) == second.error(layer, level)


class Stopped(BaseException):
    """As KeyboardInterrupt, from a progress display."""


def test_a_stopped_build_goes_on_where_it_was(tmp_path, monkeypatch, databases):
    def stop(step):
        if step.layer == "grouped" and step.what == "unstructured":
            raise Stopped

    with pytest.raises(Stopped):
        build_database(MODEL, IMAGES, tmp_path, progress=stop)
    made = []
    order = module.order_removals
    monkeypatch.setattr(
        module, "order_removals", lambda layer, *a: made.append(layer.name) or order(layer, *a)
    )
    monkeypatch.setattr(module, "gather_moments", None)
    found = build_database(MODEL, IMAGES, tmp_path)
    assert made == ["grouped", "point"]
    level = levels_of("unstructured")[10]
    for layer in found.layers:
        assert found.error(layer, level) == databases["obs"].error(layer, level)


def test_progress_rises_to_the_end(tmp_path):
    steps = []
    build_database(MODEL, IMAGES, tmp_path, patterns=PATTERNS, progress=steps.append)
    shares = [s.share for s in steps if s.what != "calibration"]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert {s.what for s in steps} == {"calibration", *PATTERNS}


@pytest.mark.parametrize("kind", ["moments", "obs.unstructured"])
def test_torn_files_are_made_again(tmp_path, databases, kind):
    build_database(MODEL, IMAGES, tmp_path)
    (path,) = tmp_path.glob(f"*conv1.{kind}.npz")
    whole = path.read_bytes()
    for torn in (b"", whole[: len(whole) // 2], b"no archive"):
        path.write_bytes(torn)
        found = build_database(MODEL, IMAGES, tmp_path)
        level = levels_of("unstructured")[10]
        assert found.error("conv1", level) == databases["obs"].error("conv1", level)
    shutil.copy(next(tmp_path.glob(f"*conv2.{kind}.npz")), path)


def test_a_folder_of_another_model_or_of_other_images_is_refused(tmp_path):
    build_database(MODEL, IMAGES, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="of other weights; name another folder or delete"):
        build_database(small_network(seed=1), IMAGES, tmp_path)
    with pytest.raises(OutputError, match="of other images; name another folder or delete"):
        build_database(MODEL, IMAGES.first(20), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    save, written = np.savez, []

    def full(file, **arrays):
        if len(written) == 6:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file.name)
        save(file, **arrays)

    monkeypatch.setattr(module.np, "savez", full)
    with pytest.raises(OutputError, match=r"No space left on device; what is finished stays"):
        build_database(MODEL, IMAGES, tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 6
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(module.np, "savez", save)
    monkeypatch.setattr(module, "gather_moments", None)
    assert len(build_database(MODEL, IMAGES, tmp_path).layers) == 4


def test_a_folder_that_can_t_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't make the folder"):
        build_database(MODEL, IMAGES, tmp_path / "file" / "deeper")


def test_wrong_names_are_refused(tmp_path, databases):
    with pytest.raises(ValueError, match=r"no layer 'conv3' .* did you mean conv"):
        build_database(MODEL, IMAGES, tmp_path, layers=["conv3"])
    with pytest.raises(ValueError, match="pattern '4:2': expected"):
        build_database(MODEL, IMAGES, tmp_path, patterns=["4:2"])
    with pytest.raises(ValueError, match="point has no level kernel4"):
        databases["obs"].weight("point", Level("kernel4", 4 / 9))


KILLED = """
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx

from topiarist.pruning.calibration import check_images
from topiarist.pruning.database import build_database

model = onnx.load("model.onnx")
images = check_images(model, {"x": np.load("images.npy")})
build_database(model, images, Path("database"), progress=lambda step: print(step.what, flush=True))
"""


def test_a_killed_build_leaves_what_it_finished(tmp_path):
    onnx.save(MODEL, tmp_path / "model.onnx")
    np.save(tmp_path / "images.npy", IMAGES.arrays["x"])
    command = [sys.executable, "-c", KILLED]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "unstructured":
                process.kill()
                break
    left = {p.name: p.read_bytes() for p in (tmp_path / "database").glob("*.moments.npz")}
    assert len(left) == 4
    found = build_database(onnx.load(tmp_path / "model.onnx"), IMAGES, tmp_path / "database")
    assert len(found.layers) == 4
    after = {name: (tmp_path / "database" / name).read_bytes() for name in left}
    assert after == left
