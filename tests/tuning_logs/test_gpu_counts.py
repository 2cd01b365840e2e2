"""What kernels on GPUs have to do, counted by hand, and a model that learns from it.

The times are those of an invented device: a sum of the counts and some noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuning_logs.conftest import make_record
from topiarist.errors import CostModelError
from topiarist.schedules.workload import ConvWorkload, SparsitySignature
from topiarist.targets.cuda import GPUS
from topiarist.tuning_logs import features as feature_set
from topiarist.tuning_logs.cost_model import Dataset, LatencyModel
from topiarist.tuning_logs.features import features
from topiarist.tuning_logs.gpu_counts import gpu_counts, gpu_of
from topiarist.tuning_logs.record import MeasureInput, TuningRecord

GPU = GPUS[-1]
TILED = {"channels": 8, "pixels": 4, "rows": 8, "cols": 16, "taps": 8, "split": 1}


def what(
    kernel: str = "cuda_sparse",
    size: int = 14,
    channels: int = 64,
    density: float = 0.1,
    config: dict[str, Any] | None = None,
    isa: str = "sm_90",
) -> MeasureInput:
    """A candidate for a 3x3 layer that keeps its plane."""
    sparsity = SparsitySignature(density, "unstructured", (1, 2, 3))
    workload = ConvWorkload(
        *(1, channels, size, size, channels, (3, 3), (1, 1), (1,) * 4, (1, 1), 1, sparsity),
        activation=(0.0, None),
    )
    plane = f"lanes({size}x{size}@1x1:{size}x{size} halo(1, 1, 1, 1)) channels"
    plain = {"channels": 1, "pixels": 7, "threads": 32, "split": 1, "chunk": 0, "quads": False}
    return make_record(
        kernel=kernel,
        workload=workload.to_json(),
        config=config or plain,
        input_layout=f"{plane} {channels} of {channels}",
        output_layout=f"{plane} {channels} of {channels}",
        family="cuda",
        isa=isa,
        lanes=1,
        device_model="an invented GPU",
    ).input


def counted(**changes: Any) -> dict[str, float]:
    return gpu_counts(features(what(**changes)), GPU)


def test_blocks_are_shared_out() -> None:
    """196 pixels by 7 are 28 places in one block; 64 channels are 64 blocks of a warp each."""
    found = counted()
    assert (found["blocks"], found["block_warps"], found["waves"]) == (64, 1, 1)
    assert found["columns"] == pytest.approx(64 * 9 * 0.1)
    assert found["registers"] == 7 + 1 + 7 + 32
    assert found["shared_bytes"] == 0
    assert found["nonzeros"] == pytest.approx(64 * 64 * 9 * 0.1)
    assert found["memory_ns"] * GPU.bandwidth_gbs == found["bytes_moved"] + found["weight_bytes"]


def test_a_small_gpu_takes_turns() -> None:
    """The same blocks on fewer multiprocessors; no architecture has the same figures."""
    large = counted(size=56, channels=256)
    small = gpu_counts(features(what(size=56, channels=256)), GPUS[3])
    assert small["blocks"] == large["blocks"] and small["waves"] > large["waves"] == 1
    assert small["issue_ns"] > 4 * large["issue_ns"]


def test_zeros_in_the_code_share_loads() -> None:
    """A load serves all nonzeros of a thread's channels there; without, their union is computed."""
    config = {"channels": 16, "pixels": 1, "threads": 32, "split": 1, "chunk": 0, "quads": False}
    union, in_code = counted(config=config), counted(kernel="cuda_compiled", config=config)
    assert in_code["issue_ns"] < 0.3 * union["issue_ns"]
    assert in_code["code_bytes"] > 0 == union["code_bytes"]


def test_tiles_of_dense_kernels() -> None:
    """A block has 64 channels of 64 pixels, and stages both for 8 taps."""
    found = counted(kernel="cuda_tiled", config=TILED)
    assert (found["blocks"], found["block_warps"]) == (math.ceil(196 / 64), 4)
    assert found["shared_bytes"] == 4 * 8 * (64 + 64)
    assert found["columns"] == 64 * 9  # no zeros are skipped


@pytest.mark.parametrize("config", [{}, {"channels": 0}, {**TILED, "rows": -1}, {"cols": "x"}])
def test_knobs_that_make_no_sense(config: dict[str, Any]) -> None:
    """Rough counts, all finite."""
    found = features(what(config=config or {"other": 1}))
    assert "log_memory_ns" in found and "log_blocks" not in found
    assert all(math.isfinite(value) for value in found.values())


def test_only_known_gpus_have_counts_of_their_own() -> None:
    assert gpu_of("cuda", "sm_90") == GPU
    assert gpu_of("cuda", "sm_10") is None and gpu_of("x86", "sm_90") is None
    assert "log_issue_ns" not in features(what(isa="sm_10"))


def invented(count: int, seed: int) -> Iterator[TuningRecord]:
    """Candidates with times that grow with their counts."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        pixels, threads = int(random.choice((1, 2, 7))), int(random.choice((32, 64, 128)))
        config = {"channels": 1, "pixels": pixels, "threads": threads, "split": 1, "chunk": 0}
        one = what(
            str(random.choice(("cuda_sparse", "cuda_dense"))),
            int(random.choice((14, 28, 56))),
            int(random.choice((32, 64, 128, 256))),
            round(float(random.uniform(0.03, 0.4)), 3),
            config,
        )
        n = gpu_counts(features(one), GPU)
        us = 3 + (2 * n["issue_ns"] + n["wait_ns"] + n["memory_ns"]) / 1e3
        yield TuningRecord(one, (us * 1e-6 * float(np.exp(random.normal(0, 0.03))),))


def test_a_model_learns_and_comes_back(tmp_path: Path) -> None:
    """Of a GPU, without a record from a network; features of CPUs have another version."""
    data = Dataset.of(invented(300, 0))
    model = LatencyModel.train(data)
    unseen = Dataset.of(invented(100, 1))
    predicted = model.predict_us(unseen.inputs, "in network")
    assert np.median(np.abs(predicted / unseen.run_us - 1)) < 0.1
    path = tmp_path / "model.json"
    model.save(path)
    again = LatencyModel.load(path)
    assert np.array_equal(again.predict_us(unseen.inputs, "in network"), predicted)
    versions = feature_set.version("cuda"), feature_set.version("x86")
    assert versions == (feature_set.GPU_VERSION, feature_set.VERSION)
    old, new = (f'"features":{version}' for version in versions)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CostModelError, match="other features"):
        LatencyModel.load(path)


def test_a_model_is_for_one_architecture() -> None:
    model = LatencyModel.train(Dataset.of(invented(120, 0)))
    other = replace(what(), target=replace(what().target, isa="sm_80"))
    with pytest.raises(CostModelError, match="sm_80"):
        model.predict_us([other], "alone")


def test_tiles_of_tensor_cores() -> None:
    """Warps have 64 channels of 32 pixels; the sparse form does half of the products."""
    config = {"channels": 64, "pixels": 32, "rows": 2, "cols": 2, "taps": 32, "split": 1}
    dense = counted(kernel="cuda_mma", config=config, size=56, channels=128)
    sparse = counted(kernel="cuda_sparse_mma", config=config, size=56, channels=128, density=0.5)
    assert (dense["blocks"], dense["block_warps"]) == (56 * 56 / 64, 4)
    assert dense["shared_bytes"] == 2 * 32 * 64
    assert dense["registers"] == 64 + 32 + 16 + 16 + 32  # sums, weights, inputs, copies, the rest
    assert sparse["registers"] == dense["registers"] - 16
    assert dense["columns"] == 128 * 9
    products = 4 * 128 * 9 * 64 * 32 / GPU.half_lanes / GPU.clock_ghz
    assert dense["issue_ns"] == pytest.approx(products)
    assert products / 2 <= sparse["issue_ns"] < dense["issue_ns"]
