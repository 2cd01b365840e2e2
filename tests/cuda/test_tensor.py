"""The convolutions on tensor cores: fragments, zeros, numbers, machine code."""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tvm

from tests.benchmarks.bench_cuda import used_by
from tests.cuda.test_kernels import FloatArray, problem_of, run, site_of
from tests.schedules import kernel_contract, references
from tests.schedules.building import check_written, relative_error
from tests.schedules.kernel_contract import ConvCase, Problem
from topiarist.pruning.masks import n_m_mask
from topiarist.schedules.cuda import fragments
from topiarist.schedules.cuda.kernels import CudaMma, CudaSparseMma
from topiarist.schedules.cuda.tensor import TensorConfig
from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.workload import HALF, signature
from topiarist.targets import nvrtc
from topiarist.targets.cuda import PROFILES
from topiarist.targets.spec import TargetSpec

DENSE, SPARSE = CudaMma(), CudaSparseMma()
KERNELS = (DENSE, SPARSE)
TARGET = PROFILES[-1]
POINTWISE = ConvCase(16, 64, (7, 7), kernel=(1, 1), padding=(0, 0, 0, 0), density=1.0)
CASES = {
    "3x3": ConvCase(16, 32, (8, 8), density=1.0),
    "1x1": POINTWISE,
    "1x1 strided": replace(POINTWISE, strides=(2, 2), residual="operand"),
    "odd": ConvCase(20, 41, (11, 7), strides=(2, 2), density=1.0, activation=(0.0, None)),
    "part": ConvCase(12, 24, (9, 5), density=1.0, part=True, residual="in_place"),
    "groups": ConvCase(32, 48, (5, 6), groups=2, density=1.0, batch=3),
    "dilated": ConvCase(8, 16, (9, 9), dilation=(2, 1), padding=(2, 1, 2, 1), density=1.0),
    "batch 4": replace(POINTWISE, batch=4, outputs=32),
    "batch 16": ConvCase(4, 24, (4, 3), batch=16, density=1.0, residual="operand"),
    "batch 64": ConvCase(8, 16, (3, 3), batch=64, density=1.0),
}
# One warp; warps both ways; teams; more taps than there are; more pixels than threads, and fewer.
FORMS = (
    TensorConfig(32, 8, 1, 1, 32, 1),
    TensorConfig(64, 16, 2, 2, 32, 1),
    TensorConfig(32, 32, 1, 4, 64, 2),
    TensorConfig(32, 64, 1, 1, 32, 4),
    TensorConfig(32, 16, 4, 1, 64, 1),
)


def halved(array: FloatArray) -> FloatArray:
    """What fp16 makes of it."""
    return array.astype(np.float16).astype(np.float32)


def pruned(case: ConvCase, n: int = 2, m: int = 4) -> Problem:
    """N of M neighbouring channels, fewer in places, and none in two filters."""
    problem = problem_of(case)
    weight = np.where(n_m_mask(np.abs(problem.weight), n, m), problem.weight, np.float32(0))
    weight[np.random.default_rng(3).random(weight.shape) < 0.1] = 0
    weight[1:3] = 0
    workload = replace(problem.workload, sparsity=signature(weight, f"{n}:{m}"), dtype=HALF)
    return replace(problem, weight=weight, workload=workload)


def wanted(p: Problem) -> references.Array:
    return references.conv(p.workload, halved(p.x), halved(p.weight), p.bias, p.residual)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_agrees_with_the_reference(gpu: ProcessPoolExecutor, kernel: CudaMma) -> None:
    """Of inputs and weights rounded to fp16, for any shape."""
    jobs = {}
    for i, case in enumerate(CASES.values()):
        problem = pruned(case, *((2, 4), (1, 4), (2, 4), (1, 2))[i % 4])
        assert kernel.refuses(problem.workload, TARGET) is None
        best, form = kernel.knobs(site_of(problem))[0], FORMS[i // 2 % len(FORMS)]
        config = best if i % 2 else form
        assert kernel.fits(site_of(problem), config)
        jobs[f"case_{i}"] = kernel, problem, config
    results = gpu.submit(run, jobs).result()
    for name, (_, p, config) in jobs.items():
        got = check_written(p.views.y, kernel_contract.y_before(p), results[name])
        error = relative_error(got, wanted(p))
        assert error < 1e-6, f"{name}: {config}: relative error {error:.2g}"


@pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
@pytest.mark.parametrize("target", PROFILES[1:], ids=lambda target: target.isa)
def test_machine_code(target: TargetSpec) -> None:
    """Nothing is spilled; three blocks of 128 threads fit a multiprocessor."""
    problem = pruned(ConvCase(128, 128, (14, 14), density=1.0))
    site = ConvSite(problem.workload, problem.views, target)
    config = TensorConfig(64, 32, 2, 2, 32, 1)
    functions = {
        f"k{i}": kernel.prim_func(site, config, f"k{i}") for i, kernel in enumerate(KERNELS)
    }
    built = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target.tvm_target))
    log = nvrtc.compile_source(built.mod.imports[0].inspect_source(""), target.isa).log
    used = used_by(log)
    assert len(used) == len(KERNELS)
    for registers, spilled in used.values():
        assert spilled == 0 and registers <= 168


def random_matrix(channels: int, taps: int) -> FloatArray:
    """Whole numbers, which fp16 keeps; two of four neighbours are not zero."""
    random = np.random.default_rng(0)
    matrix = random.integers(1, 1000, (channels, taps)).astype(np.float32)
    return np.where(
        n_m_mask(random.random(matrix.shape)[..., None, None], 2, 4)[..., 0, 0], matrix, 0
    )


def halves(words: fragments.Words) -> FloatArray:
    """[..., words] -> [..., words, 2]."""
    whole = np.ascontiguousarray(words)
    return whole.view(np.float16).astype(np.float32).reshape(*whole.shape, 2)


def test_weights_lie_as_the_instructions_read_them() -> None:
    """Each element by the PTX ISA's formulas of `mma.m16n8k16`."""
    matrix = random_matrix(32, 64)
    words = halves(fragments.dense_words(matrix))
    assert words.shape == (2, 2, 32, 8, 2)
    for piece, m, lane, word, i in np.ndindex(*words.shape):
        group, in_group = lane // 4, lane % 4
        element = word % 4 * 2 + i
        row = group if element < 2 or 4 <= element < 6 else group + 8
        col = in_group * 2 + (element & 1) + (8 if element >= 4 else 0) + word // 4 * 16
        assert words[piece, m, lane, word, i] == matrix[16 * m + row, 32 * piece + col]


def test_sparse_weights_and_their_places() -> None:
    """By those of `mma.sp.m16n8k32`; bits of places by its figure."""
    matrix = random_matrix(64, 64)
    matrix[5] = 0
    matrix[6, 1::4] = 0  # one or none of four
    values, places = fragments.compressed(matrix)
    words, bits = halves(fragments.weight_words(values)), fragments.place_words(places)
    assert words.shape == (2, 4, 32, 4, 2) and bits.shape == (2, 2, 32)
    back = np.zeros_like(matrix)
    for piece, m, lane, word, i in np.ndindex(*words.shape):
        group, in_group = lane // 4, lane % 4
        element = word * 2 + i
        lower = not (element < 2 or 4 <= element < 6)
        first = in_group * 4 + (16 if element >= 4 else 0)
        teller = group * 4 + m % 2 * 2 + first // 16  # selector 0: threads 0 and 1; 1: 2 and 3
        told = int(bits[piece, m // 2, teller]) >> (16 * lower + first % 16 + 2 * i) & 3
        back[16 * m + group + 8 * lower, 32 * piece + first + told] += words[
            piece, m, lane, word, i
        ]
    assert np.array_equal(back, matrix)


def test_more_than_two_of_four_are_no_sparse_weights() -> None:
    problem = pruned(CASES["1x1"])
    weight = problem.weight.copy()
    weight[0, :3] = 1
    config = SPARSE.knobs(site_of(problem))[0]
    with pytest.raises(ValueError, match="more than 2 of 4 neighbouring channels"):
        SPARSE.pack(site_of(problem), config, weight)


def test_who_is_refused() -> None:
    """fp32 unless asked, older GPUs, other zeros, channels that are no whole fours."""
    workload = pruned(CASES["1x1"]).workload
    single = replace(workload, dtype="float32")
    for kernel in KERNELS:
        assert "fp16, which was not asked for" in str(kernel.refuses(single, TARGET))
        assert "sm_75 multiply smaller matrices" in str(kernel.refuses(workload, PROFILES[0]))
    refused = {"unstructured": "not 2:4", "3:4": "not 2:4", "block4x1": "not 2:4", "2:16": None}
    for pattern, reason in refused.items():
        other = replace(workload, sparsity=replace(workload.sparsity, pattern=pattern))
        assert DENSE.refuses(other, TARGET) is None
        why = SPARSE.refuses(other, TARGET)
        assert why is None if reason is None else reason in str(why)
    few = replace(workload, in_channels=18)
    assert "18 input channels are no multiple of 4" in str(SPARSE.refuses(few, TARGET))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_knobs(kernel: CudaMma) -> None:
    """The most promising first; what doesn't fit is not built."""
    problem = pruned(ConvCase(64, 128, (14, 14), density=1.0))
    site = site_of(problem)
    found = kernel.knobs(site)
    times = [kernel.estimate_us(site, config) for config in found]
    assert times == sorted(times) and all(0 < us < math.inf for us in times)
    limits = {
        "no whole matrices": TensorConfig(16, 8, 1, 1, 32, 1),
        "can't share out 24 pixels": TensorConfig(32, 24, 1, 1, 32, 1),
        "values in a thread's registers": TensorConfig(64, 64, 2, 2, 64, 1),
        "2048 threads": TensorConfig(32, 8, 4, 4, 32, 4),
        "bytes of shared memory": TensorConfig(64, 32, 2, 2, 64, 4),
    }
    for reason, config in limits.items():
        assert not kernel.fits(site, config)
        with pytest.raises(ValueError, match=f"does not fit: .*{reason}"):
            kernel.pack(site, config, problem.weight)


def test_half_of_the_products_are_estimated_to_pay() -> None:
    """Where multiplying is what takes time."""
    problem = pruned(ConvCase(256, 256, (28, 28), batch=8, density=1.0))
    dense, sparse = (k.estimate_us(site_of(problem), k.knobs(site_of(problem))[0]) for k in KERNELS)
    assert sparse < dense
