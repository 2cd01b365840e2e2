"""A network of one hand-made kernel: enough for everything that doesn't compile a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from topiarist.compiler.bundle import write_bundle
from topiarist.compiler.compiled import CompiledModel, LayerChoice, LayerLimits, TensorSignature
from topiarist.targets import registry

SCALE_SOURCE = """
@T.prim_func
def scale(a: T.handle, b: T.handle, c: T.handle):
    T.func_attr({"global_symbol": "scale"})
    A = T.match_buffer(a, (2, 16), "float32", align=64)
    B = T.match_buffer(b, (2, 16), "float32", align=64)
    C = T.match_buffer(c, (2, 16), "float32", align=64)
    for i in T.parallel(2):
        for j in T.vectorized(16):
            C[i, j] = A[i, j] * B[i, j]
"""
WEIGHT = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)


@pytest.fixture(autouse=True, scope="session")
def no_logs_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither read nor write the logs of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_model_of_the_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests predict is the same on machines that a latency model came along for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topiarist.compiler.model_files.SHIPPED", tmp_path_factory.mktemp("shipped"))
        yield


@pytest.fixture(scope="module")
def steady_machine() -> Iterator[None]:
    """No batch counts as disturbed: a tuner would measure it again another time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("topiarist.tuning_logs.record.DRIFT_LIMIT", math.inf)
        patch.setattr("topiarist.compiler.worker.DRIFT_LIMIT", math.inf)
        yield


def build_executable(outputs: int = 1) -> Any:
    """`main(x, params) -> x * params[0]` for floats [2, 16], or the same several times."""
    import tvm
    from tvm import relax
    from tvm.script import from_source
    from tvm.script import tirx as T

    kernel = from_source(SCALE_SOURCE, extra_vars={"T": T})
    vector = relax.TensorType((2, 16), "float32")
    x = relax.Var("x", vector)
    params = relax.Var("params", relax.TupleType([vector]))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, params], pure=False):
        function = builder.add_func(kernel, "scale")
        size, device = relax.ShapeExpr([128]), 0
        storage = builder.emit(relax.op.memory.alloc_storage(size, device, "global", "uint8"))
        shape = relax.ShapeExpr([2, 16])
        out = builder.emit(relax.op.memory.alloc_tensor(storage, 0, shape, "float32"))
        weight = builder.emit(relax.TupleGetItem(params, 0))
        builder.emit(relax.Call(function, [x, weight, out], None, [relax.TupleType([])]))
        builder.emit_func_output(out if outputs == 1 else relax.Tuple([out] * outputs))
    passes = (
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    )
    target = tvm.target.Target(registry.get("host").tvm_target)
    return tvm.compile(
        builder.get(), target=target, relax_pipeline=tvm.transform.Sequential(passes)
    )


@pytest.fixture(scope="session")
def tiny_model() -> CompiledModel:
    """y = x * weight, x and y of [2, 16], with a layer in the plan."""
    signature = {"shape": (2, 16), "dtype": "float32"}
    return CompiledModel(
        executable=build_executable(),
        params=(WEIGHT,),
        inputs=(TensorSignature(name="x", **signature),),
        outputs=(TensorSignature(name="y", **signature),),
        target=registry.get("host"),
        threads=1,
        layers=(
            LayerChoice(
                layer="scale",
                kind="conv",
                kernel="hand_made",
                config={"tile": np.int64(4), "order": (1, 2)},
                input_layout="plain",
                output_layout="plain",
                density=0.5,
                flops_dense=64,
                flops_nonzero=32,
                run_us=1.5,
                reason="the only one",
                candidates=(("hand_made 4", 1.5), ("other_kernel", 3.25)),
                limits=LayerLimits(0, 0.5, 0.0, "compute", 0.3333),
                explanation=("It is the only one.",),
            ),
        ),
    )


@pytest.fixture
def twin_model(tiny_model: CompiledModel) -> CompiledModel:
    """`tiny_model` with its output twice, as y and z."""
    (y,) = tiny_model.outputs
    return dataclasses.replace(
        tiny_model,
        executable=build_executable(outputs=2),
        outputs=(y, dataclasses.replace(y, name="z")),
    )


@pytest.fixture
def tiny_onnx(tmp_path: Path) -> Path:
    """The ONNX model that `tiny_model` computes."""
    from onnx import TensorProto, helper, numpy_helper, save

    shape = [2, 16]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    path = tmp_path / "tiny.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def tiny_bundle(tiny_model: CompiledModel, tiny_onnx: Path, tmp_path: Path) -> Path:
    """`tiny_model` on disk."""
    return write_bundle(tiny_model, tmp_path / "tiny.topi", source=tiny_onnx)


@pytest.fixture
def edit_manifest() -> Callable[..., None]:
    """Change a bundle's manifest as another version would have written it (digest included)."""
    import json

    from topiarist.compiler.manifest import digest

    def edit(bundle: Path, **changes: object) -> None:
        path = bundle / "manifest.json"
        data = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({**data, "digest": digest(data)}))

    return edit
