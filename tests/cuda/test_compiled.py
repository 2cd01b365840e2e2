"""What the convolution whose code holds the weights makes of a pattern."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.cuda.test_kernels import TARGET, problem_of, site_of
from tests.schedules.kernel_contract import CASES, ConvCase, Problem
from topiarist.schedules.cuda import compiled, compiled_space
from topiarist.schedules.cuda.kernels import CudaCompiled
from topiarist.schedules.cuda.thread import CudaConfig, Loops
from topiarist.schedules.workload import SparsitySignature
from topiarist.targets import nvrtc
from topiarist.targets.cuda import GPUS

KERNEL = CudaCompiled()
WIDE = ConvCase(channels=64, outputs=64, plane=(8, 8), density=0.1)
WIDE_POINTWISE = replace(WIDE, kernel=(1, 1), padding=(0, 0, 0, 0))


def loops(problem: Problem, config: CudaConfig) -> Loops:
    return Loops(problem.workload, config, problem.views, sparse=True, adjacent=True)


def codes(problem: Problem, config: CudaConfig) -> list[compiled.Code]:
    return compiled.codes(loops(problem, config), problem.weight)


@pytest.mark.parametrize("name", ["density_0.3", "groups_2", "stride_2", "density_0"])
@pytest.mark.parametrize("split", [1, 4])
def test_every_nonzero_becomes_an_instruction(name: str, split: int) -> None:
    """For each of a thread's pixels one, whichever part of the columns it is in."""
    problem = problem_of(CASES[name])
    for pixels in (1, problem.workload.out_height):
        found = codes(problem, CudaConfig(4, pixels, 32, split))
        assert len(found) == problem.workload.out_channels // 4 * split
        weights = np.concatenate([code.weights for code in found])
        want = np.repeat(problem.weight[problem.weight != 0], pixels)
        assert np.array_equal(np.sort(weights), np.sort(want))
        for code in found:
            assert len(code.ends) == len(code.offsets)
            assert (np.diff(code.offsets) > 0).all() and (np.diff(code.ends) > 0).all()
            assert (code.ends[-1] if len(code.ends) else 0) == len(code.sums) == len(code.weights)


def test_parts_have_about_the_same_to_do() -> None:
    sizes = [len(code.sums) for code in codes(problem_of(WIDE), CudaConfig(64, 1, 32, 4))]
    assert max(sizes) < 1.05 * min(sizes)


@pytest.mark.parametrize("case", [WIDE, WIDE_POINTWISE], ids=["3x3", "1x1"])
def test_one_load_feeds_many_multiply_adds(case: ConvCase) -> None:
    """At 90 % zeros six of 64 channels need a value."""
    found = codes(problem_of(case), CudaConfig(64, 1, 32, 1))
    loads, sums = (
        sum(len(part) for part in parts)
        for parts in zip(*((code.offsets, code.sums) for code in found), strict=True)
    )
    assert 5.5 < sums / loads < 7


def test_loads_run_ahead() -> None:
    """Each value is used after so many more loads, and before its register is loaded again."""
    (code,) = codes(problem_of(WIDE_POINTWISE), CudaConfig(64, 1, 32, 1))
    lines = list(code.instructions(64))
    loads = [i for i, line in enumerate(lines) if line.startswith("ld.")]
    assert len(loads) == len(code.offsets) > 2 * compiled.AHEAD
    assert loads[: compiled.AHEAD] == list(range(1, compiled.AHEAD + 1))
    for load, begin in enumerate(loads[compiled.AHEAD :]):
        register = lines[begin].split()[1].rstrip(",")
        uses = [i for i, line in enumerate(lines[:begin]) if f" {register}," in line]
        assert lines[uses[-1]].startswith("fma.") and uses[-1] == begin - 1
        assert register == f"v{load % compiled.AHEAD}"


def test_neighbouring_pixels_share_the_loads_of_taps() -> None:
    """Three taps of four pixels in a column need six rows, not twelve."""
    problem = problem_of(replace(WIDE, density=1.0))
    alone, together = (codes(problem, CudaConfig(8, n, 32, 1)) for n in (1, 4))
    assert len(together[0].offsets) * 12 == len(alone[0].offsets) * 4 * 6


@pytest.mark.parametrize("case", [WIDE, WIDE_POINTWISE, CASES["stride_2"]])
def test_the_estimate_counts_the_loads(case: ConvCase) -> None:
    """It knows the density only."""
    problem = problem_of(replace(case, outputs=64))
    for config in (CudaConfig(32, 1, 32, 1), CudaConfig(8, problem.workload.out_height, 32, 1)):
        loads = sum(len(code.offsets) for code in codes(problem, config))
        counted = compiled_space.Estimator(site_of(problem)).loads(config)
        assert counted == pytest.approx(loads, rel=0.05)


def test_large_code_is_refused() -> None:
    problem = problem_of(CASES["density_0.3"])
    many = replace(problem.workload, in_channels=512, out_channels=512)
    for density, reason in ((0.01, None), (0.05, "117965 nonzeros are too many")):
        workload = replace(many, sparsity=SparsitySignature(density, "unstructured", (0, 0, 0)))
        why = KERNEL.refuses(workload, TARGET)
        assert why is None if reason is None else reason in str(why)
    workload = replace(many, sparsity=SparsitySignature(0.9, "unstructured", (0, 0, 0)))
    assert "density 0.90 is above" in str(KERNEL.refuses(workload, TARGET))


def test_knobs_keep_the_code_small() -> None:
    """More pixels a thread are as many times more instructions."""
    problem = problem_of(replace(WIDE, channels=256, outputs=256, density=0.08))
    found = {config.pixels for config in KERNEL.knobs(site_of(problem))}
    assert compiled.code_of(problem.workload, 1) <= compiled.MOST_CODE < math.inf
    assert found == {1}


def test_it_is_made_for_one_weight() -> None:
    problem = problem_of(WIDE)
    site, config = site_of(problem), CudaConfig(8, 1, 32, 1)
    assert KERNEL.pack(site, config, problem.weight) == ()
    with pytest.raises(ValueError, match="made for one weight"):
        KERNEL.prim_func(site, config, "kernel")


@pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
@pytest.mark.parametrize("arch", [gpu.arch for gpu in GPUS])
def test_machine_code(arch: str) -> None:
    """NVIDIA's compiler takes it, and keeps all in registers."""
    problem = problem_of(replace(WIDE, channels=16))
    k = loops(problem, CudaConfig(64, 1, 64, 1))
    source = compiled.source_of("code", compiled.codes(k, problem.weight), 64)
    kernel = """extern "C" __global__ void k(const float* x, float* y) {
      float s[64] = {};
      code(x + threadIdx.x, s, blockIdx.x);
      for (int i = 0; i < 64; i++) y[64 * threadIdx.x + i] = s[i];
    }"""
    log = nvrtc.compile_source(source + kernel, arch).log
    assert "0 bytes stack frame, 0 bytes spill stores" in log
