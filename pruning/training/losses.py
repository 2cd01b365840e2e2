"""What training minimises: a function of the network, images and classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores [N, classes], images, classes [N]


def cross_entropy(scores: Tensor, images: Tensor, classes: Tensor) -> Tensor:
    """Of the labels."""
    return functional.cross_entropy(scores, classes)


def distilled(teacher: nn.Module, temperature: float = 2.0) -> Loss:
    """How far scores are from a trained network's on the same images (Hinton et al., 2015)."""
    teacher.eval()

    def loss(scores: Tensor, images: Tensor, classes: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = functional.log_softmax(teacher(images) / temperature, dim=1)
        found = functional.log_softmax(scores / temperature, dim=1)
        return temperature**2 * functional.kl_div(
            found, wanted, reduction="batchmean", log_target=True
        )

    return loss
