"""Compiling for a machine that is not this one, and what can't be done with the bundle here."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests import cross
from tests.compiler.test_tune import two_convs
from topiarist.compiler.bundle import read_manifest
from topiarist.compiler.cli import app
from topiarist.compiler.session import Session
from topiarist.errors import BundleError
from topiarist.targets import elf, registry, toolchain
from topiarist.targets.elf import ElfHead

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="needs a machine that is not ARM"
)
needs_aarch64 = cross.needs_compiler(toolchain.AARCH64)
needs_armv7 = cross.needs_compiler(toolchain.ARM_HARD_FLOAT)
HEADS = {"rpi4": ElfHead("aarch64", 64), "armv7": ElfHead("arm", 32, "hard")}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(*arguments: object) -> str:
    """The one paragraph of a command that fails."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_convs(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model for a Raspberry Pi 4."""
    path = tmp_path_factory.mktemp("bundle") / "model.topi"
    result = call("compile", model, "--target", "rpi4", "-o", path)
    assert result.exit_code == 0, result.output
    assert (
        "rpi4 is 64-bit ARM and this machine is x86-64: nothing was timed, and kernels were chosen "
        "for 3 layers by estimate" in result.stdout
    )
    return path


@pytest.mark.parametrize(
    "target", [pytest.param("rpi4", marks=needs_aarch64), pytest.param("armv7", marks=needs_armv7)]
)
def test_the_library_is_for_the_target(target: str, model: Path, tmp_path: Path) -> None:
    result = call("compile", model, "--target", target, "-o", tmp_path / "m.topi", "--json")
    assert result.exit_code == 0, result.output
    assert {layer["timed"] for layer in json.loads(result.stdout)["layers"]} == {"estimate"}
    assert elf.read(tmp_path / "m.topi" / "lib.so") == HEADS[target]
    assert read_manifest(tmp_path / "m.topi").target == registry.get(target)


@pytest.mark.parametrize("target", ["rpi4", "armv7", "android"])
def test_llvms_own_linker_does_it_too(target: str, model: Path, tmp_path: Path) -> None:
    linker = shutil.which("ld.lld") or shutil.which("ld.lld-19")
    if linker is None:
        pytest.skip("needs ld.lld (Debian package lld)")
    out = tmp_path / "m.topi"
    result = call("compile", model, "--target", target, "-o", out, "--linker", linker)
    assert result.exit_code == 0, result.output
    assert elf.read(out / "lib.so") == HEADS.get(target, ElfHead("aarch64", 64))


def test_without_a_linker_nothing_is_begun(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("topiarist.compiler.pipeline.import_model", None)
    out = tmp_path / "m.topi"
    problem = complaint("compile", model, "-t", "rpi4", "-o", out)
    assert "install the package g++-aarch64-linux-gnu, or lld" in problem
    assert "--ndk" in complaint("compile", model, "-t", "android", "-o", out)
    problem = complaint("compile", model, "-t", "rpi4", "-o", out, "--sysroot", tmp_path)
    assert "has no C library" in problem
    assert list(tmp_path.iterdir()) == []


@needs_aarch64
def test_a_bundle_for_another_device_says_what_to_do(
    bundle: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.npz").write_bytes(b"")
    for command in (
        ("verify", bundle, "--against", model),
        ("bench", bundle),
        ("run", bundle, "--inputs", tmp_path / "x.npz"),
    ):
        problem = complaint(*command)
        assert "rpi4 is 64-bit ARM and this machine is x86-64; copy it to the device" in problem
        assert "verify --emulate" in problem
    with pytest.raises(BundleError, match="can't run here"):
        Session(bundle)


@needs_aarch64
def test_a_bundle_for_another_device_is_explained(bundle: Path) -> None:
    result = call("inspect", bundle)
    assert result.exit_code == 0, result.output
    assert "compiled for Raspberry Pi 4 (BCM2711), 1 thread(s)" in result.stdout
    assert "roofline of one core, as its profile states: 12 GFLOP/s, 4.0 GB/s" in result.stdout


def test_what_needs_a_clock_says_where_to_find_one(model: Path, tmp_path: Path) -> None:
    tuning = complaint("tune", model, "--target", "rpi4", "--log", tmp_path / "log.jsonl")
    assert "on the board itself with `--target host`" in tuning and "--tracker HOST:PORT" in tuning
    for command in (
        ("compile", model, "-o", tmp_path / "m.topi", "--measure"),
        ("model", "collect", model, "--log", tmp_path / "log.jsonl"),
    ):
        assert "compile --no-measure" in complaint(*command, "--target", "rpi4")
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_inspected_for_a_board(model: Path) -> None:
    document = json.loads(call("inspect", model, "--target", "rpi4", "--json").stdout)
    assert document["target"] == "rpi4" and document["total"]["estimated_best_us"] > 0
