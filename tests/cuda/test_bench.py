"""What the benchmark on GPUs does, as far as it goes without one."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from tests.benchmarks import bench_cuda
from tests.benchmarks.layers import RESNET50
from tests.models import relative_error
from tests.schedules.references import windows
from topiarist.targets import nvrtc, registry

TARGET = registry.get("cuda/sm_90")
CASE = bench_cuda.Case("L4", 0.05, 1)
LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a_kernel' for 'sm_90'
ptxas info    : Function properties for a_kernel
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 512 bytes smem
ptxas info    : Compile time = 8.628 ms
ptxas info    : Compiling entry function 'b_kernel' for 'sm_90'
ptxas info    : Function properties for b_kernel
ptxas         .     16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def test_reads_the_assemblers_words() -> None:
    assert bench_cuda.used_by(LOG) == {"a_kernel": (64, 0), "b_kernel": (255, 12)}


@pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
def test_static_figures() -> None:
    """Nothing spills."""
    found = bench_cuda.static(CASE, TARGET)
    assert found.kernel.startswith("cuda_sparse")
    assert 16 < found.registers < 255 and found.spilled_bytes == 0


def run_ours(x: np.ndarray) -> np.ndarray:
    """For the process with the GPU: the layer as it is timed."""
    launch, output = bench_cuda._ours(bench_cuda.choose(CASE, TARGET, "estimate"), x)
    launch()
    return output()


def test_what_is_timed_is_right(gpu: ProcessPoolExecutor) -> None:
    """Against a float64 convolution."""
    size = RESNET50[CASE.layer]
    shape = 1, size.channels, size.size, size.size
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    seen = windows(x, (3, 3), (1, 1), (1, 1, 1, 1))
    want = np.einsum("ncyxij,ocij->noyx", seen, CASE.weight.astype(np.float64), optimize=True)
    assert relative_error(gpu.submit(run_ours, x).result(), np.maximum(want, 0)) < 1e-5


def test_speedups_are_averaged_as_ratios() -> None:
    assert bench_cuda.geomean([0.5, 2.0]) == pytest.approx(1.0)
    assert bench_cuda.Measured(CASE, "k", 0.0, 2.0, 7.0, 3.0).speedup == 3.5
