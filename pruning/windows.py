"""Where the windows of convolutions and poolings lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from topiarist.pruning.layers import attribute

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A window that moves over planes; pairs are for height and width.

    `before` are the zeros above and left, `size` is the number of windows, and `padded` how large
    planes must be with their padding, so that all windows lie inside. `behind` is what of it is
    padding below and right that counts as such: rounding up may ask for more.
    """

    kernel: Pair
    strides: Pair
    dilations: Pair
    before: Pair
    behind: Pair
    size: Pair
    padded: Pair

    @staticmethod
    def of(node: Any, size: Sequence[int], kernel: Sequence[int]) -> Window:
        """Of a node that reads planes of this size [H, W], or [W] for 1-D ones."""
        flat = len(size) == 1
        height, width = (1, *size) if flat else size
        kernel_height, kernel_width = (1, *kernel) if flat else kernel
        strides, dilations = (
            pair(attribute(node, name, None), flat) for name in ("strides", "dilations")
        )
        span = dilations[0] * (kernel_height - 1) + 1, dilations[1] * (kernel_width - 1) + 1
        around = padding(node, (height, width), span, strides)
        up = bool(attribute(node, "ceil_mode", 0))
        counts, lengths = [], []
        for length, pads, reach, stride in zip((height, width), around, span, strides, strict=True):
            free = length + sum(pads) - reach
            count = free // stride + 1
            if up and free % stride and count * stride < length + pads[0]:
                count += 1  # unless the last one would lie in the padding alone
            counts.append(count)
            lengths.append(max(length + sum(pads), (count - 1) * stride + reach))
        return Window(
            kernel=(kernel_height, kernel_width),
            strides=strides,
            dilations=dilations,
            before=(around[0][0], around[1][0]),
            behind=(around[0][1], around[1][1]),
            size=(counts[0], counts[1]),
            padded=(lengths[0], lengths[1]),
        )

    @property
    def only_pixel(self) -> bool:
        """Whether each place reads itself and nothing else."""
        return self.kernel == self.strides == (1, 1) and not any(self.before + self.behind)

    def inner(self, size: Sequence[int]) -> tuple[Any, ...]:
        """Where a plane of this size [H, W] lies in its padding: an index."""
        rows, columns = (slice(b, b + s) for b, s in zip(self.before, size, strict=True))
        return ..., rows, columns

    def taps(self) -> Iterator[tuple[Any, ...]]:
        """For each weight of the kernel, what of a padded plane it is multiplied with: an index."""
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                rows, columns = (
                    slice(at * d, at * d + (count - 1) * stride + 1, stride)
                    for at, d, count, stride in zip(
                        (i, j), self.dilations, self.size, self.strides, strict=True
                    )
                )
                yield ..., rows, columns


def pair(values: Any, one_dimension: bool) -> Pair:
    """An attribute of a convolution for two dimensions."""
    if not values:
        return 1, 1
    return (1, values[0]) if one_dimension else (values[0], values[1])


def padding(
    node: Any, size: Sequence[int], span: Sequence[int], strides: Sequence[int]
) -> list[Pair]:
    """Zeros before and after, for height and width."""
    automatic = attribute(node, "auto_pad", b"NOTSET").decode()
    if automatic == "VALID":
        return [(0, 0), (0, 0)]
    if automatic == "NOTSET":
        pads = list(attribute(node, "pads", None) or [0] * 4)
        top, left, bottom, right = pads if len(pads) == 4 else (0, pads[0], 0, pads[1])
        return [(top, bottom), (left, right)]
    around = []
    for length, reach, stride in zip(size, span, strides, strict=True):
        total = max(0, (-(-length // stride) - 1) * stride + reach - length)
        fewer, more = total // 2, total - total // 2
        around.append((fewer, more) if automatic == "SAME_UPPER" else (more, fewer))
    return around
