"""Whole networks on the emulated GPU: bundles, sessions, graphs, the choice by time."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from tests.cuda import emulation
from tests.models import Net, random_inputs, run_onnx, worst_error
from topiarist.compiler.bench import BenchResult, bench
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.measure import REPEATS
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.session import Session
from topiarist.errors import BundleError, TargetError, TopiaristError
from topiarist.pruning.one_shot import prune_model
from topiarist.schedules.kernels import CUDA_KERNELS
from topiarist.targets import elf, nvrtc, registry

NAME = "cuda/sm_90"
RUNS = 2
needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")
Array = NDArray[Any]


def network(batch: int = 1) -> onnx.ModelProto:
    """Every kind of layer, strides over odd planes, a residual, branches, two outputs."""
    net = Net()
    x = net.node("Relu", net.conv(net.input(batch, 3, 25, 25), 16, 3, 7, strides=[2, 2]))
    x = net.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    inner = net.conv(net.node("Relu", net.conv(x, 16, 16)), 16, 16)
    x = net.node("Relu", net.node("Add", x, inner))
    inner = net.node("Relu", net.conv(x, 8, 16, 1))
    inner = net.node("Relu", net.conv(inner, 8, 8, strides=[2, 2]))
    shortcut = net.conv(x, 32, 16, 1, strides=[2, 2])
    x = net.node("Relu", net.node("Add", net.conv(inner, 32, 8, 1), shortcut))
    mean = net.node("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4)
    x = net.node("Concat", net.conv(x, 16, 32, 1), net.conv(x, 16, 32, group=4), mean, axis=1)
    x = net.node("Sigmoid", net.batch_norm(net.node("Tanh", net.conv(x, 64, 64, group=64)), 64))
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    scores = net.node("Gemm", x, net.weight(10, 64), net.weight(10), transB=1)
    model = net.model(net.node("Softmax", scores, axis=1), scores)
    for node in model.graph.node:  # names that are none in C
        for tensors in (node.input, node.output):
            tensors[:] = [t.replace("t", "t/0:") if t.startswith("t") else t for t in tensors]
    for output in model.graph.output:
        output.name = output.name.replace("t", "t/0:")
    return model


@dataclass(frozen=True)
class Ran:
    """Outputs of each run, kernels launched by themselves and graphs in each, and the timed."""

    outputs: list[list[Array]]
    launches: list[tuple[int, int]]
    timed: int
    graphs_while_compiling: int


def compile_and_run(model: Path, measure: bool, inputs: list[dict[str, Array]]) -> Ran:
    """For the process with the GPU; few configurations are timed, for each is compiled alone."""
    for kernel in CUDA_KERNELS:
        type(kernel).tries = 2
    bundle, before = model.with_suffix(".topi"), emulation.launches()
    compiled = compile_model(
        model, target=NAME, measure=measure, output=bundle, log=model.parent / "log.jsonl"
    )
    timed = sum(len(layer.candidates) for layer in compiled.layers if layer.run_us is not None)
    session = Session(bundle)
    outputs, counts = [], [emulation.launches()]
    timing = counts[0][1] - before[1]
    for arrays in inputs:
        outputs.append(session.run(None, arrays))
        counts.append(emulation.launches())
    launches = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(counts)]
    return Ran(outputs, launches, timed, timing)


@pytest.mark.parametrize(("batch", "density"), [(1, 1.0), (2, 0.1)])
def test_agrees_with_onnx_runtime(
    gpu: ProcessPoolExecutor, tmp_path: Path, batch: int, density: float
) -> None:
    """On other inputs each time; after the first run nearly all calls are one graph."""
    model = network(batch)
    if density < 1:
        model, _ = prune_model(model, density=density)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    inputs = [random_inputs(model, batch, seed) for seed in range(RUNS)]
    ran = gpu.submit(compile_and_run, path, False, inputs).result()
    for arrays, outputs in zip(inputs, ran.outputs, strict=True):
        assert worst_error(outputs, run_onnx(model, arrays)) < 1e-5
    assert ran.launches[0][1] == 0
    assert all(kernels <= 3 and graphs == 1 for kernels, graphs in ran.launches[1:])
    kernels = {layer.kernel for layer in read_manifest(path.with_suffix(".topi")).layers}
    assert bool({"cuda_sparse", "cuda_compiled"} & kernels) == (density < 1)


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_batches(gpu: ProcessPoolExecutor, tmp_path: Path, batch: int) -> None:
    """A sparse network with a stride, a 1x1 and a fully connected layer."""
    net = Net()
    x = net.node("Relu", net.conv(net.input(batch, 3, 7, 7), 16, 3, strides=[2, 2]))
    x = net.node("Flatten", net.conv(x, 8, 16, 1))
    x = net.node("Gemm", x, net.weight(4, 8 * 16), net.weight(4), transB=1)
    model, _ = prune_model(net.model(x), density=0.2)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    inputs = random_inputs(model)
    ran = gpu.submit(compile_and_run, path, False, [inputs]).result()
    assert worst_error(ran.outputs[0], run_onnx(model, inputs)) < 1e-5


def test_kernels_are_chosen_by_time(gpu: ProcessPoolExecutor, tmp_path: Path) -> None:
    """On a machine with a GPU; all that was timed is in the log."""
    net = Net()
    x = net.conv(net.input(1, 4, 5, 5), 4, 4)
    model, _ = prune_model(
        net.model(net.node("Gemm", net.node("Flatten", x), net.weight(5, 100), transB=1)),
        density=0.3,
    )
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    inputs = [random_inputs(model)]
    ran = gpu.submit(compile_and_run, path, True, inputs).result()
    assert worst_error(ran.outputs[0], run_onnx(model, inputs[0])) < 1e-5
    records = (tmp_path / "log.jsonl").read_text().splitlines()
    assert ran.timed == len(records) >= 3
    linears = sum('"kind":"linear"' in record for record in records)  # others in another process
    assert linears > 0 and ran.graphs_while_compiling >= linears * REPEATS
    assert all('"emulated"' in record for record in records)


def run_without_memory(bundle: Path, loading: int, running: int) -> str:
    """For the process with the GPU: what a session says when it has so many bytes."""
    try:
        emulation.grant_memory(loading)
        session = Session(bundle)
        emulation.grant_memory(running)
        session.run(None, {s.name: np.zeros(s.shape, s.dtype) for s in session.inputs})
    except TopiaristError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        emulation.grant_memory(1 << 40)
    return "nothing"


def test_out_of_memory(gpu: ProcessPoolExecutor, tmp_path: Path) -> None:
    """While weights are loaded, and when a run needs its buffers."""
    net = Net()
    path, plenty = tmp_path / "model.onnx", 1 << 30
    onnx.save(net.model(net.conv(net.input(1, 2, 97, 89), 3, 2)), path)  # no freed buffer fits
    gpu.submit(compile_and_run, path, False, []).result()
    bundle = path.with_suffix(".topi")
    said = [gpu.submit(run_without_memory, bundle, *m).result() for m in ((0, 0), (plenty, 0))]
    assert said[0].startswith("BundleError: ") and "out of memory" in said[0]
    assert said[1].startswith("TopiaristError: the GPU failed: ") and "out of memory" in said[1]
    assert gpu.submit(run_without_memory, bundle, plenty, plenty).result() == "nothing"


def run_bench(bundle: Path) -> BenchResult:
    """For the process with the GPU."""
    return bench(bundle, against=(), runs=2)


def test_bench_tells_the_time_on_the_gpu(gpu: ProcessPoolExecutor, tmp_path: Path) -> None:
    """By events, beside the time from array to array, which has it inside."""
    net = Net()
    path = tmp_path / "model.onnx"
    onnx.save(net.model(net.conv(net.input(1, 8, 20, 20), 16, 8)), path)
    gpu.submit(compile_and_run, path, False, []).result()
    found = gpu.submit(run_bench, path.with_suffix(".topi")).result()
    assert found.gpu is not None and found.gpu.runs == found.rounds == 2
    assert 0 < found.gpu.p10_ms <= found.gpu.p90_ms


@needs_compiler
def test_compiles_without_a_gpu(tmp_path: Path) -> None:
    """The library holds machine code; opening the bundle says in one sentence what is missing."""
    path, bundle = tmp_path / "model.onnx", tmp_path / "model.topi"
    onnx.save(network(), path)
    compile_model(path, target=NAME, output=bundle)
    library = (bundle / "lib.so").read_bytes()
    assert b"\x7fELF" in library[4:] and b"__global__" not in library
    with pytest.raises(BundleError, match=f"no NVIDIA driver, which {NAME} needs"):
        Session(bundle)


@needs_compiler
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None, reason="needs aarch64-linux-gnu-g++"
)
def test_boards_with_a_gpu(tmp_path: Path) -> None:
    """The host's part is for the board's processor."""
    path, bundle = tmp_path / "model.onnx", tmp_path / "model.topi"
    net = Net()
    onnx.save(net.model(net.conv(net.input(1, 3, 5, 5), 4, 3)), path)
    compile_model(path, target="cuda/sm_87", output=bundle)
    head = elf.read(bundle / "lib.so")
    assert head is not None and head.serves("aarch64", 64)


def test_a_missing_compiler_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is read."""
    monkeypatch.setattr(nvrtc, "PACKAGE", "no-such-package")
    nvrtc._library.cache_clear()
    with pytest.raises(TargetError, match=r"pip install 'topiarist\[cuda\]'"):
        compile_model(tmp_path / "missing.onnx", target=NAME)
    nvrtc._library.cache_clear()


def test_estimates_for_a_gpu() -> None:
    """`inspect` looks at a model without any GPU."""
    from topiarist.compiler.estimate import estimate_layers

    model, _ = prune_model(network(), density=0.05)
    layers = estimate_layers(model, registry.get(NAME))
    assert layers and all(0 < layer.best_us <= layer.dense_us < np.inf for layer in layers.values())


def compile_with_few_threads(model: Path, folder: Path) -> list[str]:
    """For the process with the GPU: compile where large blocks can't be launched; the reasons."""
    for kernel in CUDA_KERNELS:
        type(kernel).tries = 1
    log = model.parent / "log.jsonl"
    with emulation.limited_workers(folder, threads=128):  # what the reference kernel needs
        compiled = compile_model(model, target=NAME, measure=True, log=log)
    return [layer.reason for layer in compiled.layers]


def test_a_failing_kernel_is_left_out(
    gpu: ProcessPoolExecutor, gpu_folder: Path, tmp_path: Path
) -> None:
    """The others are timed; what CUDA said is in the log and in the bundle."""
    net = Net()
    path = tmp_path / "model.onnx"
    model = net.model(net.conv(net.input(1, 8, 9, 9), 16, 8, name="conv"))
    onnx.save(prune_model(model, density=0.3, layer_density={"conv": 0.3})[0], path)
    (reason,) = gpu.submit(compile_with_few_threads, path, gpu_folder).result()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    failed = [record for record in records if record["status"] == "crash"]
    assert failed and any(record["status"] == "ok" for record in records)
    assert all("LAUNCH_OUT_OF_RESOURCES" in record["message"] for record in failed)
    assert "threads: crash: the GPU failed to run a kernel: " in reason
