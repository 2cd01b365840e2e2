"""The network as a list of kernel calls on named buffers: what lowering makes of the layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Ref:
    """A buffer seen as a tensor of this shape and dtype."""

    buffer: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Call:
    """`function(*args)`: an int is an index into the parameters; the last one is written."""

    layer: str
    function: str
    args: tuple[Ref | int, ...]

    @property
    def output(self) -> Ref:
        """The tensor that the call writes."""
        last = self.args[-1]
        assert isinstance(last, Ref)
        return last

    @property
    def reads(self) -> tuple[Ref, ...]:
        """The tensors that the call reads."""
        return tuple(a for a in self.args[:-1] if isinstance(a, Ref))


@dataclass
class Program:
    """Calls in order, the functions they name, and the constants they read."""

    inputs: tuple[Ref, ...]
    functions: dict[str, Any] = field(default_factory=dict)
    params: list[Array] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: tuple[Ref, ...] = ()

    def parameter(self, array: Array) -> int:
        """Add a constant; returns its index."""
        self.params.append(np.ascontiguousarray(array))
        return len(self.params) - 1
