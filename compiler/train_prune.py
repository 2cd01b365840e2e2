"""Guided sparsity learning from an ONNX file and labelled images to a pruned ONNX file."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import inliner

from topiarist.compiler.prices import Pricer
from topiarist.compiler.zero_prices import ZeroPrices
from topiarist.errors import TrainingError
from topiarist.pruning.calibration import Images
from topiarist.pruning.gsl.onnx_network import OnnxNetwork
from topiarist.pruning.gsl.pruner import density, prunable_layers
from topiarist.pruning.gsl.training import GslSettings, RoundReport, train_guided
from topiarist.pruning.guidance import EveryZeroPays, Paths
from topiarist.pruning.layers import weighted_layers
from topiarist.pruning.training.batches import ImageBatches
from topiarist.pruning.training.losses import cross_entropy, distilled
from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class Teaching:
    """How images are used: `shift` as in `ImageBatches`; `distil` asks the dense network, and no
    label, what an image is."""

    batch: int = 64
    shift: int | None = None
    distil: bool = False


@dataclass(frozen=True)
class Trained:
    """A network that was pruned in training; `density` is of all layers that could be pruned."""

    model: onnx.ModelProto = field(repr=False)
    paths: Paths
    density: float


def train_prune(
    model: onnx.ModelProto,
    images: Images,
    settings: GslSettings,
    teaching: Teaching,
    pricer: Pricer | None,
    target: TargetSpec,
    *,
    threads: int = 1,
    batch: int | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[RoundReport], None] = lambda report: None,
) -> Trained:
    """Train on images [N, ...] with labels; without a pricer every layer is pruned, unguided.

    `threads` and `batch` are what the network will run with. Raises TrainingError, ModelError.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    network = OnnxNetwork(model)
    found = {id(module) for module in prunable_layers(network).values()}
    layers = {name: module for name, module in network.layers.items() if id(module) in found}
    (inputs,) = images.arrays.values()
    pixels = torch.from_numpy(inputs)
    classes = _classes(network, pixels, images, teaching)
    prices = (
        EveryZeroPays(layers)
        if pricer is None
        else ZeroPrices(
            *(model, layers, settings.method.pattern, pricer, target), threads=threads, batch=batch
        )
    )
    paths = train_guided(
        network,
        layers,
        ImageBatches(pixels, classes, teaching.batch, shift=teaching.shift),
        prices,
        settings,
        loss=distilled(copy.deepcopy(network)) if teaching.distil else cross_entropy,
        checkpoint=checkpoint,
        origin=_origin(model, images, teaching, guided=pricer is not None),
        progress=progress,
    )
    pruned = network.to_onnx()
    weights = {v.name: v.weight for v in weighted_layers(pruned) if v.name in layers}
    return Trained(pruned, paths, density(weights))


def _classes(
    network: OnnxNetwork, pixels: torch.Tensor, images: Images, teaching: Teaching
) -> torch.Tensor:
    """The labels, if they are classes of the network."""
    with torch.no_grad():
        shape = tuple(network.eval()(pixels[:2]).shape)
    if len(shape) != 2:
        raise TrainingError(f"Training needs scores [N, classes], the output is {list(shape)}.")
    if images.labels is None:
        if not teaching.distil:
            raise TrainingError(
                "Training needs an array `labels` beside the images, or --distil, which asks the "
                "dense network."
            )
        return torch.zeros(len(pixels), dtype=torch.int64)
    if not 0 <= images.labels.min() <= images.labels.max() < shape[1]:
        raise TrainingError(
            f"Labels are {images.labels.min()} to {images.labels.max()}, but the network has "
            f"{shape[1]} classes, counted from 0."
        )
    return torch.from_numpy(images.labels)


def _origin(
    model: onnx.ModelProto, images: Images, teaching: Teaching, *, guided: bool
) -> dict[str, Any]:
    """What a checkpoint is of, besides the settings."""
    labels = b"" if images.labels is None else np.ascontiguousarray(images.labels).tobytes()
    return {
        "model": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        "images": images.digest(),
        "labels": hashlib.sha256(labels).hexdigest(),
        "guided": guided,
        **asdict(teaching),
    }
