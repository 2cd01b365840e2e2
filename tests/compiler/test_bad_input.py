"""Bad input to the program, as a user gives it: one paragraph, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.models import Net
from topiarist.targets import registry

PROGRAM = [sys.executable, "-m", "topiarist.compiler.cli"]
Damage = Callable[[Path], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = Net()
    x = net.node("Relu", net.conv(net.input(1, 3, 8, 8), 8, 3, name="first"))
    onnx.save(net.model(net.conv(x, 8, 8, name="second")), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(folder: Path, *arguments: object) -> str:
    """What the program says on stderr when it refuses; checks how it says it."""
    before = names(folder)
    command = [*PROGRAM, *(str(argument) for argument in arguments)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert (process.returncode, process.stdout) == (2, ""), process.stderr
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert "bug in topiarist" not in process.stderr
    assert names(folder) == before
    return process.stderr


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def text(path: Path) -> None:
    path.write_text("hello, world\n" * 20)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def nan_weights(path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        values = numpy_helper.to_array(tensor).copy()
        values[0, 0, 0, 0] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    edit(path, change)


def no_convolution(path: Path) -> None:
    net = Net()
    onnx.save(net.model(net.node("Relu", net.input(1, 4))), path)


def external(location: str) -> Damage:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 4)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    def damage(path: Path) -> None:
        loaded = onnx.load(path)
        change(loaded)
        path.write_bytes(loaded.SerializeToString())

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "There is no model file"),
        (text, "is not an ONNX model"),
        (empty, "truncated"),
        (truncated, "truncated"),
        (nan_weights, "NaN or infinite"),
        (no_convolution, "no convolution"),
        (external("weights.bin"), "no such file"),
        (external("../outside.bin"), "outside the model's folder"),
        (external("/etc/hostname"), "outside the model's folder"),
    ],
    ids=["absent", "text", "empty", "truncated", "nan", "no_conv", "missing", "outside", "system"],
)
def test_models(model: Path, tmp_path: Path, damage: Damage, words: str) -> None:
    damage(model)
    assert words in refused(tmp_path, "compile", model, "-o", "m.topi")


def test_a_folder_for_a_model(tmp_path: Path) -> None:
    assert "is a folder" in refused(tmp_path, "compile", tmp_path, "-o", "m.topi")


def test_targets(model: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, "compile", model, "-o", "m.topi", "--target", "x86-avx3")
    assert "x86-avx3" in said and "x86-avx2" in said


def test_outputs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    assert "doesn't exist" in refused(tmp_path, "compile", model, "-o", "absent/m.topi")
    assert "is a file" in refused(tmp_path, "compile", model, "-o", "file")
    assert (tmp_path / "file").read_text() == "keep"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert "can't write" in refused(tmp_path, "compile", model, "-o", folder / "m.topi")


def test_inputs_of_run(tiny_bundle: Path, tmp_path: Path) -> None:
    good = np.ones((2, 16), np.float32)
    for arrays, words in (
        ({"x": good.astype(np.float64)}, "float64"),
        ({"x": good[:, :8]}, "[2, 8]"),
        ({"x": good[:1]}, "[1, 16]"),
        ({"a": good, "b": good}, "no array named 'x'"),
    ):
        np.savez(tmp_path / "inputs.npz", **arrays)
        said = refused(tmp_path, "run", tiny_bundle, "--inputs", "inputs.npz", "-o", "out.npz")
        assert words in said and "x" in said
    (tmp_path / "inputs.npz").write_text("no zip")
    assert "no .npz file" in refused(tmp_path, "run", tiny_bundle, "--inputs", "inputs.npz")


def _alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_bundles(tiny_bundle: Path, tmp_path: Path, edit_manifest: Callable[..., None]) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((2, 16), np.float32))

    def said() -> str:
        return refused(tmp_path, "run", tiny_bundle, "--inputs", "x.npz")

    manifest = (tiny_bundle / "manifest.json").read_bytes()
    edit_manifest(tiny_bundle, versions={"apache-tvm": "0.26.0"})
    assert "compiled with apache-tvm 0.26.0" in said()
    target = {**registry.get("x86-avx2").to_json(), "required_features": ["avx1024"]}
    (tiny_bundle / "manifest.json").write_bytes(manifest)
    edit_manifest(tiny_bundle, target=target)
    assert "lacks avx1024" in said()
    (tiny_bundle / "manifest.json").write_bytes(manifest)
    _alter(tiny_bundle / "weights.bin")
    assert "weights.bin was altered" in said()
    (tiny_bundle / "weights.bin").unlink()
    assert "weights.bin can't be read" in said()
    (tiny_bundle / "manifest.json").write_bytes(manifest[:-20])
    assert "damaged" in said()


def test_wrong_options(model: Path, tmp_path: Path) -> None:
    """Typer's own refusals: the same code, and nothing on stdout."""
    for options in (["--threads", "0"], ["--batch", "none"], ["--unknown"]):
        command = [*PROGRAM, "compile", str(model), "-o", "m.topi", *options]
        process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (process.returncode, process.stdout) == (2, "")
        assert "Traceback" not in process.stderr
    assert names(tmp_path) == ["m.onnx"]


def _children(group: int) -> list[str]:
    """Processes of a process group, by their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.parametrize("delay", [1.1, 2.0, 3.0])
def test_an_interrupt(tmp_path: Path, delay: float) -> None:
    """Ctrl-C goes to the whole process group, in the middle of the work."""
    net = Net()
    x = net.input(1, 8, 56, 56)
    for index in range(40):
        x = net.node("Relu", net.conv(x, 8 + 4 * index, 8 if not index else 4 + 4 * index))
    onnx.save(net.model(x), tmp_path / "m.onnx")
    process = subprocess.Popen(
        [*PROGRAM, "compile", "m.onnx", "-o", "m.topi"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    time.sleep(delay)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and out == ""
    assert "interrupted\n" in err and "error:" not in err and "Traceback" not in err
    assert names(tmp_path) == ["m.onnx"]
    assert _children(process.pid) == []
