"""Bundles for a board, run here under QEMU: kernels, networks, the C++ example, bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from tests import cross
from tests.models import Net, random_inputs, run_onnx, worst_error
from topiarist.compiler import choose
from topiarist.compiler.board_runtime import BoardRuntime, fetch_runtime, write_runtime
from topiarist.compiler.bundle import _describe, read_manifest
from topiarist.compiler.cli import app
from topiarist.compiler.emulate import EmulatedSession, build_program
from topiarist.compiler.pipeline import compile_model
from topiarist.compiler.session import Session
from topiarist.compiler.verify import compare, verify
from topiarist.errors import BundleError, TargetError
from topiarist.pruning.one_shot import prune_model
from topiarist.schedules.kernels import CPU_KERNELS
from topiarist.targets import registry
from topiarist.targets.toolchain import AARCH64

pytestmark = [pytest.mark.qemu, cross.needs_emulator(AARCH64), cross.needs_compiler(AARCH64)]

BOARD = registry.get("rpi4")
QEMU = (AARCH64.emulator, "-L", AARCH64.sysroot, "-cpu", BOARD.mcpu)
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
Edit = Callable[..., None]
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BoardRuntime]:
    """The board's runtime, fetched once, in a cache that is the tests' own."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platformdirs.user_cache_path", lambda *_, **__: cache)
        try:
            fetched = fetch_runtime(BOARD)
        except TargetError as error:
            pytest.skip(f"needs TVM's wheels for {AARCH64.machine}: {error}")
        yield fetched


def compiled(model: onnx.ModelProto, folder: Path, target: str = BOARD.name) -> tuple[Path, Path]:
    """The paths of the model and of its bundle."""
    path, bundle = folder / "model.onnx", folder / f"{target}.topi"
    onnx.save(model, path)
    compile_model(path, target=target, output=bundle, measure=False)
    return path, bundle


# Numbers


def block_sparse(net: Net, out: int, into: int, kernel: int) -> NDArray[np.float32]:
    """A weight with one nonzero in five, in blocks of eight output channels."""
    shape = (out, into, kernel, kernel)
    kept = net.rng.random((out // 8, *shape[1:])) < 0.2
    weight = np.where(np.repeat(kept, 8, axis=0), net.rng.standard_normal(shape), 0)
    return weight.astype(np.float32)


def every_kernel() -> onnx.ModelProto:
    """Each kernel's name on a layer of each form; pooling, a residual, fully connected layers."""
    net = Net()
    x = net.node("Relu", net.conv(net.input(1, 3, 17, 15), 16, 3, name="first"))
    forms = {"3x3": (3, 1, 1), "strided": (3, 2, 1), "1x1": (1, 1, 1), "depthwise": (3, 1, 16)}
    outputs = []
    for kernel in CPU_KERNELS:
        for form, (size, stride, groups) in forms.items():
            weight = net.constant(block_sparse(net, 16, 16 // groups, size))
            attributes = {"strides": [stride] * 2, "pads": [size // 2] * 4, "group": groups}
            name = f"{kernel.name}.{form}"
            outputs.append(net.node("Conv", x, weight, net.weight(16), name=name, **attributes))
    residual = net.node("Relu", net.node("Add", x, net.conv(x, 16, 16, name="residual")))
    pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
    pooled = net.node("AveragePool", net.node("MaxPool", residual, **pool), **pool)
    flat = net.node("Flatten", pooled)
    wide = net.weight(400, 16 * 5 * 4)
    sparse = net.constant(
        np.where(net.rng.random((64, 400)) < 0.1, net.rng.standard_normal((64, 400)), 0).astype(
            np.float32
        )
    )
    hidden = net.node("Relu", net.node("Gemm", flat, wide, transB=1, name="dense"))
    scores = net.node("Gemm", hidden, sparse, transB=1, name="sparse")
    average = net.node("GlobalAveragePool", residual)
    return net.model(*outputs, average, scores)


def test_every_kernel(
    runtime: BoardRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that a layer is named after runs it, unless it refuses."""

    def only_the_named(self: Any, node: Any, views: Any) -> Any:
        site = self.parts.site(self.workloads[node.name], views)
        named = [
            kernel
            for kernel in CPU_KERNELS
            if node.name.startswith(f"{kernel.name}.")
            and kernel.refuses(site.workload, self.target) is None
        ]
        with monkeypatch.context() as patch:
            patch.setattr(choose, "kernels_for", lambda target: tuple(named) or CPU_KERNELS)
            return self._contest(node, site)

    monkeypatch.setattr(choose.Chooser, "_conv", only_the_named)
    path, bundle = compiled(every_kernel(), tmp_path)
    result = verify(bundle, path, open_bundle=EmulatedSession)
    assert result.passed, result
    used = {layer.kernel for layer in read_manifest(bundle).layers}
    assert used >= {kernel.name for kernel in CPU_KERNELS} | {"dense_linear", "sparse_linear"}


def resnet20() -> onnx.ModelProto:
    """Three stages of 16, 32 and 64 channels with three blocks each, for 32x32 pixels."""
    net = Net()
    x = net.node("Relu", net.conv(net.input(1, 3, 32, 32), 16, 3))
    into = 16
    for out in (16, 32, 64):
        for _ in range(3):
            stride = out // into
            y = net.node("Relu", net.conv(x, out, into, strides=[stride] * 2))
            y = net.conv(y, out, out)
            if stride > 1:
                x = net.conv(x, out, into, 1, strides=[stride] * 2)
            x = net.node("Relu", net.node("Add", x, y))
            into = out
    x = net.node("Flatten", net.node("GlobalAveragePool", x))
    return net.model(net.node("Gemm", x, net.weight(10, 64), transB=1))


def test_a_sparse_network_gives_what_x86_gives(runtime: BoardRuntime, tmp_path: Path) -> None:
    model, _ = prune_model(resnet20(), density=0.1)
    path, bundle = compiled(model, tmp_path)
    arguments = ["verify", bundle, "--against", path, "--target", BOARD.name, "--emulate", "--json"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["top1_agreement"] == 1.0
    _, native = compiled(model, tmp_path, "host")
    inputs = random_inputs(model)
    ours, theirs = (s.run(None, inputs) for s in (EmulatedSession(bundle), Session(native)))
    assert compare(ours, theirs, samples=1, tolerance=1e-4).passed


@pytest.mark.shared_data
def test_a_trained_network(runtime: BoardRuntime, tmp_path: Path) -> None:
    path = SHARED / "cifar10_resnet20.onnx"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    model, _ = prune_model(onnx.load(path), density=0.1)
    path, bundle = compiled(model, tmp_path)
    result = verify(bundle, path, open_bundle=EmulatedSession)
    assert result.passed and result.top1_agreement == 1.0, result


# The C++ example


@pytest.fixture(scope="session")
def small(runtime: BoardRuntime, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small network of two inputs and two outputs: the model and its bundle for the board."""
    net = Net()
    x, z = net.input(2, 3, 8, 8), net.input(2, 4, 8, 8, name="z")
    y = net.node("Relu", net.conv(x, 4, 3))
    both = net.node("Add", y, z)
    flat = net.node("Flatten", net.node("GlobalAveragePool", both))
    return compiled(net.model(both, flat), tmp_path_factory.mktemp("small"))


def emulated(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """A program of the board, run in a folder."""
    command = [*QEMU, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_example_is_built_and_run(
    runtime: BoardRuntime, small: tuple[Path, Path], tmp_path: Path
) -> None:
    """As the documentation says: `targets runtime -o`, cmake, install, copy, run."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake (Debian package cmake)")
    path, bundle = small
    source, build, board = (tmp_path / name for name in ("runtime", "build", "board"))
    write_runtime(runtime, source)
    cross = ("-DCMAKE_SYSTEM_NAME=Linux", f"-DCMAKE_CXX_COMPILER={AARCH64.compiler}")
    for command in (
        ("cmake", "-S", source, "-B", build, *cross),
        ("cmake", "--build", build),
        ("cmake", "--install", build, "--prefix", board, "--strip"),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source)  # the board has what was installed, and the bundle
    libraries = ["libtvm_ffi.so", "libtvm_runtime.so"]
    assert sorted(p.name for p in board.iterdir()) == [*libraries, "run_bundle"]
    shutil.copytree(bundle, board / "net.topi")

    model = onnx.load(path)
    inputs = random_inputs(model)
    for name, array in inputs.items():
        np.save(board / f"{name}.npy", array)
    files = ("-i", "x.npy", "-i", "z.npy", "-o", "y0.npy", "-o", "y1.npy")
    counts = ("--threads", 2, "--runs", 3)
    done = emulated(board / "run_bundle", "net.topi", *files, *counts, folder=board)
    assert done.returncode == 0, done.stderr
    assert "of 3 runs, 2 thread(s)" in done.stdout
    outputs = [np.load(board / f"y{i}.npy") for i in range(2)]
    assert worst_error(outputs, run_onnx(model, inputs)) < 1e-5


# Bad input


@pytest.fixture
def bundle(small: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the small network's bundle, to be damaged."""
    return Path(shutil.copytree(small[1], tmp_path / "net.topi"))


@pytest.fixture
def refused(runtime: BoardRuntime, tmp_path: Path) -> Callable[..., str]:
    """What the program says when it refuses to run."""
    program = build_program(AARCH64, runtime)

    def run(*arguments: object) -> str:
        done = emulated(program, *arguments, folder=tmp_path)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith("error: ")
        return done.stderr

    return run


def test_options_that_are_wrong(bundle: Path, refused: Callable[..., str]) -> None:
    assert "no bundle is named" in refused() and "usage: run_bundle" in refused()
    assert "no option --fast" in refused(bundle, "--fast", "1")
    assert "--threads has no value" in refused(bundle, "--threads")
    assert "--threads wants at least 1, got 0" in refused(bundle, "--threads", "0")
    assert "-i is given 1 times and the network has 2" in refused(bundle, "-i", "x.npy")


def test_files_that_are_wrong(
    bundle: Path, tmp_path: Path, refused: Callable[..., str], edit_manifest: Edit
) -> None:
    x, z = np.zeros((2, 3, 8, 8), np.float32), np.zeros((2, 4, 8, 8), np.float32)
    np.save(tmp_path / "z.npy", z)

    def given(array: NDArray[Any]) -> str:
        np.save(tmp_path / "x.npy", array)
        return refused(bundle, "-i", "x.npy", "-i", "z.npy")

    assert "the network takes {'descr': '<f4'" in given(x.astype(np.float64))
    assert "'shape': (2, 3, 8, 8), }, 1536 bytes" in given(x[:1])
    assert "'fortran_order': True" in given(np.asfortranarray(x))
    assert "different numbers of batches" in given(np.concatenate([x, x]))
    np.save(tmp_path / "z.npy", np.concatenate([z, z]))
    signatures = json.loads((bundle / "manifest.json").read_text())["outputs"]
    edit_manifest(bundle, outputs=[{**signatures[0], "shape": [1, 512]}, signatures[1]])
    assert "no axis for batches" in given(np.concatenate([x, x]))
    np.save(tmp_path / "z.npy", z)
    (tmp_path / "x.npy").write_bytes(b"hello, world")
    assert "x.npy is no .npy file" in refused(bundle, "-i", "x.npy", "-i", "z.npy")
    assert "no.npy can't be read: No such file" in refused(bundle, "-i", "no.npy", "-i", "z.npy")
    assert "can't be written: No such" in refused(bundle, "-o", "no/y.npy", "-o", "y.npy")


def test_bundles_that_are_wrong(
    bundle: Path, refused: Callable[..., str], edit_manifest: Edit, tiny_bundle: Path
) -> None:
    assert "no.topi/manifest.json can't be read: No such file" in refused("no.topi")
    assert f"{tiny_bundle}/lib.so is for another kind of processor" in refused(tiny_bundle)
    better = dataclasses.replace(BOARD, required_features=("asimd", "asimddp")).to_json()
    edit_manifest(bundle, target=better)
    assert "lacks asimddp, which code for rpi4 needs" in refused(bundle)
    edit_manifest(bundle, schema=99)
    assert "has the schema 99 and this program reads 2" in refused(bundle)
    edit_manifest(bundle, schema=2, versions={"apache-tvm": "0.26.0"})
    assert "was compiled with apache-tvm 0.26.0 and this program is built with" in refused(bundle)
    for text in ("hello, world", "[1]", '{"format": "something else"}'):
        (bundle / "manifest.json").write_text(text)
        assert "no manifest of a bundle" in refused(bundle)
    (bundle / "manifest.json").write_text('{"format": "topiarist-bundle"}')
    assert "the bundle is damaged, or can't run here: key is not in Map" in refused(bundle)


def test_files_of_a_bundle_that_are_wrong(bundle: Path, refused: Callable[..., str]) -> None:
    with (bundle / "weights.bin").open("ab") as file:
        file.write(b"more")
    assert "were written; copy the bundle again" in refused(bundle)
    (bundle / "lib.so").unlink()
    (bundle / "weights.bin").unlink()
    assert "weights.bin can't be read: No such file" in refused(bundle)


def replace_library(bundle: Path, source: str, edit_manifest: Edit) -> None:
    """Put a library of this C++ source in place of the network's."""
    (bundle / "lib.cc").write_text(source)
    library = str(bundle / "lib.so")
    command = [AARCH64.compiler, "-shared", "-fPIC", "-o", library, str(bundle / "lib.cc")]
    subprocess.run(command, check=True)
    (bundle / "lib.cc").unlink()
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    files["lib.so"] = dataclasses.asdict(_describe(bundle / "lib.so"))
    edit_manifest(bundle, files=files)


SVE = '__attribute__((constructor)) static void load() { asm(".inst 0x04a00000"); }'
ABORT = "__attribute__((constructor)) static void load() { __builtin_abort(); }"


@pytest.mark.parametrize(
    ("source", "message"),
    [(SVE, "an instruction that QEMU's model cortex-a72 lacks"), (ABORT, "crashed .*SIGABRT")],
    ids=["illegal instruction", "abort"],
)
def test_a_bundle_that_crashes(
    source: str, message: str, bundle: Path, small: tuple[Path, Path], edit_manifest: Edit
) -> None:
    replace_library(bundle, source, edit_manifest)
    with pytest.raises(BundleError, match=message):
        verify(bundle, small[0], open_bundle=EmulatedSession)


def test_a_bundle_that_takes_too_long(small: tuple[Path, Path]) -> None:
    path, bundle = small
    slow = partial(EmulatedSession, timeout_s=0.01)
    with pytest.raises(BundleError, match=r"not done after 0 s under QEMU.*--inputs"):
        verify(bundle, path, open_bundle=slow)


def test_another_target_or_none(
    small: tuple[Path, Path], tiny_bundle: Path, tiny_onnx: Path
) -> None:
    def said(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
        assert (result.exit_code, result.stdout) == (2, "")
        return result.stderr

    path, bundle = small
    given = (bundle, "--against", path, "--emulate")
    assert "was compiled for rpi4, not for rpi5" in said(*given, "--target", "rpi5")
    assert "has no libtvm_runtime.so" in said(*given, "--runtime", path.parent)
    assert "can't be emulated here" in said(tiny_bundle, "--against", tiny_onnx, "--emulate")
