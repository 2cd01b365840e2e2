"""What networks are trained on: any iterable of batches, or labelled images in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

Batches = Iterable[tuple[Tensor, Tensor]]  # images [N, C, H, W] and classes [N]


class ImageBatches:
    """Shuffled batches of images [N, C, H, W] and classes [N], all of one size.

    `shift` pixels are the most that an image is moved by, zeros coming in, and half of the images
    are mirrored; None leaves images as they are. All is drawn from torch's random numbers.
    """

    def __init__(
        self, images: Tensor, classes: Tensor, size: int, *, shift: int | None = None
    ) -> None:
        self.images, self.classes = images, classes
        self.size = min(size, len(images))
        self.shift = shift

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images))
        for begin in range(0, len(order) - self.size + 1, self.size):
            picked = order[begin : begin + self.size]
            images = self.images[picked]
            if self.shift is not None:
                images = moved(images, self.shift)
            yield images, self.classes[picked]


def moved(images: Tensor, shift: int) -> Tensor:
    """Each image moved by up to `shift` pixels along both axes, and maybe mirrored."""
    height, width = images.shape[2:]
    padded = functional.pad(images, [shift] * 4)
    places = torch.randint(0, 2 * shift + 1, (len(images), 2)).tolist()
    parts = [
        image[:, top : top + height, left : left + width]
        for image, (top, left) in zip(padded, places, strict=True)
    ]
    mirrored = torch.rand(len(images)) < 0.5
    found = torch.stack(parts)
    return torch.where(mirrored[:, None, None, None], found.flip(3), found)
