"""Pruning to a latency on the emulated GPU: every step, with times that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models import Net, random_inputs, run_onnx, worst_error
from topiarist.compiler import contest, prices, timed_builds
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.guided import Goal, Guided, GuidedPruner
from topiarist.compiler.model_files import Source
from topiarist.compiler.session import Session
from topiarist.pruning.calibration import check_images
from topiarist.pruning.database import build_database
from topiarist.schedules.kernels import CUDA_KERNELS
from topiarist.targets import registry
from topiarist.tuning_logs.record import MeasureInput
from topiarist.tuning_logs.store import TuningLog

TARGET = registry.get("cuda/sm_90")


class _Invented:
    """100 us for any dense layer, less for a sparse one."""

    def prices_us(self, whats: Sequence[MeasureInput]) -> tuple[np.ndarray, np.ndarray]:
        sparse = {kernel.name for kernel in CUDA_KERNELS if kernel.sparse}
        found = [
            5 + 120 * what.sparsity["density"] if what.kernel in sparse else 100.0 for what in whats
        ]
        return np.array(found), np.array(found)


def prune(path: Path, work: Path) -> Guided:
    """For the process with the GPU; few configurations are timed, for each is compiled alone."""
    for kernel in CUDA_KERNELS:
        type(kernel).tries = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed_builds, "BENCH_S", 0.05)
        patch.setattr(contest, "ROUNDS", 0)
        patch.setattr(prices, "MOST_OFFERS", 1)
        model = onnx.load(path)
        random = np.random.default_rng(0)
        images = check_images(model, {"x": random.standard_normal((16, 3, 8, 8), np.float32)})
        database = build_database(model, images, work / "calibration")
        source = Source(_Invented(), "invented")
        pruner = GuidedPruner(path, database, images, TARGET, source, work, matching_s=0.5)
        between_us = (pruner.reach.dense_us + pruner.reach.least_us) / 2
        return pruner.prune(Goal(latency_ms=between_us / 1e3))


def run(bundle: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """For the process with the GPU."""
    return Session(bundle).run(None, inputs)


def test_compiles_and_times_rounds(gpu: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Every layer and all other work of every bundle have a time; what comes out is right."""
    net = Net(seed=1)
    x = net.node("Relu", net.conv(net.input(1, 3, 8, 8), 8, 3, name="stem"))
    x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.node("Relu", net.conv(x, 16, 8, name="second"))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    path = tmp_path / "model.onnx"
    onnx.save(net.model(net.node("Gemm", x, net.weight(4, 16), transB=1, name="fc")), path)
    found = gpu.submit(prune, path, tmp_path).result()
    assert found.rounds and all(one.measured_us > 0 for one in found.rounds)
    assert found.dense_us > 0 and found.density < 1
    for name in ("dense", "candidate", "pruned"):
        manifest = read_manifest(tmp_path / f"{name}.topi")
        assert all(layer.run_us and layer.timed == "alone" for layer in manifest.layers)
        assert {other.kind for other in manifest.others} >= {"pooling"}
        assert manifest.network_us is not None and manifest.network_us > 0
    records = list(TuningLog(tmp_path / "timings.jsonl").read())
    assert records and all(record.gpu is not None for record in records)
    inputs = random_inputs(found.model)
    outputs = gpu.submit(run, tmp_path / "pruned.topi", inputs).result()
    assert worst_error(outputs, run_onnx(found.model, inputs)) < 1e-5
