"""What the benchmark on GPUs does, as far as it goes without one."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import bench_cuda, gpu_rivals
from tests.benchmarks.layers import Shape, weights
from tests.cuda import emulation
from tests.models import relative_error
from tests.schedules.references import windows
from topiarist.schedules.kernels import CUDA_KERNELS
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


def run_bench(folder: Path) -> str:
    """For the process with the GPU: the command, on a layer that the processor can stand."""
    bench_cuda.RESNET50["tiny"] = Shape(8, 5, 16, 3)
    bench_cuda.CALLS = bench_cuda.ROUNDS = 2
    for kernel in CUDA_KERNELS:
        type(kernel).tries = 1
    options = f"--layers tiny --densities 0.2 --batches 2 --log {folder}/l.jsonl --json {folder}/j"
    bench_cuda.main(options.split())
    return (folder / "j").read_text()


def test_the_command(gpu: ProcessPoolExecutor, tmp_path: Path) -> None:
    """It checks its results itself; all candidates are in the log."""
    single, half = json.loads(gpu.submit(run_bench, tmp_path).result())["measured"]
    for found, limit in ((single, 1e-6), (half, 2e-3)):
        assert found["error"] < limit and found["us"] > 0 and found["dlight_us"] > 0
    kernels = {kernel.name for kernel in CUDA_KERNELS}
    tensor = {kernel.name for kernel in CUDA_KERNELS if kernel.dtype == "float16"}
    assert {*single["kernels"]} == kernels - tensor and {*half["kernels"]} == kernels
    lines = (tmp_path / "l.jsonl").read_text().splitlines()
    assert {json.loads(line)["kernel"] for line in lines} == kernels


def test_a_rival_without_our_mistakes(gpu: ProcessPoolExecutor) -> None:
    """What we are checked against agrees with a float64 convolution."""
    size, case = Shape(6, 7, 8, 3), replace(CASE, batch=2)
    x = np.random.default_rng(1).standard_normal((2, 6, 7, 7), np.float32)
    weight = weights(size, "unstructured", 0.5)
    seen = windows(x, (3, 3), (1, 1), (1, 1, 1, 1))
    want = np.einsum("ncyxij,ocij->noyx", seen, weight.astype(np.float64), optimize=True)
    got = gpu.submit(run_dlight, size, case.batch, x, weight).result()
    assert relative_error(got, np.maximum(want, 0)) < 1e-5


def run_dlight(size: Shape, batch: int, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """For the process with the GPU."""
    function = gpu_rivals.dlight_conv("rival", size, batch, TARGET)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((batch, size.filters, size.size, size.size), np.float32)
    return emulation.run_all({"rival": function}, TARGET, {"rival": [padded, weight, y]})["rival"]


def test_floors() -> None:
    """L7 at 5 %: 52,429 nonzeros on 49 pixels."""
    found = bench_cuda.floors(bench_cuda.Case("L7", 0.05, 1), TARGET)
    assert TARGET.gpu is not None
    assert found["multiply-adds"] == pytest.approx(
        2 * 52429 * 49 / TARGET.gpu.peak_gflops / 1e3, rel=0.01
    )
    assert found["memory"] == pytest.approx(4 * (2560 * 49 + 52429) / 4800 / 1e3, rel=0.01)


def test_speedups_are_averaged_as_ratios() -> None:
    assert bench_cuda.geomean([0.5, 2.0]) == pytest.approx(1.0)
    assert bench_cuda.Measured(CASE, "k", 0.0, 2.0, 9.0, 7.0, 3.0, 1.0, {}, {}).speedup == 3.5
    alone = bench_cuda.Measured(CASE, "k", 0.0, 2.0, 9.0, None, None, None, {}, {})
    assert alone.speedup == 4.5
    ours = {"cuda_mma": 3.0, "cuda_sparse_mma": 2.0}
    half = replace(alone, case=replace(CASE, precision="fp16"), kernels=ours)
    assert half.speedup == 1.5
    assert replace(half, cudnn_fp16_us=1.0).speedup == 0.5
