"""What the build stage hands to packaging: an executable, its packed weights, and the plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from topiarist.targets.precision import Precision
from topiarist.targets.spec import TargetSpec


@dataclass(frozen=True)
class TensorSignature:
    """A network input or output: name, static shape, NumPy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


Conditions = Literal["alone", "in network", "estimate", ""]


@dataclass(frozen=True)
class LayerLimits:
    """The least that a layer can take on its machine, by the machine's measured limits.

    `compute_us`: its multiply-adds on nonzeros at FMA peak. `memory_us`: `far_bytes`, which the
    second-level cache can't hold, at the bandwidth from beyond it. `bound` is the larger of both,
    "compute" or "memory", and `share` what it is of the time that the layer takes.
    """

    far_bytes: int
    compute_us: float
    memory_us: float
    bound: str
    share: float


@dataclass(frozen=True)
class LayerChoice:
    """What one layer runs and why; goes into the manifest and the report.

    `run_us` is the time measured during the choice, None where nothing was measured.
    `candidates` holds (kernel and config, microseconds) of everything that was timed; `timed` says
    how, so that only these are compared with each other. `limits` is None where nothing was
    measured; `explanation` tells all of it in sentences. `weight_shape` is [O, C / groups, kh, kw]
    or [M, K], `output_shape` [N, C, H, W] or [N, M]. Older bundles have neither shapes nor
    `pattern` nor `timed`: these are empty then. `precision` is what the kernel multiplies in.
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
    limits: LayerLimits | None = None
    explanation: tuple[str, ...] = ()
    weight_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    groups: int = 1
    pattern: str = ""
    timed: Conditions = ""
    precision: Precision = "fp32"


@dataclass(frozen=True)
class OtherWork:
    """What runs besides the layers with weights: a pooling, a copy into another layout, ..."""

    name: str
    kind: str
    run_us: float


@dataclass(frozen=True)
class CompiledModel:
    """A network compiled for one target.

    `executable` is a TVM executable (`export_library(path)`) with one VM function
    `main(input_0, ..., params) -> Tensor | Array[Tensor]`; `params` is an Array of the flat
    tensors in `params`, in that order. Data pointers of inputs and params are 64-byte aligned.
    `network_us` is what all calls together took when the whole network was last timed, None where
    it never was; `others` what besides `layers` ran then, empty where no call was timed by itself.
    `skipped` names lines of tuning logs that could not be read.
    """

    executable: Any
    params: tuple[NDArray[np.generic], ...]
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    target: TargetSpec
    threads: int
    layers: tuple[LayerChoice, ...] = field(default=())
    created: str = ""  # UTC, ISO 8601
    network_us: float | None = None
    others: tuple[OtherWork, ...] = ()
    skipped: tuple[str, ...] = ()
