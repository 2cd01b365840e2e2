"""What a layer is pruned to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Level:
    """A pattern, such as "unstructured", "block4x1" or "2:4", and the share of weights that stay.

    The pattern "dense" has density 1.
    """

    pattern: str
    density: float

    def __str__(self) -> str:
        """As people write it: "unstructured 12 %", "dense"."""
        return self.pattern if self.density == 1 else f"{self.pattern} {100 * self.density:.3g} %"


DENSE = Level("dense", 1.0)
