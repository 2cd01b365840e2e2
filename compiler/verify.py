"""Comparing a bundle with ONNX Runtime on the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler import engines
from topiarist.compiler.input_data import random_inputs
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.session import Session
from topiarist.errors import ModelError
from topiarist.targets.precision import Precision

SAMPLES = 8  # made up when no inputs are given
# Of the outputs, as a share of the largest; fp16 is for bundles with a layer that multiplies in it.
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2}

Array = NDArray[Any]


@dataclass(frozen=True)
class VerifyResult:
    """How far a bundle's outputs are from the reference.

    `max_rel` is the largest difference over the largest absolute value of that reference output.
    `top1_agreement` is the share of samples whose largest class is the same, None without an
    output [N, classes]. Both differences are NaN when an output isn't finite.
    """

    max_abs: float
    max_rel: float
    top1_agreement: float | None
    passed: bool
    samples: int
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values; null where a difference isn't finite."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(self).items()
        }


class Runnable(Protocol):
    """A bundle that can be run: a `Session`, here or emulated."""

    manifest: Manifest

    def run(self, output_names: None, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs, for any number of batches."""


def verify(
    bundle_path: Path | str,
    model_path: Path | str,
    inputs: Mapping[str, Array] | None = None,
    *,
    tolerance: float | None = None,
    open_bundle: Callable[[Path | str], Runnable] = Session,
) -> VerifyResult:
    """Run both on the same inputs, seeded standard normal ones by default.

    Passed means: all is finite and `max_rel <= tolerance`, by default that of the bundle's
    precision. Raises BundleError, ModelError, and
    ValueError for inputs that the network doesn't take.
    """
    session = open_bundle(bundle_path)
    feeds = dict(inputs) if inputs is not None else _made_up(session.manifest)
    ours = session.run(None, feeds)
    names = [s.name for s in session.manifest.outputs]
    theirs = reference_outputs(Path(model_path), names, feeds)
    if tolerance is None:
        tolerance = max(TOLERANCES[p] for p in session.manifest.precisions)
    return compare(ours, theirs, samples=_samples(feeds), tolerance=tolerance)


def compare(
    ours: list[Array], theirs: list[Array], *, samples: int, tolerance: float
) -> VerifyResult:
    """The differences of outputs from the reference's."""
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape != other.shape:
            raise ModelError(
                f"the bundle's output is {list(mine.shape)} and the model's {list(other.shape)}; "
                "it was compiled from another model"
            )
    differences = [_differences(a, b) for a, b in zip(ours, theirs, strict=True)]
    max_abs = float(np.max([d[0] for d in differences]))
    max_rel = float(np.max([d[1] for d in differences]))
    return VerifyResult(
        max_abs=max_abs,
        max_rel=max_rel,
        top1_agreement=_top1_agreement(ours, theirs),
        passed=max_rel <= tolerance,  # False for NaN
        samples=samples,
        tolerance=tolerance,
    )


def reference_outputs(model: Path, names: list[str], feeds: Mapping[str, Array]) -> list[Array]:
    """ONNX Runtime's outputs, in pieces of the model's batch where that is fixed."""
    session = engines.onnxruntime_session(model)
    missing = set(names) - {o.name for o in session.get_outputs()}
    if missing or set(feeds) != {i.name for i in session.get_inputs()}:
        raise ModelError(f"{model} has other inputs or outputs than the bundle")
    pieces = [_run(session, model, names, piece) for piece in _pieces(session, feeds)]
    return [np.concatenate(p) if len(p) > 1 else p[0] for p in zip(*pieces, strict=True)]


def _run(session: Any, model: Path, names: list[str], feeds: dict[str, Array]) -> list[Array]:
    try:
        outputs: list[Array] = session.run(names, feeds)
    except Exception as error:  # ONNX Runtime's exception classes have no common root
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"ONNX Runtime can't run {model}: {reason}") from error
    return outputs


def _pieces(session: Any, feeds: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The samples in pieces of the model's batch if that is fixed and there are more."""
    shape, total = session.get_inputs()[0].shape, _samples(feeds)
    batch = shape[0] if shape and isinstance(shape[0], int) else total
    if total <= batch or total % batch:
        return [dict(feeds)]
    starts = range(0, total, batch)
    return [{n: a[start : start + batch] for n, a in feeds.items()} for start in starts]


def _made_up(manifest: Manifest) -> dict[str, Array]:
    batch = manifest.inputs[0].shape[0] if manifest.batched else SAMPLES
    return random_inputs(manifest.inputs, chunks=max(1, SAMPLES // batch))


def _samples(feeds: Mapping[str, Array]) -> int:
    array = next(iter(feeds.values()))
    return array.shape[0] if array.ndim else 1


def _differences(mine: Array, reference: Array) -> tuple[float, float]:
    """Largest absolute difference, and the same over the reference's largest absolute value."""
    if mine.size == 0:
        return 0.0, 0.0
    a, b = mine.astype(np.float64), reference.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan, math.nan
    largest, scale = float(np.abs(a - b).max()), float(np.abs(b).max())
    if largest == 0.0:
        return 0.0, 0.0
    return largest, largest / scale if scale else math.inf


def _top1_agreement(ours: list[Array], theirs: list[Array]) -> float | None:
    """Over all outputs of scores: share of rows with the same largest class."""
    rows = [
        (a.argmax(axis=1) == b.argmax(axis=1)).ravel()
        for a, b in zip(ours, theirs, strict=True)
        if a.ndim >= 2 and a.shape[0] > 0 and a.shape[1] > 1 and set(a.shape[2:]) <= {1}
    ]
    return float(np.concatenate(rows).mean()) if rows else None
