"""Whole networks, pruned, against ONNX Runtime: the nine light graphs and four trained ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from topiarist.compiler.compiled import CompiledModel
from topiarist.compiler.light_models import light_model, light_names
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.verify import verify
from topiarist.pruning.one_shot import prune_model

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TOLERANCE = 1e-4
IMAGES = 64
QUICK = {"inception_v1", "resnet50", "shufflenet", "squeezenet"}
PRUNED = {"densenet121", "resnet50", "squeezenet"}  # the others stay dense
Array = NDArray[Any]


def compiled_and_verified(
    model: onnx.ModelProto, folder: Path, images: dict[str, Array] | None = None
) -> CompiledModel:
    path, bundle = folder / "model.onnx", folder / "model.topi"
    onnx.save(model, path)
    compiled = compile_model(path, output=bundle, measure=False)
    result = verify(bundle, path, images, tolerance=TOLERANCE)
    assert result.passed, result
    assert result.top1_agreement in (1.0, None), result
    return compiled


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in light_names()],
)
def test_light_models(name: str, tmp_path: Path) -> None:
    model = light_model(name)
    if name in PRUNED:
        model, _ = prune_model(model, density=0.1)
    compiled = compiled_and_verified(model, tmp_path)
    assert any("sparse" in layer.kernel for layer in compiled.layers) == (name in PRUNED)


@pytest.mark.parametrize("name", sorted({*light_names()} - {"vgg19"}))
def test_scores_of_light_models(name: str) -> None:
    """Neither drowned nor so large that a softmax leaves one of them."""
    from tests.models import random_inputs, run_onnx

    model = light_model(name)
    last = model.graph.node[-1]
    if last.op_type == "Softmax":
        model.graph.output[0].name = last.input[0]
        model.graph.output[0].type.tensor_type.ClearField("shape")
        del model.graph.node[-1]
    (scores,) = run_onnx(model, random_inputs(model))
    assert 0.5 < scores.std() < 5


def _pixels(name: str) -> Array:
    """Images of the shared folder, float32 [N, 3, H, W], 0 to 255."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"needs {path}")
    with np.load(path) as file:
        (images,) = (file[key] for key in file.files if file[key].ndim == 4)
    return np.ascontiguousarray(images[:IMAGES].transpose(0, 3, 1, 2), np.float32)


def _standardised(pixels: Array) -> Array:
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return (pixels / np.float32(255) - mean[:, None, None]) / std[:, None, None]


def _centred(pixels: Array) -> Array:
    return pixels - np.float32([123, 117, 104])[:, None, None]


def _symmetric(pixels: Array) -> Array:
    return (pixels - np.float32(127.5)) / np.float32(127.5)


CIFAR, PHOTOS = "cifar10_test500.npz", "ccby_smoke_224_uint8.npz"
TRAINED: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "cifar10_mlperftiny_resnet8": (CIFAR, lambda pixels: pixels),
    "cifar10_resnet20": (CIFAR, _standardised),
    "imagenet_mobilenet_v2_1.0_224": (PHOTOS, _symmetric),
    "imagenet_squeezenet1.0_pruned": (PHOTOS, _centred),
}


@pytest.mark.shared_data
@pytest.mark.parametrize("density", [None, 0.1])
@pytest.mark.parametrize("name", TRAINED)
def test_trained_networks(name: str, density: float | None, tmp_path: Path) -> None:
    """As they are, and pruned, on images."""
    images, prepare = TRAINED[name]
    inputs = prepare(_pixels(images))
    path = SHARED / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    model = onnx.load(path)
    if density is not None:
        model, _ = prune_model(model, density=density)
    weights = {tensor.name for tensor in model.graph.initializer}
    (given,) = (value.name for value in model.graph.input if value.name not in weights)
    compiled_and_verified(model, tmp_path, {given: inputs})
