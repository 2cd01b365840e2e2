"""From a network of ordinary convolutions to DPPNet."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

from torch import nn

from topiarist.errors import TrainingError
from topiarist.pruning.dppnet.layer import DPPConv2d, DPPSettings

_SHORTCUTS = {"downsample", "shortcut"}


def left_alone(model: nn.Module) -> frozenset[str]:
    """The convolutions that stay: the first, 1x1 ones on a shortcut, and what no layer can be.

    A shortcut is known by its name, as in torchvision: `layer2.0.downsample.0`.
    """
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return frozenset(
        name
        for index, (name, conv) in enumerate(convs.items())
        if index == 0
        or (conv.kernel_size == (1, 1) and _SHORTCUTS & set(name.split(".")))
        or conv.groups != 1
        or conv.padding_mode != "zeros"
    )


def convert(
    model: nn.Module,
    settings: DPPSettings | None = None,
    *,
    leave: Collection[str] | None = None,
    copy_weights: bool = True,
) -> nn.Module:
    """A copy of the network with DPP layers for all `Conv2d` but those named in `leave`.

    Without `leave`, `left_alone` says which stay. With `copy_weights` the copy computes what the
    network does, as all experts begin alike; otherwise experts are drawn anew. Raises
    TrainingError if a name in `leave` is none of a convolution, or nothing is left to convert.
    """
    model = copy.deepcopy(model)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    leave = left_alone(model) if leave is None else leave
    if unknown := sorted(set(leave) - set(convs)):
        raise TrainingError(f"No Conv2d is called {unknown[0]!r}; there are {', '.join(convs)}.")
    chosen = [conv for name, conv in convs.items() if name not in leave]
    if not chosen:
        raise TrainingError("The network has no Conv2d to convert: name fewer in `leave`.")
    settings = settings or DPPSettings()
    made = {conv: DPPConv2d(conv, settings, copy_weights=copy_weights) for conv in chosen}
    replace_modules(model, made)
    return model


def replace_modules(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in place of some; one that is used under two names is replaced at both."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            model.set_submodule(name, made[module])
