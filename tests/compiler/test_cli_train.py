"""`topiarist train-prune`, from a file and images to a bundle; interrupted; and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner, Result

from tests.models import Net, run_onnx
from topiarist.compiler import cli_train
from topiarist.compiler.cli import app
from topiarist.compiler.session import Session
from topiarist.pruning.layers import weighted_layers

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason='needs PyTorch: pip install "topiarist[train]"',
)
SHORT = ("--rounds", 3, "--tune-rounds", 2, "--steps", 4, "--batch-size", 8, "--lr", 0.02)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = Net(seed=2)
    x = net.node("Relu", net.batch_norm(net.conv(net.input("N", 3, 8, 8), 16, 3, name="a"), 16))
    y = net.node("Relu", net.conv(x, 16, 16, name="b"))
    x = net.node("GlobalAveragePool", net.node("Add", x, net.conv(y, 16, 16, name="c")))
    x = net.node("Gemm", net.node("Flatten", x), net.weight(4, 16), net.weight(4), transB=1)
    onnx.save(net.model(x), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).standard_normal((16, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", x=pixels, labels=np.arange(16) % 4)
    return tmp_path / "images.npz"


@needs_torch
def test_from_a_file_to_a_bundle(model: Path, images: Path, tmp_path: Path) -> None:
    output, bundle = tmp_path / "pruned.onnx", tmp_path / "pruned.topi"
    result = call(
        *("train-prune", model, "--data", images, "-o", output, "--bundle", bundle, *SHORT),
        *("--unguided", "--shift", 1, "--json"),
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    weights = {v.name: v.weight for v in weighted_layers(onnx.load(output))}
    nonzero = sum(np.count_nonzero(w) for w in weights.values())
    assert document["density"] == nonzero / sum(w.size for w in weights.values()) < 0.9
    assert [one["layer"] for one in document["layers"]] == list(weights)
    assert {one["state"] for one in document["layers"]} == {"frozen"}
    assert document["accuracy"]["images"] == 16
    assert document["source"] is None
    x = np.load(images)["x"][:1]
    (expected,) = run_onnx(onnx.load(output), {"x": x})
    (found,) = Session(bundle).run(None, {"x": x})
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    assert not list(tmp_path.glob("*.checkpoint"))


@needs_torch
def test_guided_by_the_formula(model: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned.onnx"
    result = call("train-prune", model, "--data", images, "-o", output, "--distil", *SHORT)
    assert result.exit_code == 0, result.output
    assert "predicted by the analytic formula" in result.stdout
    assert "what was done" in result.stdout


def _interrupting(after: int) -> Callable[..., Any]:
    @contextmanager
    def progress_bar(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
        def progress(stage: str, done: int, total: int) -> None:
            if done == after:
                raise KeyboardInterrupt

        yield progress

    return progress_bar


@needs_torch
def test_the_same_command_goes_on(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.onnx", tmp_path / "parts.onnx"
    options = ("train-prune", model, "--data", images, *SHORT, "--unguided", "-o")
    assert call(*options, whole).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(cli_train, "progress_bar", _interrupting(after=2))
        result = call(*options, parts)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    other = call(*options, parts, "--seed", 1)
    assert other.exit_code == 2
    assert "other settings" in other.stderr
    assert call(*options, parts).exit_code == 0
    assert parts.read_bytes() == whole.read_bytes()


@needs_torch
def test_what_is_refused(model: Path, images: Path, tmp_path: Path) -> None:
    options = ("train-prune", model, *SHORT, "-o", tmp_path / "pruned.onnx", "--data")
    pixels = np.load(images)["x"]
    np.savez(tmp_path / "bare.npz", x=pixels)
    np.savez(tmp_path / "odd.npz", x=pixels, labels=np.arange(16))
    for arguments, message in (
        ((images, "--method", "magic"), "surgery, lasso"),
        ((tmp_path / "bare.npz",), "array `labels`"),
        ((tmp_path / "odd.npz",), "4 classes"),
        ((images, "--lr", 0), "learning rate"),
        ((images, "--bundle", tmp_path), "bundle"),
    ):
        result = call(*options, *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and message in result.stderr


def test_without_torch_the_extra_is_named(model: Path, images: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from topiarist.compiler.cli import main\n"
        f"sys.argv = ['topiarist', 'train-prune', {str(model)!r}, '--data', {str(images)!r},"
        " '-o', 'pruned.onnx']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('error: training needs PyTorch: pip install "topiarist[train]"')
