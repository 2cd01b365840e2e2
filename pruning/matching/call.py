"""What an operator is called with, and what it gives back.

An operator is a function of a `Call` and its inputs. It returns its output and a function from the
gradient of the output to those of the inputs; None, or nothing at the end, for those without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.errors import TrainingError
from topiarist.pruning.layers import attribute

Array = NDArray[Any]
Pull = Callable[[Array], Sequence[Array | None]]
Result = tuple[Array, Pull]


class Scratch:
    """Buffers that are used again and again, by one thread: fresh memory is slow to touch."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def take(self, role: str, shape: Sequence[int], dtype: Any) -> Array:
        """The buffer of this role, with anything in it; the next taker gets the same memory."""
        size = math.prod(shape)
        buffer = self._buffers.get(role)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            buffer = self._buffers[role] = np.empty(size, dtype)
        return buffer[:size].reshape(shape)


@dataclass(frozen=True, eq=False)
class Call:
    """A node, and which of its inputs need a gradient.

    `overwrite` says that nobody else needs the first input.
    """

    node: Any  # onnx.NodeProto
    wants: tuple[bool, ...] = ()
    overwrite: bool = False
    scratch: Scratch = field(default_factory=Scratch)

    def get(self, name: str, default: Any) -> Any:
        """An attribute."""
        return attribute(self.node, name, default)

    def wanted(self, index: int) -> bool:
        """Whether an input needs a gradient."""
        return index < len(self.wants) and self.wants[index]

    def ints(self, name: str, inputs: Sequence[Array | None], index: int) -> list[int] | None:
        """What newer files have as an input and older ones as an attribute, None if neither."""
        found = inputs[index] if index < len(inputs) else None
        values = self.get(name, None) if found is None else found.reshape(-1).tolist()
        return None if values is None else [int(value) for value in values]


def unbroadcast(gradient: Array, shape: Sequence[int]) -> Array:
    """The sums of a gradient that belong to an input of this shape, which was broadcast."""
    extra = gradient.ndim - len(shape)
    axes = [i for i, n in enumerate(shape, extra) if n == 1 and gradient.shape[i] > 1]
    summed: Array = gradient.sum(axis=(*range(extra), *axes)) if extra or axes else gradient
    return summed.reshape(shape)


def refused(node: Any, reason: str) -> TrainingError:
    """The error for a node that values can't be matched through."""
    return TrainingError(
        f"{node.op_type} node {node.name or node.output[0]!r}: {reason}; outputs can't be matched "
        "through it"
    )
