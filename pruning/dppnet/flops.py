"""Multiply-adds of a network with DPP layers, for one image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topiarist.pruning.dppnet.layer import DPPConv2d


@dataclass(frozen=True)
class LayerFlops:
    """Multiply-adds of a layer. `overhead` is what mixing kernels and attention add."""

    name: str
    dense: int
    kept: int
    overhead: int = 0
    union: int | None = None  # kernel positions that any expert keeps, of a DPP layer


@dataclass(frozen=True)
class FlopsReport:
    """All layers with weights, in the order of their first use."""

    layers: tuple[LayerFlops, ...]

    @property
    def dense(self) -> int:
        """Of the network without masks and experts."""
        return sum(layer.dense for layer in self.layers)

    @property
    def kept(self) -> int:
        """On the unions of masks: the authors' count, which leaves the overhead out."""
        return sum(layer.kept for layer in self.layers)

    @property
    def overhead(self) -> int:
        """Mixing kernels and attention."""
        return sum(layer.overhead for layer in self.layers)

    @property
    def reduction(self) -> float:
        """The share saved, 0 to 1, as the authors count."""
        return 1 - self.kept / self.dense


def count_flops(model: nn.Module, image: Tensor) -> FlopsReport:
    """Run the network on one image, [1, C, H, W], and count at each layer."""
    if len(image) != 1:
        raise ValueError(f"needs one image, got a batch of {len(image)}")
    counted: list[LayerFlops] = []

    def hook(name: str) -> Any:
        return lambda module, inputs, output: counted.append(_counted(name, module, output))

    within = {m for dpp in model.modules() if isinstance(dpp, DPPConv2d) for m in dpp.modules()}
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, DPPConv2d)
        or (isinstance(module, nn.Conv2d | nn.Linear) and module not in within)
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(image)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return FlopsReport(tuple(counted))


def _counted(name: str, module: nn.Module, output: Tensor) -> LayerFlops:
    if isinstance(module, nn.Linear):
        dense = output.numel() * module.in_features
        return LayerFlops(name, dense, dense)
    if not isinstance(module, DPPConv2d):
        dense = output.numel() * math.prod(module.weight.shape[1:])
        return LayerFlops(name, dense, dense)
    out, into, *kernel = module.weight.shape[1:]
    masks, union = int(module.masks().sum()), int(module.union().sum())
    each = output.numel() * into
    squeeze, excite = module.attention.squeeze, module.attention.excite
    overhead = out * into * masks + squeeze.weight.numel() + excite.weight.numel()
    return LayerFlops(name, each * math.prod(kernel), each * union, overhead, union)
