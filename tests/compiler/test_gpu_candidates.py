"""Candidates that are timed apart: what is recorded, and what is not tried again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.compiler.test_choose import one_conv
from tests.schedules.kernel_contract import ConvCase, make_problem
from topiarist.compiler.gpu_candidates import GpuCandidates, candidates_apart
from topiarist.compiler.graph import Conv
from topiarist.compiler.recorded import Device, Recorded
from topiarist.compiler.worker import Batch, Layer, Outcome, Variant
from topiarist.errors import GpuError
from topiarist.schedules.cuda.kernels import CudaDense
from topiarist.schedules.cuda.thread import CudaConfig
from topiarist.schedules.kernel import ConvSite
from topiarist.targets.cuda import PROFILES
from topiarist.tuning_logs.sources import TuningLogs
from topiarist.tuning_logs.store import TuningLog

KERNEL, TARGET = CudaDense(), PROFILES[-1]
GOOD, BAD = CudaConfig(1, 1, 32, 1), CudaConfig(2, 1, 32, 1)


class Invented:
    """Fails with `BAD`; counts what it is asked."""

    asked = 0

    def measure(self, layer: Layer, variants: Sequence[Variant]) -> Batch:
        self.asked += 1
        failed = Outcome((), "crash", "the GPU failed to run a kernel: too much")
        outcomes = (failed if v.config == BAD else Outcome((1e-6, 2e-6)) for v in variants)
        return Batch(tuple(outcomes), ())


def place() -> tuple[ConvSite, Conv]:
    problem = make_problem(ConvCase(tiled_input=False, tiled_output=False), 1)
    (node,) = one_conv(problem.weight).nodes
    assert isinstance(node, Conv)
    return ConvSite(problem.workload, problem.views, TARGET), node


@pytest.mark.parametrize("adds", [True, False])
def test_failures_are_recorded(tmp_path: Path, adds: bool) -> None:
    """Where records are asked for; then a failed candidate isn't tried again."""
    log, measurer = tmp_path / "cuda.jsonl", Invented()
    recorded = Recorded(TuningLogs(TuningLog(log)), Device.named(TARGET, 1), adds=adds)
    candidates, (site, node) = GpuCandidates(measurer, recorded), place()
    assert candidates(KERNEL, GOOD, site, node) == (1e-6, 2e-6)
    with pytest.raises(GpuError, match=r"^crash: the GPU failed to run a kernel: too much$"):
        candidates(KERNEL, BAD, site, node)
    again = "^crash, by the log: the GPU failed" if adds else "^crash: the GPU failed"
    with pytest.raises(GpuError, match=again):
        candidates(KERNEL, BAD, site, node)
    assert measurer.asked == (2 if adds else 3)
    found = [record.status for record in TuningLog(log).read()] if adds else []
    assert found == (["ok", "crash"] if adds else [])


def test_without_logs() -> None:
    candidates, (site, node) = GpuCandidates(Invented(), None), place()
    assert np.isclose(min(candidates(KERNEL, GOOD, site, node)), 1e-6)


def test_nothing_is_apart_on_cpus() -> None:
    with candidates_apart(False, None) as convs:
        assert convs is None
