"""How much each weight matters: scores of the weight's shape, not negative, larger is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def magnitude(weight: NDArray[Any]) -> Scores:
    """|w|: Han et al., NIPS 2015."""
    return np.abs(weight.astype(np.float64))
