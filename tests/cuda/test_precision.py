"""fp16 on request: what runs, what the bundle and the log say of it, who is refused."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from tests.cuda.test_tune import run_cli
from tests.models import Net
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.cli import app
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.verify import VerifyResult, verify
from topiarist.errors import MissingRecordsError, TargetError
from topiarist.pruning.one_shot import prune_model
from topiarist.targets import nvrtc
from topiarist.targets.precision import Precision

NAME = "cuda/sm_90"
needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("precision") / "model.onnx", 64, 14)


def write_model(path: Path, channels: int, size: int) -> Path:
    """A dense first layer, a 2:4 one with a residual, a fully connected one."""
    net = Net()
    x = net.node("Relu", net.conv(net.input(1, 3, size, size), channels, 3, name="first"))
    x = net.node("Add", x, net.conv(x, channels, channels, name="second"))
    x = net.node("Flatten", net.node("GlobalAveragePool", net.node("Relu", x)))
    x = net.node("Gemm", x, net.weight(5, channels), net.weight(5), name="fc", transB=1)
    onnx.save(prune_model(net.model(x), pattern="2:4")[0], path)
    return path


def build(model: Path, precision: Precision, dense: bool) -> VerifyResult:
    """For the process with the GPU: a bundle chosen by estimate, compared with ONNX Runtime."""
    output = bundle_of(model, precision, dense)
    compile_model(
        model, target=NAME, measure=False, precision=precision, dense=dense, output=output
    )
    return verify(output, model)


def bundle_of(model: Path, precision: Precision, dense: bool) -> Path:
    return model.with_suffix(f".{precision}{'.dense' if dense else ''}.topi")


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_a_network_in_fp16(gpu: ProcessPoolExecutor, model: Path, dense: bool) -> None:
    """On tensor cores; as near to fp32 as fp16 is, and the bundle says which layers."""
    result = gpu.submit(build, model, "fp16", dense).result()
    assert result.passed and 1e-6 < result.max_rel < 2e-3
    assert result.tolerance == 1e-2
    layers = {c.layer: c for c in read_manifest(bundle_of(model, "fp16", dense)).layers}
    assert layers["second"].kernel == ("cuda_mma" if dense else "cuda_sparse_mma")
    assert layers["second"].precision == "fp16" and layers["fc"].precision == "fp32"
    assert "It multiplies in fp16 and sums in fp32." in layers["second"].explanation


def test_fp32_is_the_default(gpu: ProcessPoolExecutor, tmp_path: Path) -> None:
    """With its own tolerance; the reason says what fp16 would be."""
    model = write_model(tmp_path / "model.onnx", 16, 4)
    result = gpu.submit(build, model, "fp32", False).result()
    assert result.passed and result.tolerance == 1e-4
    layers = read_manifest(bundle_of(model, "fp32", False)).layers
    assert {layer.precision for layer in layers} == {"fp32"}
    assert "cuda_sparse_mma: it multiplies in fp16, which was not asked for" in layers[1].reason


@needs_compiler
def test_records_serve_their_precision_only(gpu: ProcessPoolExecutor, tmp_path: Path) -> None:
    """A log of one builds nothing of the other."""
    model = write_model(tmp_path / "model.onnx", 16, 4)
    log = tmp_path / "cuda.jsonl"
    options = ["--log", str(log), "--trials", "2", "--precision", "fp16"]
    report = gpu.submit(run_cli, "tune", str(model), *options).result()
    assert report["precision"] == "fp16" and report["failed"] == {}
    lines = [json.loads(line)["workload"] for line in log.read_text().splitlines()]
    convs = [workload for workload in lines if "kernel" in workload]
    assert {workload["dtype"] for workload in convs} == {"float16"}
    built = compile_model(model, target=NAME, strict=True, log=log, precision="fp16")
    assert {layer.timed for layer in built.layers} == {"alone"}
    with pytest.raises(MissingRecordsError, match=r"2 layer\(s\)"):
        compile_model(model, target=NAME, strict=True, log=log)


@pytest.mark.parametrize("name", ["x86-avx2", "cuda/sm_75"])
def test_others_multiply_in_fp32(model: Path, name: str) -> None:
    with pytest.raises(TargetError, match=f"{name} has no kernels that multiply in fp16"):
        compile_model(model, target=name, measure=False, precision="fp16")


@pytest.mark.parametrize("command", ["inspect", "tune", "compile"])
def test_the_command_line_refuses_at_once(model: Path, tmp_path: Path, command: str) -> None:
    """In one sentence, before anything is read or timed."""
    output = ["-o", str(tmp_path / "out.topi")] if command == "compile" else []
    for precision, target, reason in (
        ("fp16", "x86-avx2", "has no kernels that multiply in fp16"),
        ("int8", NAME, "--precision takes fp32 or fp16, got 'int8'"),
    ):
        options = ["--target", target, "--precision", precision, *output]
        result = CliRunner().invoke(app, [command, str(model), *options])
        assert result.exit_code in (1, 2) and reason in result.output
        assert "Traceback" not in result.output


def test_inspect_estimates_fp16(model: Path) -> None:
    options = ["--target", NAME, "--precision", "fp16", "--json"]
    result = CliRunner().invoke(app, ["inspect", str(model), *options])
    document = json.loads(result.stdout)
    assert document["precision"] == "fp16"
    assert document["layers"][1]["estimate"]["kernel"] == "cuda_sparse_mma"
