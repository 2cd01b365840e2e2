"""The analytic latency model of direct sparse convolution, and the bounds that follow from it.

Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning", ICLR 2017, section
2.3. With x the share of nonzeros: t_dense = C / F, t_sparse = max(alpha x C / F,
(S_A + beta x S_W) / B). It is what a learned model is compared with, and what stands in for one on
a target without measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from topiarist.tuning_logs.record import MeasureInput

if TYPE_CHECKING:
    from topiarist.tuning_logs.cost_model import Dataset

BETA = 2.0  # bytes of a nonzero with its index, over those of a weight, in the paper
ALPHA = 2.2  # measured for our sparse kernels with AVX-512 at 10 to 50 % nonzeros; 3 in the paper
DENSE_SHARE = 0.75  # of the multiply-add peak, which dense kernels sustain
LEAST_DENSITY = 0.1  # above it arithmetic, not overhead, takes the time of a sparse kernel


@dataclass(frozen=True)
class LayerWork:
    """A layer in the formula's terms: dense FLOPs C; bytes of activations S_A and of weights S_W.

    S_A counts input and output of one image, S_W the dense weight; `density` is the paper's x.
    """

    flops: float
    activation_bytes: float
    weight_bytes: float
    density: float

    @property
    def nonzero_flops(self) -> float:
        """The FLOPs that zeros leave."""
        return self.density * self.flops

    @staticmethod
    def of(what: MeasureInput) -> LayerWork | None:
        """That of a recorded convolution or fully connected layer, None for other work."""
        w = what.workload
        if "in_channels" in w:
            (kh, kw), (sy, sx) = w["kernel"], w["strides"]
            top, left, bottom, right = w["padding"]
            reach_y, reach_x = (
                (k - 1) * d + 1 for k, d in zip((kh, kw), w["dilation"], strict=True)
            )
            out_height = (w["height"] + top + bottom - reach_y) // sy + 1
            out_width = (w["width"] + left + right - reach_x) // sx + 1
            weights = w["in_channels"] // w["groups"] * w["out_channels"] * kh * kw
            inputs = w["in_channels"] * w["height"] * w["width"]
            outputs = w["out_channels"] * out_height * out_width
            pixels = out_height * out_width
        elif w.get("kind") == "linear":
            inputs, outputs, pixels = w["inputs"], w["outputs"], 1
            weights = inputs * outputs
        else:
            return None
        batch = w["batch"]
        return LayerWork(
            flops=2.0 * batch * weights * pixels,
            activation_bytes=4.0 * batch * (inputs + outputs),
            weight_bytes=4.0 * weights,
            density=float(what.sparsity.get("density", 1.0)),
        )


@dataclass(frozen=True)
class Roofline:
    """The formula's constants: F in GFLOP/s sustained by dense kernels, B in GB/s, alpha, beta."""

    dense_gflops: float
    bandwidth_gbs: float
    alpha: float = ALPHA
    beta: float = BETA

    def dense_us(self, work: LayerWork) -> float:
        """Microseconds of a dense kernel, which is never taken to be bound by memory."""
        return work.flops / self.dense_gflops / 1e3

    def sparse_us(self, work: LayerWork) -> float:
        """Microseconds of a sparse kernel."""
        compute = self.alpha * work.density * work.flops / self.dense_gflops
        moved = work.activation_bytes + self.beta * work.density * work.weight_bytes
        return max(compute, moved / self.bandwidth_gbs) / 1e3

    def speedup(self, work: LayerWork) -> float:
        """Dense over sparse."""
        return self.dense_us(work) / self.sparse_us(work)

    @property
    def most_dense(self) -> float:
        """The upper end of the useful densities: above 1 / alpha a sparse kernel is slower."""
        return 1 / self.alpha

    def least_dense(self, work: LayerWork) -> float:
        """The lower end: below it memory bounds the layer, and more zeros gain nothing.

        1 where that is so from the start.
        """
        flops_ns = self.alpha * work.flops / self.dense_gflops
        weight_ns = self.beta * work.weight_bytes / self.bandwidth_gbs
        if flops_ns <= weight_ns:
            return 1.0
        return min(1.0, work.activation_bytes / self.bandwidth_gbs / (flops_ns - weight_ns))

    def run_us(self, what: MeasureInput, *, sparse: bool) -> float:
        """Microseconds of a candidate; of other work, what moving its bytes takes.

        A dense fully connected layer, which the paper has not, uses each weight once an image: it
        waits for memory as a sparse one does.
        """
        work = LayerWork.of(what)
        if work is None:
            moved = what.workload.get("read_bytes", 0) + what.workload.get("written_bytes", 0)
            return max(float(moved), 1.0) / self.bandwidth_gbs / 1e3
        if sparse:
            return self.sparse_us(work)
        if "in_channels" in what.workload:
            return self.dense_us(work)
        moved_bytes = work.activation_bytes + work.weight_bytes
        return max(self.dense_us(work), moved_bytes / self.bandwidth_gbs / 1e3)

    def to_json(self) -> dict[str, float]:
        """The constants as plain JSON values."""
        return asdict(self)

    @staticmethod
    def of_peak(peak_gflops: float, bandwidth_gbs: float) -> Roofline:
        """From a core's measured peak and bandwidth, where no kernel was measured yet."""
        return Roofline(DENSE_SHARE * peak_gflops, bandwidth_gbs)

    @staticmethod
    def fit(data: Dataset, sparse_kernels: Iterable[str]) -> Roofline | None:
        """With F, B and alpha as the records have them; None without dense and sparse ones.

        Of each layer the fastest kernel counts. Alpha is F over the rate on nonzeros of sparse
        kernels at more than `LEAST_DENSITY`.
        """
        names = frozenset(sparse_kernels)
        dense: dict[str, float] = {}
        sparse: dict[str, float] = {}
        moved = []
        for what, us in zip(data.inputs, data.run_us, strict=True):
            work = LayerWork.of(what)
            if work is None or "in_channels" not in what.workload:
                continue
            ns, key = float(us) * 1e3, what.workload_key
            moved.append((work.activation_bytes + BETA * work.density * work.weight_bytes) / ns)
            if what.kernel not in names:
                dense[key] = max(dense.get(key, 0.0), work.flops / ns)
            elif work.density > LEAST_DENSITY:
                sparse[key] = max(sparse.get(key, 0.0), work.density * work.flops / ns)
        if not dense or not sparse:
            return None
        gflops = float(np.median([*dense.values()]))
        alpha = gflops / float(np.median([*sparse.values()]))
        return Roofline(gflops, max(moved), max(1.0, alpha))
