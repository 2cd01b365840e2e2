"""The tuner on the emulated GPU: records, what fails, another run, a build from the log alone.

The times are those of a processor that plays a GPU, and mean nothing.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from tests.cuda import emulation
from tests.models import Net
from tests.schedules.kernel_contract import ConvCase, make_problem
from topiarist.compiler import collect
from topiarist.compiler.cli import app
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.worker import Layer, Outcome, Variant, Worker
from topiarist.errors import TopiaristError
from topiarist.pruning.one_shot import prune_model
from topiarist.schedules.cuda.kernels import CudaSparse
from topiarist.schedules.cuda.thread import CudaConfig
from topiarist.schedules.kernel import ConvSite
from topiarist.targets import detect_cuda, gpu_state, nvrtc, registry
from topiarist.targets.gpu_state import GpuState
from topiarist.tuning_logs.cost_model import Dataset
from topiarist.tuning_logs.sources import open_logs
from topiarist.tuning_logs.store import TuningLog

NAME = "cuda/sm_90"
TRIALS = 3
SEEN = GpuState(1234, 567, "0.0.emulated", "13.0")
_WHY_NOT = detect_cuda.refuses(registry.get(NAME))
needs_no_gpu = pytest.mark.skipif(
    _WHY_NOT is None or "driver" not in _WHY_NOT, reason="this machine has a GPU"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sparse convolution and a fully connected layer."""
    net = Net()
    x = net.conv(net.input(1, 4, 8, 8), 8, 4, name="conv")
    x = net.node("Flatten", net.node("GlobalAveragePool", net.node("Relu", x)))
    x = net.node("Gemm", x, net.weight(3, 8), net.weight(3), name="fc", transB=1)
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(prune_model(net.model(x), density=0.2)[0], path)
    return path


def run_cli(*arguments: str) -> dict[str, Any]:
    """For the process with the GPU: a command's JSON."""
    result = CliRunner().invoke(app, [*arguments, "--target", NAME, "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def tune(gpu: ProcessPoolExecutor, model: Path, log: Path, trials: int) -> dict[str, Any]:
    options = ["--log", str(log), "--trials", str(trials), "--seed", "1"]
    return gpu.submit(run_cli, "tune", str(model), *options).result()


@pytest.fixture(scope="module")
def tuned(gpu: ProcessPoolExecutor, model: Path) -> tuple[dict[str, Any], Path]:
    """What a run says, and its log."""
    log = model.parent / "cuda.jsonl"
    return tune(gpu, model, log, TRIALS), log


def test_records_say_what_the_gpu_ran_with(tuned: tuple[dict[str, Any], Path]) -> None:
    """Those of the search, and of the fully connected layer, which is timed afterwards."""
    report, log = tuned
    assert (report["measured"], report["reused"], report["failed"]) == (TRIALS, 0, {})
    assert report["finished"] and report["network_us"] > 0
    (layer,) = report["layers"]
    assert layer["layers"] == ["conv"] and layer["chosen"] and layer["space"] > 100
    records = list(TuningLog(log).read())
    assert {r.input.target.device_model for r in records} == {"emulated"}
    assert {r.input.kernel for r in records} >= {"dense_linear"}
    assert all(r.gpu == SEEN and r.status == "ok" for r in records)


def test_another_run_goes_on(
    gpu: ProcessPoolExecutor, model: Path, tuned: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    log = Path(shutil.copy(tuned[1], tmp_path))
    again = tune(gpu, model, log, TRIALS + 1)
    assert (again["measured"], again["reused"]) == (1, TRIALS)


@pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
def test_a_log_is_enough_to_compile(model: Path, tuned: tuple[dict[str, Any], Path]) -> None:
    """Without a GPU, twice the same."""
    compiled = [compile_model(model, target=NAME, strict=True, log=tuned[1]) for _ in range(2)]
    assert compiled[0].layers == compiled[1].layers
    assert compiled[0].layers[0].config == tuned[0]["layers"][0]["config"]
    assert {layer.timed for layer in compiled[0].layers} == {"alone"}


def measured(folder: Path, limits: dict[str, int], configs: Sequence[CudaConfig]) -> list[Outcome]:
    """For the process with the GPU: what becomes of candidates there."""
    case = make_problem(ConvCase(tiled_input=False, tiled_output=False, plane=(6, 6)), 1)
    layer = Layer(ConvSite(case.workload, case.views, registry.get(NAME)), case.weight, case.bias)
    with emulation.limited_workers(folder, **limits), Worker(1) as worker:
        variants = [Variant(CudaSparse(), config) for config in configs]
        return list(worker.measure(layer, variants).outcomes)


def test_a_kernel_that_needs_too_much_is_recorded(
    gpu: ProcessPoolExecutor, gpu_folder: Path
) -> None:
    """The others of its batch are measured, in a new process."""
    configs = [CudaConfig(1, 1, 256, 2), CudaConfig(1, 1, 32, 1)]
    found = gpu.submit(measured, gpu_folder, {"threads": 256}, configs).result()
    assert [outcome.status for outcome in found] == ["crash", "ok"]
    assert "the GPU failed to run a kernel: " in found[0].message
    assert "LAUNCH_OUT_OF_RESOURCES" in found[0].message


def collected(model: Path, log: Path) -> int:
    """For the process with the GPU: how many records a batch of a single layer brings."""
    spec, times = registry.get(NAME), itertools.chain([0.0, 0.0], itertools.repeat(9.0))
    with pytest.MonkeyPatch.context() as patch, Worker(1) as worker:
        patch.setattr(collect, "BATCH", 2)
        return collect.collect(
            *([model], spec, open_logs(log, spec), worker), budget_s=1, clock=times.__next__
        ).records


def test_collects_for_a_model(gpu: ProcessPoolExecutor, model: Path, tmp_path: Path) -> None:
    """Layers alone, with new zeros."""
    log = tmp_path / "cuda.jsonl"
    assert gpu.submit(collected, model, log).result() == 2
    records = list(TuningLog(log).read())
    assert len(Dataset.of(records)) == 2
    assert all(r.gpu == SEEN and r.measured == "alone" for r in records)


@needs_no_gpu
@pytest.mark.parametrize(
    "command",
    [
        ["tune", "{model}", "--budget", "1s"],
        ["model", "collect", "{model}", "--budget", "1s"],
        ["prune", "{model}", "--speedup", "2", "--calib", "{model}", "-o", "{model}.out"],
    ],
    ids=lambda command: command[0],
)
def test_without_a_gpu_a_sentence_says_so(model: Path, command: list[str]) -> None:
    """And what would work."""
    arguments = [word.format(model=model) for word in command]
    result = CliRunner().invoke(app, [*arguments, "--target", NAME])
    assert result.exit_code == 2
    assert f"no NVIDIA driver, which {NAME} needs" in result.stderr
    assert "on a machine with such a GPU" in result.stderr
    assert "`topiarist compile --no-measure` time nothing" in result.stderr
    assert result.stderr.count("\n") == 1


def test_boards_have_no_gpus(model: Path) -> None:
    options = ["--target", NAME, "--tracker", "localhost:1", "--key", "k"]
    result = CliRunner().invoke(app, ["tune", str(model), *options])
    assert result.exit_code == 2 and "without --tracker" in result.stderr


@needs_no_gpu
def test_prices_without_a_gpu(model: Path) -> None:
    """They come from a count of work, and say so."""
    found = run_cli("model", "predict", str(model))
    assert "no GPU has confirmed" in found["source"]
    assert all(0 < layer["run_us"] <= layer["dense_us"] for layer in found["layers"])


def test_inspect_says_what_its_estimates_are_of(model: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(model), "--target", NAME])
    text = "by H200 SXM's data sheet (66.9 TFLOP/s in fp32 without tensor cores, 4800 GB/s)"
    assert result.exit_code == 0 and text in result.stdout and "one core" not in result.stdout


def said(folder: Path, limits: dict[str, int]) -> str:
    """For the process with the GPU: the sentence that ends a run."""
    try:
        measured(folder, limits, [CudaConfig(1, 1, 32, 1)])
    except TopiaristError as error:
        return str(error)
    return "nothing"


def test_a_full_memory_ends_a_run(gpu: ProcessPoolExecutor, gpu_folder: Path) -> None:
    """Where not even the layer's data fits; the log has what was measured before."""
    text = gpu.submit(said, gpu_folder, {"memory": 0}).result()
    assert "the GPU failed to make room for a layer's data: " in text and "out of memory" in text


def states() -> tuple[GpuState, GpuState]:
    """For the process with the GPU: with and without the management library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_state, "NVML", "libnone.so.1")
        without = gpu_state.read()
    return gpu_state.read(), without


def test_what_nobody_tells_is_null(gpu: ProcessPoolExecutor) -> None:
    """Clocks need the management library; without a driver nothing is known."""
    assert gpu.submit(states).result() == (SEEN, GpuState(cuda="13.0"))
    if detect_cuda.refuses(registry.get(NAME)) is not None:
        assert gpu_state.read() == GpuState()
