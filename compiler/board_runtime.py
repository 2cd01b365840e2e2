"""TVM's runtime for a board: two libraries and their headers, out of the wheels for its machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs

from topiarist.compiler.runtime import versions
from topiarist.errors import OutputError, TargetError
from topiarist.targets import elf
from topiarist.targets.spec import TargetSpec
from topiarist.targets.toolchain import Toolchain

LIBRARIES = ("libtvm_runtime.so", "libtvm_ffi.so")  # the first needs the second
VERSION_HEADER = "tvm/runtime/base.h"
_PACKAGES = ("apache-tvm", "apache-tvm-ffi")
_KEPT = {  # what of the wheels is kept, and where
    "tvm/lib/libtvm_runtime.so": "lib/libtvm_runtime.so",
    f"tvm/include/{VERSION_HEADER}": f"include/{VERSION_HEADER}",
    "tvm_ffi/lib/libtvm_ffi.so": "lib/libtvm_ffi.so",
    "tvm_ffi/include/": "include/",
}


@dataclass(frozen=True)
class BoardRuntime:
    """A folder with `lib` and `include`: what C++ programs for the board are built with."""

    folder: Path

    @property
    def include(self) -> Path:
        """The folder of the headers."""
        return self.folder / "include"

    @property
    def libraries(self) -> tuple[Path, ...]:
        """What is copied to the board beside the program."""
        return tuple(self.folder / "lib" / name for name in LIBRARIES)


def cache_folder() -> Path:
    """Where runtimes, and the programs built with them, are kept."""
    return platformdirs.user_cache_path("topiarist", appauthor=False)


def fetch_runtime(target: TargetSpec, wheels: Path | None = None) -> BoardRuntime:
    """The runtime of the installed TVM's versions for a target: kept, or else fetched by pip.

    `wheels` is a folder with the wheels, for machines without a network. Raises TargetError when
    there is none for the target or it can't be had.
    """
    toolchain = _with_wheels(target)
    wanted = {package: versions()[package] for package in _PACKAGES}
    name = "-".join([toolchain.machine, *wanted.values()])
    runtime = BoardRuntime(cache_folder() / "runtime" / name)
    if runtime.folder.is_dir() and wheels is None:
        return runtime
    runtime.folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=runtime.folder.parent, prefix=".fetching-") as work:
        found = wheels or _download(target, toolchain, wanted, Path(work, "wheels"))
        fresh = Path(work, "runtime")
        for package, version in wanted.items():
            _unpack(_find_wheel(found, package, version, toolchain), fresh)
        check_runtime(BoardRuntime(fresh), toolchain)
        shutil.rmtree(runtime.folder, ignore_errors=True)
        fresh.rename(runtime.folder)
    return runtime


def check_runtime(runtime: BoardRuntime, toolchain: Toolchain) -> BoardRuntime:
    """The runtime, or TargetError when it lacks a file or is for another machine."""
    for path in (*runtime.libraries, runtime.include / VERSION_HEADER):
        if not path.is_file():
            raise TargetError(f"{runtime.folder} is no runtime: it has no {path.name}")
    for path in runtime.libraries:
        head = elf.read(path)
        if head is None or not head.serves(toolchain.machine, toolchain.bits):
            found = "no ELF file" if head is None else f"for {head}"
            raise TargetError(
                f"{path} is {found}; it has to be for {toolchain.machine} ({toolchain.bits} bits)"
            )
    return runtime


def write_runtime(runtime: BoardRuntime, output: Path) -> None:
    """Copy a runtime and the C++ example into a folder. Raises OutputError."""
    if output.exists() and not BoardRuntime(output).libraries[0].is_file():
        raise OutputError(f"{output} exists and is no runtime; name a new folder")
    try:
        shutil.copytree(runtime.folder, output, dirs_exist_ok=True)
        for file in resources.files("topiarist.deploy_cpp").iterdir():
            if not file.name.startswith("__"):
                (output / file.name).write_bytes(file.read_bytes())
    except OSError as error:
        raise OutputError(f"can't write {output}: {error.strerror or error}") from error


def _with_wheels(target: TargetSpec) -> Toolchain:
    toolchain = target.toolchain
    if toolchain is None:
        raise TargetError(
            f"nothing has to be fetched for {target.name}: the installed packages have its "
            "libraries, in tvm/lib and tvm_ffi/lib"
        )
    if not toolchain.wheel_platform:
        raise TargetError(
            f"there are no wheels of TVM for {target.name} ({target.triple}): "
            f"build libtvm_runtime.so and libtvm_ffi.so of apache-tvm {versions()['apache-tvm']} "
            "for it, as docs/boards.md says"
        )
    return toolchain


def _download(
    target: TargetSpec, toolchain: Toolchain, wanted: dict[str, str], folder: Path
) -> Path:
    """Let pip put the wheels into a folder. Raises TargetError with what pip said."""
    arguments = ["--no-deps", "--only-binary=:all:", "--platform", toolchain.wheel_platform]
    process = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"),
            *(*arguments, "--dest", str(folder)),
            *(f"{package}=={version}" for package, version in wanted.items()),
        ],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise TargetError(
            f"pip can't download TVM's wheels for {toolchain.wheel_platform} ({lines[-1]}). From a "
            f"folder: `topiarist targets runtime {target.name} --wheels FOLDER`"
        )
    return folder


def _find_wheel(folder: Path, package: str, version: str, toolchain: Toolchain) -> Path:
    pattern = f"{package.replace('-', '_')}-{version}-*_{toolchain.machine}.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        raise TargetError(f"{folder} has no {pattern}")
    return found[0]


def _unpack(wheel: Path, into: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as file:
            for member in file.namelist():
                if (place := _place(member)) is not None:
                    (into / place).parent.mkdir(parents=True, exist_ok=True)
                    (into / place).write_bytes(file.read(member))
    except (OSError, zipfile.BadZipFile) as error:
        raise TargetError(f"{wheel} can't be unpacked: {error}") from error


def _place(member: str) -> str | None:
    """Where a file of a wheel goes; None for folders and what is not kept."""
    for name, place in _KEPT.items():
        if member.startswith(name) and not member.endswith("/"):
            return place + member.removeprefix(name)
    return None
