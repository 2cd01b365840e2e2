"""The kernels for GPUs, as CUDA source run by the processor, against a float64 reference."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.cuda import emulation
from tests.schedules import kernel_contract, references
from tests.schedules.building import FloatArray, check_written, relative_error
from tests.schedules.kernel_contract import CASES, PATTERNS, ConvCase, Problem
from topiarist.pruning.patterns import find_pattern
from topiarist.schedules.cuda.kernels import CudaCompiled, CudaDense, CudaSparse, CudaTiled
from topiarist.schedules.cuda.thread import CudaConfig
from topiarist.schedules.cuda.tiled import TiledConfig
from topiarist.schedules.kernel import ConvKernel, ConvSite, KernelConfig
from topiarist.schedules.workload import signature
from topiarist.targets import x86
from topiarist.targets.cuda import PROFILES

TARGET = PROFILES[-1]
KERNELS: tuple[ConvKernel[Any], ...] = (CudaDense(), CudaSparse(), CudaCompiled(), CudaTiled())
# Each with what it needs: pixels that divide, rows that are split, chunks, quads.
DIRECT_FORMS = (
    CudaConfig(1, 1, 32, 1),
    CudaConfig(8, 2, 32, 2),
    CudaConfig(2, 4, 32, 1, chunk=4),
    CudaConfig(4, 1, 64, 8, chunk=16),
    CudaConfig(4, 4, 32, 1, quads=True),
    CudaConfig(2, 4, 32, 4, chunk=4, quads=True),
)
FORMS: dict[str, tuple[KernelConfig, ...]] = {
    "cuda_dense": DIRECT_FORMS,
    "cuda_sparse": DIRECT_FORMS,
    "cuda_compiled": (
        CudaConfig(1, 1, 32, 1),
        CudaConfig(8, 2, 32, 2),
        CudaConfig(4, 4, 64, 1),
        CudaConfig(4, 1, 32, 8),
    ),
    # More pixels than threads, fewer, teams, more taps than there are.
    "cuda_tiled": (
        TiledConfig(4, 8, 4, 8, 8, 1),
        TiledConfig(8, 4, 16, 8, 8, 2),
        TiledConfig(4, 4, 2, 32, 16, 4),
        TiledConfig(8, 8, 4, 16, 64, 1),
    ),
}
LIMITS = {
    "13 rows are no multiple of 4": (KERNELS[0], CudaConfig(1, 4, 32, 1)),
    "four pixels at a time": (KERNELS[1], CudaConfig(1, 4, 32, 1, quads=True)),
    "2048 threads": (KERNELS[0], CudaConfig(1, 1, 256, 8)),
    "186368 bytes of shared memory": (KERNELS[1], CudaConfig(8, 13, 64, 8)),
    "no quads": (KERNELS[2], CudaConfig(1, 4, 32, 1, quads=True)),
    "no whole warps": (KERNELS[2], CudaConfig(1, 1, 48, 1)),
    "4x2 sums are read in fours": (KERNELS[3], TiledConfig(4, 2, 4, 8, 8, 1)),
    "can't share out 96 pixels": (KERNELS[3], TiledConfig(4, 4, 5, 24, 8, 1)),
    "4096 threads": (KERNELS[3], TiledConfig(4, 4, 32, 32, 8, 4)),
    "98304 bytes of shared memory": (KERNELS[3], TiledConfig(8, 8, 16, 8, 128, 1)),
}
FORM_CASES = {
    "even": ConvCase(channels=9, outputs=16, plane=(8, 6), batch=3, activation=(0.0, None)),
    "groups": ConvCase(groups=2, channels=10, outputs=16, plane=(12, 5), residual="operand"),
    "strided": ConvCase(outputs=16, plane=(16, 12), strides=(2, 2), residual="in_place"),
    "pointwise": ConvCase(
        channels=40, outputs=16, plane=(4, 7), batch=2, kernel=(1, 1), padding=(0, 0, 0, 0)
    ),
    "pointwise_odd": ConvCase(
        outputs=16, plane=(7, 7), kernel=(1, 1), padding=(0, 0, 0, 0), part=True, density=0.0
    ),
    "pointwise_groups": ConvCase(
        outputs=16, groups=2, plane=(7, 3), kernel=(1, 1), padding=(0, 0, 0, 0), residual="operand"
    ),
}
Job = tuple[ConvKernel[Any], Problem, KernelConfig]


def problem_of(case: ConvCase) -> Problem:
    """A case between planes of pixels."""
    return kernel_contract.make_problem(replace(case, tiled_input=False, tiled_output=False), 1)


def site_of(problem: Problem) -> ConvSite:
    return ConvSite(problem.workload, problem.views, TARGET)


def run(jobs: dict[str, Job]) -> dict[str, FloatArray]:
    """What the kernels write; for the process with the GPU."""
    functions, calls = {}, {}
    for name, (kernel, problem, config) in jobs.items():
        site = site_of(problem)
        functions[name] = kernel.specialised(site, config, name, problem.weight)
        calls[name] = kernel_contract.arguments(kernel, problem, config, site)
    return emulation.run_all(functions, TARGET, calls)


def check(gpu: ProcessPoolExecutor, jobs: dict[str, Job]) -> None:
    """Run the kernels and compare each with the reference."""
    jobs = {name.replace(".", "_"): job for name, job in jobs.items()}
    results = gpu.submit(run, jobs).result()
    for name, (kernel, p, config) in jobs.items():
        want = references.conv(p.workload, p.x, p.weight, p.bias, p.residual)
        got = check_written(p.views.y, kernel_contract.y_before(p), results[name])
        error = relative_error(got, want)
        assert error < 1e-6, f"{name}: {kernel.name} {config}: relative error {error:.2g}"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
class TestKernels:
    """Any shape, any zeros."""

    def test_agrees_with_the_reference(
        self, gpu: ProcessPoolExecutor, kernel: ConvKernel[Any]
    ) -> None:
        """With the best, a middling or the worst configuration, in turn."""
        jobs: dict[str, Job] = {}
        # Tiles and threads are for CPUs: without them these cases are like others.
        names = [name for name in CASES if "tiled" not in name and "threads" not in name]
        for turn, (name, case) in enumerate((name, CASES[name]) for name in names):
            problem = problem_of(case)
            found = kernel.knobs(site_of(problem))
            jobs[name] = kernel, problem, [found[0], found[len(found) // 2], found[-1]][turn % 3]
        check(gpu, jobs)

    def test_every_form(self, gpu: ProcessPoolExecutor, kernel: ConvKernel[Any]) -> None:
        """Split rows, staged chunks and quads, where they fit."""
        jobs: dict[str, Job] = {}
        forms = FORMS[kernel.name]
        left_out = ["strided", "pointwise"] if kernel.sparse else ["groups", "pointwise_odd"]
        for name, case in FORM_CASES.items():
            if name in left_out:
                continue
            problem = problem_of(case)
            for i, config in enumerate(forms):
                if kernel.fits(site_of(problem), config):
                    jobs[f"{name}_{i}"] = kernel, problem, config
        assert {config for _, _, config in jobs.values()} == set(forms)
        check(gpu, jobs)

    def test_batches(self, gpu: ProcessPoolExecutor, kernel: ConvKernel[Any]) -> None:
        """Pixels of many images in a block, halo of all of them."""
        jobs: dict[str, Job] = {}
        for batch in (4, 16, 64):
            problem = problem_of(ConvCase(6, 16, (3, 4), batch=batch, residual="operand"))
            jobs[f"batch_{batch}"] = kernel, problem, kernel.knobs(site_of(problem))[0]
        check(gpu, jobs)

    def test_patterns_of_zeros(self, gpu: ProcessPoolExecutor, kernel: ConvKernel[Any]) -> None:
        """N:M, kernel patterns and blocks."""
        jobs: dict[str, Job] = {}
        for i, (pattern, mask) in enumerate(PATTERNS.items()):
            problem = problem_of(ConvCase(channels=16, outputs=16, density=1.0))
            weight = np.where(mask(np.abs(problem.weight)), problem.weight, np.float32(0))
            assert str(find_pattern(weight)) == pattern
            workload = replace(problem.workload, sparsity=signature(weight, pattern))
            pruned = replace(problem, weight=weight, workload=workload)
            jobs[f"pattern_{i}"] = kernel, pruned, kernel.knobs(site_of(pruned))[0]
        check(gpu, jobs)

    @pytest.mark.parametrize("name", ["density_0.3", "depthwise_times_4", "pointwise"])
    def test_most_promising_knobs_come_first(self, kernel: ConvKernel[Any], name: str) -> None:
        """By the estimate; nothing comes twice, and everything fits."""
        site = site_of(problem_of(CASES[name]))
        found = kernel.knobs(site)
        estimates = [kernel.estimate_us(site, config) for config in found]
        assert all(0 < us < math.inf for us in estimates)
        assert estimates == sorted(estimates)
        assert len(set(found)) == len(found)
        assert all(kernel.fits(site, config) for config in found)

    def test_cpus_are_refused(self, kernel: ConvKernel[Any]) -> None:
        """With the target's name."""
        workload = problem_of(ConvCase(outputs=16)).workload
        assert kernel.refuses(workload, x86.PROFILES[0]) == "x86-avx512 is no GPU"
        assert kernel.refuses(workload, TARGET) is None


@pytest.mark.parametrize("reason", LIMITS)
def test_what_does_not_fit_is_not_built(reason: str) -> None:
    """`fits` says so, packing and generating raise: limits of tiles and of a block's resources."""
    problem = problem_of(CASES["density_0.3"])
    kernel, config = LIMITS[reason]
    assert not kernel.fits(site_of(problem), config)
    with pytest.raises(ValueError, match=f"does not fit: .*{reason}"):
        kernel.pack(site_of(problem), config, problem.weight)
    with pytest.raises(ValueError, match=f"does not fit: .*{reason}"):
        kernel.specialised(site_of(problem), config, "kernel", problem.weight)


@pytest.mark.parametrize("kernel", KERNELS[:3], ids=lambda kernel: kernel.name)
def test_channels_have_to_divide(kernel: ConvKernel[Any]) -> None:
    problem = problem_of(CASES["odd_outputs"])
    with pytest.raises(ValueError, match="output channels per group are no multiple of 4"):
        kernel.pack(site_of(problem), CudaConfig(4, 1, 32, 1), problem.weight)


@pytest.mark.parametrize("kernel", [*KERNELS[:2], KERNELS[3]], ids=lambda kernel: kernel.name)
def test_packs_every_nonzero_once(kernel: ConvKernel[Any]) -> None:
    """What else the values hold is zero."""
    problem = problem_of(CASES["groups_2"])
    site = site_of(problem)
    for config in kernel.knobs(site)[::20]:
        values = kernel.pack(site, config, problem.weight)[0]
        want = np.sort(problem.weight[problem.weight != 0])
        assert np.array_equal(np.sort(values[values != 0]), want)


def test_blocks_share_loads() -> None:
    """The estimate takes several channels a thread for blocks, and fewer for scattered zeros."""
    case = ConvCase(channels=256, outputs=256, plane=(28, 28), batch=8, density=0.05)
    problem = problem_of(case)
    best = {}
    for pattern in ("unstructured", "block8x1", "block16x1"):
        sparsity = replace(problem.workload.sparsity, pattern=pattern)
        workload = replace(problem.workload, sparsity=sparsity)
        best[pattern] = CudaSparse().knobs(ConvSite(workload, problem.views, TARGET))[0].channels
    assert best["unstructured"] < best["block8x1"] <= best["block16x1"]


def test_small_groups_fill_no_tile() -> None:
    """Depthwise layers run on the direct kernel."""
    why = CudaTiled().refuses(problem_of(CASES["depthwise"]).workload, TARGET)
    assert why == "1 output channels in a group don't fill a tile of 16"
