"""TVM's runtime for a board: out of wheels, kept, copied; and what is said where it can't be."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from topiarist.compiler.board_runtime import LIBRARIES, fetch_runtime, write_runtime
from topiarist.compiler.cli import app
from topiarist.compiler.emulate import build_program, cpu_model
from topiarist.compiler.runtime import versions
from topiarist.errors import OutputError, TargetError
from topiarist.targets import registry
from topiarist.targets.toolchain import AARCH64

BOARD = registry.get("rpi4")
ARM64, X86_64 = 183, 62


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path / "cache")
    return tmp_path / "cache"


def write_wheels(folder: Path, machine: int = ARM64) -> Path:
    """Wheels with a file of each kind that is kept, and one that isn't."""
    library = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HH", 3, machine) + bytes(60)
    contents = {
        "apache-tvm": {
            "tvm/lib/libtvm_runtime.so": library,
            "tvm/lib/libtvm_compiler.so": library,
            "tvm/include/tvm/runtime/base.h": b"#define TVM_VERSION",
        },
        "apache-tvm-ffi": {
            "tvm_ffi/lib/libtvm_ffi.so": library,
            "tvm_ffi/include/": b"",
            "tvm_ffi/include/tvm/ffi/any.h": b"",
        },
    }
    folder.mkdir()
    for package, files in contents.items():
        name = f"{package.replace('-', '_')}-{versions()[package]}-py3-none-manylinux_2_28_aarch64"
        with zipfile.ZipFile(folder / f"{name}.whl", "w") as wheel:
            for path, content in files.items():
                wheel.writestr(path, content)
    return folder


def test_the_libraries_and_headers_are_kept(tmp_path: Path, cache: Path) -> None:
    runtime = fetch_runtime(BOARD, write_wheels(tmp_path / "wheels"))
    files = {str(p.relative_to(runtime.folder)) for p in runtime.folder.rglob("*") if p.is_file()}
    headers = {"include/tvm/runtime/base.h", "include/tvm/ffi/any.h"}
    assert files == {f"lib/{name}" for name in LIBRARIES} | headers
    assert runtime.folder.is_relative_to(cache)
    assert [path.name for path in runtime.folder.parent.iterdir()] == [runtime.folder.name]


def test_it_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch_runtime(BOARD, write_wheels(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert fetch_runtime(registry.get("rpi5")) == first


def test_the_command_writes_it_with_the_example(tmp_path: Path) -> None:
    wheels, output = write_wheels(tmp_path / "wheels"), tmp_path / "runtime"
    arguments = ["targets", "runtime", "rpi4", "--wheels", str(wheels), "-o", str(output)]
    for _ in range(2):  # the second time over the first
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["folder"] == str(output) and set(document["libraries"]) == set(LIBRARIES)
    found = {path.name for path in output.iterdir()}
    assert found == {"CMakeLists.txt", "README.md", "include", "lib", "run_bundle.cc"}
    assert "libtvm_runtime.so 0.0 MB" in CliRunner().invoke(app, arguments).stdout


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    runtime = fetch_runtime(BOARD, write_wheels(tmp_path / "wheels"))
    with pytest.raises(OutputError, match="is no runtime; name a new folder"):
        write_runtime(runtime, tmp_path)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TargetError, match=r"pip can't download .*manylinux.*rpi4 --wheels FOLDER"):
        fetch_runtime(BOARD)
    assert not list((cache / "runtime").iterdir())


def test_wheels_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"has no apache_tvm-.*_aarch64\.whl"):
        fetch_runtime(BOARD, tmp_path)
    with pytest.raises(TargetError, match=r"libtvm_runtime\.so is for x86-64 .*for aarch64"):
        fetch_runtime(BOARD, write_wheels(tmp_path / "x86", X86_64))
    wheels = write_wheels(tmp_path / "broken")
    for wheel in wheels.iterdir():
        wheel.write_bytes(b"hello, world")
    with pytest.raises(TargetError, match="can't be unpacked"):
        fetch_runtime(BOARD, wheels)


def test_the_installed_runtime_serves_this_machine() -> None:
    with pytest.raises(TargetError, match="nothing has to be fetched for x86-avx2"):
        fetch_runtime(registry.get("x86-avx2"))


@pytest.mark.parametrize("name", ["armv7", "android"])
def test_machines_without_wheels(name: str) -> None:
    with pytest.raises(TargetError, match=rf"no wheels of TVM for {name}.*docs/boards\.md"):
        fetch_runtime(registry.get(name))


def test_a_compiler_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = fetch_runtime(BOARD, write_wheels(tmp_path / "wheels"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=r"apt-get install g\+\+-aarch64-linux-gnu"):
        build_program(AARCH64, runtime)


def test_qemus_model_has_what_the_target_has_and_no_more() -> None:
    known = ["cortex-a53", "cortex-a72", "cortex-a76", "max"]
    expected = {"rpi4": "cortex-a72", "aarch64": "cortex-a53", "graviton3": "max", "armv7": "max"}
    for name, model in expected.items():
        target = registry.get(name)
        assert target.toolchain is not None
        assert cpu_model(target, target.toolchain, known) == model
