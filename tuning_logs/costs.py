"""A kernel's time as a sum of what it does, each at a cost that is learned from its records.

Trees can't extrapolate, a sum of counts can: it says how time grows with the size of a layer, and
trees correct it (`cost_model.py`). Costs are not negative and stay near those of another target
times one factor, as far as records do not say otherwise: few records are enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from topiarist.tuning_logs.boosters import Floats, Rows
from topiarist.tuning_logs.features import LOG

KERNEL = "kernel="
STEPS = 4  # of Gauss and Newton
MOST = 1.0  # an error of the logarithm that a step tries to mend
STIFFNESS = 1.0  # how many records a cost stands against

# Microseconds of a count at 3 GHz, rough ones for a core with vectors of 16 lanes.
_CYCLE = 1 / 3000
_MEMORY = {
    "calls": 3000.0,
    "lines_read": 0.2,
    "lines_written": 5.0,
    "far_lines_read": 5.0,
    "far_lines_written": 4.0,
}
_TILED = _MEMORY | {
    "columns": 0.7,
    "loads": 0.3,
    "fmas": 0.2,
    "busy": 0.25,
    "mid_loads": 0.4,
    "far_loads": 1.0,
    "spills": 1.0,
    "tiles": 30.0,
    "visits": 1.0,
    "visit_vectors": 2.5,
    "mid_visit_vectors": 0.3,
    "mid_weight_lines": 3.0,
    "far_weight_lines": 3.0,
}
_WINOGRAD = _MEMORY | {
    "lines_read": 5.0,
    "columns": 0.1,
    "fmas": 0.25,
    "loads": 0.1,
    "busy": 0.25,
    "mid_loads": 0.3,
    "far_loads": 0.3,
    "transformed_in": 1.0,
    "transformed_out": 2.0,
    "mid_transformed": 0.2,
    "far_transformed": 3.0,
    "weight_lines": 4.0,
    "far_weight_lines": 3.0,
}
_DEPTHWISE = _MEMORY | {
    "lines_read": 0.7,
    "fmas": 0.3,
    "loads": 0.2,
    "busy": 0.3,
    "tiles": 4.0,
    "visit_vectors": 1.5,
}
_LINEAR = {"calls": 3000.0, "fmas": 0.5, "weight_lines": 8.0}
_OTHER = {"calls": 1000.0, "bytes_moved": 0.12}
# GPUs: a launch, and what their figures say of instructions, loads and bytes, which overlap.
_FAR = {"memory_ns": 2.0}
_GPU = _FAR | {
    "calls": 6000.0,
    "issue_ns": 2.0,
    "load_ns": 1.0,
    "wait_ns": 1.0,
    "code_bytes": 0.001,
}
_ROUGH: dict[str, Mapping[str, float]] = {
    "direct_dense": _TILED,
    "direct_sparse": _TILED,
    "block_sparse": _TILED,
    "block8_sparse": _TILED,
    "winograd_dense": _WINOGRAD,
    "depthwise": _DEPTHWISE,
    "dense_linear": _LINEAR | _FAR,
    "sparse_linear": _LINEAR | _FAR,
    "cuda_dense": _GPU,
    "cuda_tiled": _GPU,
    "cuda_sparse": _GPU,
    "cuda_compiled": _GPU,
    "cuda_mma": _GPU,
    "cuda_sparse_mma": _GPU,
}


class Costs:
    """Microseconds of each count, by kernel; `rest` serves kernels that no record was of."""

    def __init__(
        self, by_kernel: Mapping[str, Mapping[str, float]], rest: Mapping[str, float]
    ) -> None:
        self.by_kernel = {name: dict(costs) for name, costs in by_kernel.items()}
        self.rest = dict(rest)

    @staticmethod
    def rough() -> Costs:
        """Those to start from where nothing was measured."""
        return Costs({}, {}).scaled(1.0)

    def scaled(self, factor: float) -> Costs:
        """All times a factor."""
        known = {name: _times(costs, _CYCLE) for name, costs in _ROUGH.items()} | self.by_kernel
        rest = self.rest or _times(_OTHER, _CYCLE)
        return Costs({name: _times(c, factor) for name, c in known.items()}, _times(rest, factor))

    @staticmethod
    def fit(rows: Rows, columns: Sequence[str], run_us: Floats, layers: NDArray[np.str_]) -> Costs:
        """Learned from times alone, starting from rough costs; layers count by their square root.

        A layer with many records says less with each.
        """
        return Costs.rough().refit(rows, columns, run_us, layers)

    def refit(
        self, rows: Rows, columns: Sequence[str], run_us: Floats, layers: NDArray[np.str_]
    ) -> Costs:
        """Those of another target: all of these times one factor, then each kernel's its own."""
        ratio = run_us / self.predict_us(rows, columns)
        start = self.scaled(float(np.exp(np.median(np.log(ratio)))))
        counted = _counted(rows, columns)
        _, which, repeats = np.unique(layers, return_inverse=True, return_counts=True)
        found = dict(start.by_kernel)
        for kernel, at in _kernels(rows, columns):
            costs = found.get(kernel, start.rest)
            sizes = np.column_stack([counted(name)[at] * cost for name, cost in costs.items()])
            weight = repeats[which[at]] ** -0.5
            factors = _factors(sizes, run_us[at], weight / weight.mean())
            found[kernel] = {
                name: float(cost * factor)
                for (name, cost), factor in zip(costs.items(), factors, strict=True)
            }
        return Costs({k: _rounded(costs) for k, costs in found.items()}, _rounded(start.rest))

    def predict_us(self, rows: Rows, columns: Sequence[str]) -> Floats:
        """Microseconds of each row of `columns`."""
        counted = _counted(rows, columns)
        found = np.zeros(len(rows))
        left = np.ones(len(rows), np.bool_)
        for kernel, at in _kernels(rows, columns):
            costs = self.by_kernel.get(kernel, self.rest)
            found[at] = sum(counted(name)[at] * cost for name, cost in costs.items())
            left[at] = False
        found[left] = sum(counted(name)[left] * cost for name, cost in self.rest.items())
        return np.maximum(found, _CYCLE)

    def to_json(self) -> dict[str, dict[str, float]]:
        """As plain JSON values; those of other kernels under no name."""
        every = {**self.by_kernel, "": self.rest}
        return {kernel: dict(costs) for kernel, costs in every.items()}

    @staticmethod
    def from_json(document: Mapping[str, Mapping[str, float]]) -> Costs:
        """The inverse of `to_json`. Raises ValueError, KeyError, TypeError or AttributeError."""
        costs = {
            str(kernel): {str(name): float(cost) for name, cost in each.items()}
            for kernel, each in document.items()
        }
        if not all(0 <= c < math.inf for each in costs.values() for c in each.values()):
            raise ValueError("a cost makes no sense")
        rest = costs.pop("")
        return Costs(costs, rest)


def _times(costs: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: cost * factor for name, cost in sorted(costs.items())}


def _rounded(costs: Mapping[str, float]) -> dict[str, float]:
    """To as many digits as files have."""
    return {name: float(f"{cost:.6g}") for name, cost in sorted(costs.items())}


def _kernels(rows: Rows, columns: Sequence[str]) -> list[tuple[str, NDArray[np.intp]]]:
    """The rows of each kernel that there is a column of."""
    found = []
    for i, name in enumerate(columns):
        if name.startswith(KERNEL):
            at = np.flatnonzero(rows[:, i] == 1)
            if len(at):
                found.append((name.removeprefix(KERNEL), at))
    return found


class _counted:
    """Counts by name, back from their logarithms; 0 where a row has none."""

    def __init__(self, rows: Rows, columns: Sequence[str]) -> None:
        self.rows = rows
        self.at = {name: i for i, name in enumerate(columns)}

    def __call__(self, name: str) -> Floats:
        at = self.at.get(LOG + name)
        if at is None:
            return np.zeros(len(self.rows))
        with np.errstate(over="ignore"):
            return np.nan_to_num(np.exp(self.rows[:, at].astype(np.float64)), posinf=1e300)


def _factors(sizes: NDArray[np.float64], run_us: Floats, weight: Floats) -> Floats:
    """The factor of each column of `sizes` for which their sums have the least errors.

    Of logarithms, by linear approximation around the last step's sums; factors are held near one.
    """
    count = sizes.shape[1]
    factors = np.full(count, float(np.exp(np.median(np.log(run_us / sizes.sum(axis=1))))))
    hold = STIFFNESS * np.eye(count)
    root = np.sqrt(weight)
    for _ in range(STEPS):
        sums = np.maximum(sizes @ factors, 1e-9)
        error = np.clip(np.log(sums / run_us), -MOST, MOST)
        rows = np.vstack([sizes / sums[:, None] * root[:, None], hold])
        wanted = np.concatenate([(1 - error) * root, np.full(count, STIFFNESS)])
        factors = nnls(rows, wanted, maxiter=50 * count)[0]
    return np.asarray(factors, np.float64)
