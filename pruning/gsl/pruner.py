"""The hook that prunes while any loop trains: zeros after every step of any optimizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from topiarist.errors import TrainingError
from topiarist.pruning.gsl.methods import Method, Update

Mode = Literal["dense", "pruned", "frozen"]


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The 2-D convolutions and fully connected layers by name, but those that share a weight."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    owners: dict[int, int] = {}
    for module in found.values():
        owners[id(module.weight)] = owners.get(id(module.weight), 0) + 1
    return {name: m for name, m in found.items() if owners[id(m.weight)] == 1}


@dataclass
class _Layer:
    """One weight. `hidden` are the values that zeros would come back with, if any can."""

    weight: nn.Parameter
    groups: int
    dense: Tensor
    mask: Tensor
    mode: Mode = "dense"
    hidden: Tensor | None = None
    before: Tensor | None = None

    def show(self) -> None:
        """Exact zeros where the mask says so, and never a negative zero."""
        self.weight.masked_fill_(~self.mask, 0.0)


class Pruner:
    """Prunes some layers of a network during training.

    The network's own weights hold exact zeros whenever an optimizer isn't at work, so that it can
    be run, saved and exported at any time. All layers begin as dense. Raises TrainingError where
    there are none.
    """

    def __init__(self, layers: Mapping[str, nn.Module], method: Method) -> None:
        if not layers:
            raise TrainingError("The network has no Conv2d or Linear to prune.")
        self.method = method
        self.step = 0
        self._layers: dict[str, _Layer] = {}
        for name, module in layers.items():
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            groups = int(getattr(module, "groups", 1))
            dense = weight.detach().clone()
            self._layers[name] = _Layer(weight, groups, dense, torch.ones_like(dense, dtype=bool))
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on each `optimizer.step()` prunes; in place of the optimizer before."""
        for hook in self._hooks:
            hook.remove()
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before()),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]

    def modes(self) -> dict[str, Mode]:
        """What is done with each layer."""
        return {name: layer.mode for name, layer in self._layers.items()}

    def weights(self, layers: Collection[str]) -> dict[str, NDArray[Any]]:
        """Copies as they are now, [O, C / groups, kh, kw] each."""
        return {name: _four(self._layers[name].weight).cpu().numpy().copy() for name in layers}

    def prune(self, layers: Collection[str]) -> None:
        """Prune these too, from what they are now."""
        for name in layers:
            layer = self._layers[name]
            if layer.mode != "pruned":
                layer.mode = "pruned"
                layer.hidden = layer.weight.detach().clone() if self.method.splices else None

    def freeze(self, name: str) -> None:
        """Keep the zeros of a layer that was pruned, whatever an optimizer does."""
        layer = self._layers[name]
        layer.mode, layer.hidden = "frozen", None
        layer.mask = layer.weight.detach() != 0

    def restore(self, name: str) -> None:
        """Give a layer the weights that it came with, and its optimizer nothing to go on from."""
        layer = self._layers[name]
        layer.mode, layer.hidden = "dense", None
        with torch.no_grad():
            layer.weight.copy_(layer.dense)
        layer.mask.fill_(True)
        if self._optimizer is not None:
            self._optimizer.state.pop(layer.weight, None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that isn't the network's or the optimizer's, as tensors and plain values."""
        parts = ("dense", "mask", "mode", "hidden")
        layers = {n: {p: getattr(v, p) for p in parts} for n, v in self._layers.items()}
        return {"step": self.step, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From `state_dict`; KeyError or RuntimeError if it is of another network."""
        saved = state["layers"]
        if set(saved) != set(self._layers):
            raise KeyError(f"layers {', '.join(sorted(set(saved) ^ set(self._layers)))}")
        for name, layer in self._layers.items():
            for part in ("dense", "mask"):
                getattr(layer, part).copy_(saved[name][part])
            layer.mode = saved[name]["mode"]
            hidden = saved[name]["hidden"]
            layer.hidden = None if hidden is None else hidden.to(layer.weight.device).clone()
        self.step = state["step"]

    def _before(self) -> None:
        with torch.no_grad():
            for layer in self._layers.values():
                if layer.mode == "pruned":
                    self._pull(layer)
                elif layer.mode == "frozen" and layer.weight.grad is not None:
                    layer.weight.grad.masked_fill_(~layer.mask, 0.0)

    def _pull(self, layer: _Layer) -> None:
        pull = self.method.pull(_four(layer.weight), layer.groups)
        if pull is not None and layer.weight.grad is not None:
            layer.weight.grad.add_(pull.view_as(layer.weight))
        if layer.hidden is not None:
            layer.weight.copy_(layer.hidden)
        layer.before = layer.weight.detach().clone()

    def _after(self) -> None:
        with torch.no_grad():
            for name, layer in self._layers.items():
                if layer.mode == "pruned":
                    self._mask(name, layer)
                if layer.mode != "dense":
                    layer.show()
        self.step += 1

    def _mask(self, name: str, layer: _Layer) -> None:
        assert layer.before is not None
        tensors = (layer.dense, layer.mask, layer.before, layer.weight)
        four = (_four(tensor) for tensor in tensors)
        kept = self.method.keep(Update(name, layer.groups, self.step, *four))
        if kept.any():  # a layer without weights would cut the network in two
            layer.mask = kept.view_as(layer.weight)
        layer.before = None
        if layer.hidden is not None:
            layer.hidden.copy_(layer.weight)


def _four(weight: Tensor) -> Tensor:
    """Fully connected weights as 1x1 convolutions."""
    return weight.detach().reshape(*weight.shape, *(1,) * (4 - weight.ndim))


def density(weights: Mapping[str, NDArray[Any]]) -> float:
    """The share of nonzeros in all of them."""
    nonzero = sum(int(np.count_nonzero(weight)) for weight in weights.values())
    return nonzero / max(1, sum(weight.size for weight in weights.values()))
