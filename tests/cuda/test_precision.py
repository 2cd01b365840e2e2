"""fp16 on request: what runs, what the bundle and the log say of it, who is refused."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import onnx
import pytest

from tests.cuda.test_tune import run_cli
from tests.models import Net, random_inputs, run_onnx, worst_error
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.compiled import CompiledModel
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.session import Session
from topiarist.compiler.verify import VerifyResult, verify
from topiarist.errors import MissingRecordsError, TargetError
from topiarist.pruning.one_shot import prune_model
from topiarist.schedules.kernels import CUDA_KERNELS
from topiarist.targets import nvrtc, registry
from topiarist.targets.precision import Precision

NAME = "cuda/sm_90"
TENSOR = {"cuda_mma", "cuda_sparse_mma"}
needs_compiler = pytest.mark.skipif(nvrtc.missing() is not None, reason=nvrtc.missing() or "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense first layer, a 2:4 one with a residual, a fully connected one."""
    net = Net()
    x = net.node("Relu", net.conv(net.input(4, 3, 14, 14), 64, 3, name="first"))
    x = net.node("Add", x, net.conv(x, 64, 64, name="second"))
    x = net.node("Flatten", net.node("GlobalAveragePool", net.node("Relu", x)))
    x = net.node("Gemm", x, net.weight(5, 64), net.weight(5), name="fc", transB=1)
    path = tmp_path_factory.mktemp("precision") / "model.onnx"
    pruned = prune_model(net.model(x), pattern="2:4", skip=["first", "fc"])[0]
    onnx.save(pruned, path)
    return path


def build(model: Path, precision: Precision, dense: bool = False) -> CompiledModel:
    """For the process with the GPU: a bundle chosen by estimate."""
    output = model.with_suffix(f".{precision}.topi")
    return compile_model(
        *(model,), target=NAME, measure=False, precision=precision, dense=dense, output=output
    )


def verified(bundle: Path, model: Path) -> VerifyResult:
    return verify(bundle, model)


def kernels(model: Path, precision: Precision) -> dict[str, str]:
    manifest = read_manifest(model.with_suffix(f".{precision}.topi"))
    return {layer.layer: layer.kernel for layer in manifest.layers}
