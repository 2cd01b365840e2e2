"""What the tiled dense convolution becomes on a GPU."""

from __future__ import annotations

import pytest
import tvm

from tests.benchmarks.bench_cuda import used_by
from tests.cuda.test_kernels import problem_of
from tests.schedules.kernel_contract import ConvCase
from topiarist.schedules.cuda.kernels import CudaTiled
from topiarist.schedules.cuda.tiled import TiledConfig
from topiarist.schedules.kernel import ConvSite
from topiarist.targets import nvrtc
from topiarist.targets.cuda import PROFILES
from topiarist.targets.spec import TargetSpec


@pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
@pytest.mark.parametrize("target", PROFILES, ids=lambda target: target.isa)
def test_machine_code(target: TargetSpec) -> None:
    """64 sums stay in registers, with two blocks of 256 threads or more on a multiprocessor."""
    problem = problem_of(ConvCase(channels=32, outputs=128, plane=(14, 14), density=1.0))
    site = ConvSite(problem.workload, problem.views, target)
    function = CudaTiled().prim_func(site, TiledConfig(8, 8, 16, 16, 8, 1), "k")
    built = tvm.compile(tvm.IRModule({"k": function}), target=tvm.target.Target(target.tvm_target))
    log = nvrtc.compile_source(built.mod.imports[0].inspect_source(""), target.isa).log
    registers, spilled = used_by(log)["k_kernel"]
    assert spilled == 0 and registers <= 128
