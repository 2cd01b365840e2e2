"""The command line: its forms, its JSON, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from topiarist.compiler import cli_bundles, cli_prune
from topiarist.compiler.cli import app
from topiarist.targets import board_file, registry

HAS_PIPELINE = importlib.util.find_spec("topiarist.compiler.pipeline") is not None
needs_pipeline = pytest.mark.skipif(not HAS_PIPELINE, reason="topiarist.compiler.pipeline")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def call_json(*arguments: object, exit_code: int = 0) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def assert_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


@pytest.fixture
def conv_model(tmp_path: Path) -> Path:
    """Three convolutions with 8 channels, batch open."""
    rng = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "w1": (8, 8, 3, 3), "w2": (8, 8, 1, 1)}
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], "conv0", **same),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["c"], "conv1", **same),
        helper.make_node("Conv", ["c", "w2"], ["y"], "conv2", kernel_shape=[1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "convs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 8, 8])],
        weights,
    )
    path = tmp_path / "convs.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture
def x_npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", x=np.ones((4, 16), np.float32))
    return tmp_path / "x.npz"


def test_targets_list() -> None:
    document = call_json("targets", "list")
    assert [t["name"] for t in document["targets"]] == registry.names()
    assert "x86-avx2" in call("targets", "list").stdout


def test_targets_list_on_a_machine_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    host, *others = call_json("targets", "list")["targets"]
    assert host["name"] == "host" and "riscv64" in host["problem"]
    assert not any(t["runs_here"] for t in others)


def test_targets_list_shows_a_wrong_file_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    board_file.user_folder().mkdir(parents=True)
    (board_file.user_folder() / "mine.toml").write_text('model = "Mine"')
    own = call_json("targets", "list")["targets"][-1]
    assert own["name"] == "mine" and "triple is missing" in own["problem"]
    text = call("targets", "list").stdout
    assert text.count("ARM boards") == 1 and text.count("x86-64 processors") == 1
    assert "your own" in text and "triple is missing" in " ".join(text.split())


def test_targets_show_and_detect() -> None:
    assert call_json("targets", "show", "x86-avx512")["lanes"] == 16
    detected = call_json("targets", "detect")
    assert detected["runs_here"] and detected["isa"] in call("targets", "detect").stdout
    assert_error(call("targets", "show", "x86-avx3"), "x86-avx2", "targets list")
    board = call("targets", "show", "rk3588").stdout
    assert "4 x cortex-a76 at 2.4 GHz (out of order), for which code is made" in board
    assert "g++-aarch64-linux-gnu" in board and "qemu-user" in board


def test_inspect(conv_model: Path) -> None:
    document = call_json("inspect", conv_model, "--target", "x86-avx2")
    assert document["target"] == "x86-avx2" and document["source"] == "counting instructions"
    assert [layer["layer"] for layer in document["layers"]] == ["conv0", "conv1", "conv2"]
    assert document["total"]["ceiling"] == pytest.approx(1.0)
    first = document["layers"][0]["estimate"]
    assert first["eligible"] is False and first["kernel"] == "direct_dense"
    assert any("density 1.00 is above" in refusal for refusal in first["refusals"])
    assert 0 < first["best_us"] <= first["dense_us"]
    assert document["total"]["estimated_best_us"] > 0 and document["problem"] is None
    assert first["explanation"][0].startswith("direct_dense takes ")
    text = call("inspect", conv_model).stdout
    assert "at most 1.00x" in text and "an estimate for host" in text
    assert "conv0: direct_dense takes " in text


def test_inspect_bundle(tiny_bundle: Path) -> None:
    document = call_json("inspect", tiny_bundle)
    (layer,) = document["layers"]
    assert layer["limits"] == {
        "far_bytes": 0, "compute_us": 0.5, "memory_us": 0.0, "bound": "compute", "share": 0.3333
    }  # fmt: skip
    assert document["total"]["run_us"] == 1.5 and document["threads"] == 1
    assert document["others"] == [] and document["total"]["network_us"] is None
    text = call("inspect", tiny_bundle).stdout
    assert "33.3 %" in text and "other_kernel 3 us" in text
    assert "scale: It is the only one." in text
    assert_error(call("inspect", tiny_bundle, "--target", "host"), "is a bundle", "--target")


def test_prune(conv_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned.onnx"
    options = ("--density", 0.25, "--layer-density", "conv2=0.5", "-o", output)
    document = call_json("prune", conv_model, *options)
    after = {layer["layer"]: layer["density_after"] for layer in document["layers"]}
    assert after == {"conv0": 1.0, "conv1": 0.25, "conv2": 0.5}
    assert call_json("inspect", output)["total"]["ceiling"] > 1.5
    assert "conv1" in call("prune", conv_model, *options).stdout


def test_prune_by_numbers(conv_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned.onnx"
    call_json("prune", conv_model, "--pattern", "2:4", "-o", output)
    assert_error(call("prune", conv_model, "--density", 7, "-o", output), "density", "7")
    wrong = call("prune", conv_model, "--density", 0.5, "--layer-density", "conv2", "-o", output)
    assert_error(wrong, "NAME=DENSITY", "'conv2'")


def test_prune_cuts_filters_out(conv_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "narrow.onnx"
    options = ("--pattern", "filter", "--density", 0.5, "-o", output)
    layers = call_json("prune", conv_model, *options)["layers"]
    assert [layer["pattern"] for layer in layers] == ["filter", "filter", "channel"]
    assert layers[2]["reason_kept"] == "the network's output 'y' has them"
    shapes = [layer["weight_shape"][:2] for layer in call_json("inspect", output)["layers"]]
    assert shapes == [[4, 3], [4, 4], [8, 4]]
    assert output.stat().st_size < conv_model.stat().st_size / 2


def test_layer_names_with_an_equals_sign() -> None:
    assert cli_prune.parse_layer_density("a=b=0.5") == ("a=b", 0.5)


def test_outputs_that_cannot_be_written(conv_model: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "absent" / "out"
    assert_error(call("prune", conv_model, "--density", 0.5, "-o", nowhere), "doesn't exist")
    assert_error(call("compile", conv_model, "-o", nowhere), "doesn't exist")
    assert_error(call("compile", conv_model, "-o", conv_model), "is a file")
    assert_error(call("compile", conv_model, "-o", tmp_path), "no bundle")


def test_verify(tiny_bundle: Path, tiny_onnx: Path, x_npz: Path) -> None:
    document = call_json("verify", tiny_bundle, "--against", tiny_onnx, "--inputs", x_npz)
    assert set(document) == {
        "max_abs", "max_rel", "top1_agreement", "passed", "samples", "tolerance"
    }  # fmt: skip
    assert document["passed"] is True and document["samples"] == 4
    assert "passed" in call("verify", tiny_bundle, "--against", tiny_onnx).stdout


def test_verify_fails_with_code_1(tiny_bundle: Path, tiny_onnx: Path) -> None:
    model = onnx.load(tiny_onnx)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, "w"))
    onnx.save(model, tiny_onnx)
    document = call_json("verify", tiny_bundle, "--against", tiny_onnx, exit_code=1)
    assert document["passed"] is False
    assert call("verify", tiny_bundle, "--against", tiny_onnx).exit_code == 1


def test_bench(tiny_bundle: Path) -> None:
    document = call_json("bench", tiny_bundle, "--against", "ort", "--threads", 1, "--runs", 2)
    assert set(document["ratio"]["ort"]) == {"median", "low", "high"}
    assert set(document["engines"]) == {"topiarist", "ort"}
    assert "the speed of ort" in call("bench", tiny_bundle, "--runs", 2).stdout


def test_bench_names_the_way_out(tiny_bundle: Path, tiny_onnx: Path) -> None:
    tiny_onnx.unlink()
    assert_error(call("bench", tiny_bundle, "--runs", 1), "--model")
    assert_error(call("bench", tiny_bundle, "--against", "tpu"), "ort, openvino")


def test_run(tiny_bundle: Path, x_npz: Path, tmp_path: Path) -> None:
    output = tmp_path / "y.npz"
    document = call_json("run", tiny_bundle, "--inputs", x_npz, "-o", output)
    assert document["outputs"]["y"]["shape"] == [4, 16]
    assert document["written"] == str(output)
    with np.load(output) as results:
        assert results["y"].shape == (4, 16)
    assert "float32" in call("run", tiny_bundle, "--inputs", x_npz).stdout


def test_arrays_of_any_name(tmp_path: Path) -> None:
    arrays = {"file": np.ones(2), "a/b": np.zeros((2, 0), np.int8)}
    cli_bundles.save_arrays(tmp_path / "y.npz", arrays)
    with np.load(tmp_path / "y.npz") as results:
        assert {name: results[name].shape for name in results.files} == {
            "file": (2,),
            "a/b": (2, 0),
        }


def test_run_explains_itself(tiny_bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "bytes.npz", images=np.ones((2, 16), np.uint8))
    result = call("run", tiny_bundle, "--inputs", tmp_path / "bytes.npz")
    assert_error(result, "uint8", "expected float32 [2, 16]")
    assert_error(call("run", tiny_bundle, "--inputs", tmp_path / "absent.npz"), "absent.npz")
    assert_error(call("run", tmp_path / "no.topi", "--inputs", tmp_path / "absent.npz"), "no.topi")


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_exception(place: str) -> None:
    arguments = ["targets", "show", "nothing"]
    result = call(*(["--debug", *arguments] if place == "before" else [*arguments, "--debug"]))
    assert type(result.exception).__name__ == "TargetError"


def test_a_bug_is_one_paragraph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(registry, "names", fail)
    assert_error(call("targets", "list"), "RuntimeError: first line second line. This is a bug")


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "names", interrupt)
    result = call("targets", "list")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_the_program(tiny_bundle: Path, x_npz: Path) -> None:
    """As a process: JSON alone on stdout, nothing on stderr, and `run` without TVM's compiler."""
    code = (
        "import sys; from topiarist.compiler.cli import app; app(standalone_mode=False); "
        "assert not {'tvm', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    arguments = ["run", str(tiny_bundle), "--inputs", str(x_npz), "--json"]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert json.loads(process.stdout)["outputs"]["y"]["dtype"] == "float32"


def test_exit_code_of_the_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "topiarist.compiler.cli", "run", "no.topi", "--inputs", "x"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"error: {tmp_path}/no.topi doesn't exist")


@needs_pipeline
def test_compile_verify_bench_run(conv_model: Path, tmp_path: Path) -> None:
    pruned, bundle = tmp_path / "pruned.onnx", tmp_path / "pruned.topi"
    call_json("prune", conv_model, "--density", 0.2, "-o", pruned)
    document = call_json("compile", pruned, "--target", "host", "-o", bundle, "--threads", 1)
    assert document["bundle"] == str(bundle)
    assert {c["layer"] for c in document["layers"]} >= {"conv0", "conv1", "conv2"}
    assert call_json("verify", bundle, "--against", pruned)["passed"] is True
    assert call_json("bench", bundle, "--runs", 2)["ratio"]["ort"]["median"] > 0
    np.savez(tmp_path / "x.npz", x=np.ones((3, 3, 8, 8), np.float32))
    assert call_json("run", bundle, "--inputs", tmp_path / "x.npz")["outputs"]["y"]["shape"][0] == 3
