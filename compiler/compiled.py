"""What the build stage hands to packaging: an executable, its packed weights, and the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class TensorSignature:
    """A network input or output: name, static shape, NumPy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LayerChoice:
    """What one layer runs and why; goes into the manifest and the report.

    `run_us` is the time measured during the choice, None where nothing was measured.
    `candidates` holds (kernel and config, microseconds) of everything that was timed.
    """

    layer: str
    kind: str
    kernel: str
    config: dict[str, Any]
    input_layout: str
    output_layout: str
    density: float | None
    flops_dense: int
    flops_nonzero: int
    run_us: float | None
    reason: str
    candidates: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class CompiledModel:
    """A network compiled for one target.

    `executable` is a TVM executable (`export_library(path)`) with one VM function
    `main(input_0, ..., params) -> Tensor | Array[Tensor]`; `params` is an Array of the flat
    tensors in `params`, in that order. Data pointers of inputs and params are 64-byte aligned.
    """

    executable: Any
    params: tuple[NDArray[np.generic], ...]
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    target: TargetSpec
    threads: int
    layers: tuple[LayerChoice, ...] = field(default=())
    created: str = ""  # UTC, ISO 8601
