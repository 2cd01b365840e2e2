"""What goes into the manifest about each layer of a compiled network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models import Net
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.compiled import CompiledModel
from topiarist.compiler.pipeline import compile_model
from topiarist.pruning.one_shot import prune_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network: a dense stem, a pruned layer, a classifier."""
    net = Net()
    x = net.node("Relu", net.conv(net.input(1, 3, 16, 16), 16, 3, name="stem"))
    x = net.node("Relu", net.conv(x, 16, 16, name="pruned"))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    weight = net.constant(net.rng.standard_normal((10, 16)).astype(np.float32), "fc.weight")
    model = net.model(net.node("Gemm", x, weight, name="fc", transB=1))
    folder = tmp_path_factory.mktemp("choices")
    onnx.save(prune_model(model, density=0.2)[0], folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def compiled(folder: Path) -> CompiledModel:
    """Compiled by timing."""
    return compile_model(folder / "model.onnx", output=folder / "model.topi")


def test_the_machine_that_timed_is_described(compiled: CompiledModel) -> None:
    """Its roofline was measured."""
    assert compiled.target.peak_gflops and compiled.target.bandwidth_gbs


def test_every_layer_is_explained(compiled: CompiledModel) -> None:
    """With limits that fit its time, and sentences that name what runs."""
    assert [layer.layer for layer in compiled.layers] == ["stem", "pruned", "fc"]
    for layer in compiled.layers:
        assert layer.limits is not None and layer.run_us is not None
        limits = layer.limits
        assert compiled.target.peak_gflops is not None
        needed = layer.flops_nonzero / compiled.target.peak_gflops / 1e3
        assert limits.compute_us == pytest.approx(needed, abs=1e-3)
        assert limits.far_bytes == 0  # everything fits the second-level cache
        assert limits.share == pytest.approx(limits.compute_us / layer.run_us, abs=0.01)
        assert layer.explanation[0].startswith(f"{layer.kernel} takes ")


def test_the_manifest_keeps_all_of_it(folder: Path, compiled: CompiledModel) -> None:
    """Read back as it was."""
    manifest = read_manifest(folder / "model.topi")
    for kept, layer in zip(manifest.layers, compiled.layers, strict=True):
        assert (kept.limits, kept.explanation) == (layer.limits, layer.explanation)


def test_the_report_finds_what_it_needs(folder: Path, compiled: CompiledModel) -> None:
    """Shapes and patterns of the layers, the network's time, and what else ran."""
    manifest = read_manifest(folder / "model.topi")
    stem, pruned, fc = manifest.layers
    assert (stem.weight_shape, stem.output_shape) == ((16, 3, 3, 3), (1, 16, 16, 16))
    assert (fc.weight_shape, fc.output_shape, fc.strides) == ((10, 16), (1, 10), ())
    assert (stem.pattern, pruned.pattern, pruned.strides) == ("dense", "unstructured", (1, 1))
    assert {layer.timed for layer in manifest.layers} == {"alone"}
    assert manifest.others == compiled.others and manifest.network_us == compiled.network_us
    kinds = [work.kind for work in manifest.others]
    assert "pooling" in kinds and "change of layout" in kinds  # of the input, at least
    assert all(work.run_us > 0 for work in manifest.others)
    assert manifest.network_us is not None
    assert manifest.network_us > sum(work.run_us for work in manifest.others)


def test_estimates_have_no_limits(folder: Path) -> None:
    """Nothing was timed, so no share of anything."""
    compiled = compile_model(folder / "model.onnx", target="x86-avx2", measure=False)
    assert compiled.target.peak_gflops is None
    for layer in compiled.layers:
        assert layer.limits is None and "by estimate" in layer.explanation[0]
        assert layer.timed == "estimate"
    assert compiled.network_us is None and compiled.others == ()
