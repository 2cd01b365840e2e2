"""Tests of kernels that run as code of another machine, all in one emulated program.

Compiling, linking and starting a program take longer than a kernel. So tests run twice: first
until they call their kernels, which are collected, and again with what these have computed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from numpy.typing import NDArray
from tvm_ffi import libinfo

from tests.schedules import building, kernel_contract
from topiarist.targets.spec import TargetSpec

DRIVER = Path(__file__).with_name("emulated_calls.c")
TYPES = {"i": 0, "u": 1, "f": 2}  # NumPy's kinds as DLPack's codes
TIMEOUT_S = 300.0

Test = Callable[[], None]
Calls = dict[str, list[NDArray[Any]]]
Results = dict[str, NDArray[Any]]


class _Collected(Exception):
    """A test has come to kernels that did not run yet."""


def need_tools(target: TargetSpec) -> None:
    """Skip the test where something is not installed, naming the package."""
    tools = target.toolchain
    assert tools is not None
    packages = {tools.compiler: tools.package, tools.emulator: tools.emulator_package}
    for tool, package in packages.items():
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}, of the package {package}")


class Emulation:
    """Kernels of tests, run on the target in one program; `replay` hands out their results."""

    def __init__(self, target: TargetSpec, tests: Mapping[str, Test], folder: Path) -> None:
        functions: dict[str, Any] = {}
        calls: Calls = {}

        def collect(name: str) -> Callable[..., Results]:
            def run_all(found: dict[str, Any], target: TargetSpec, args: Calls) -> Results:
                for key, function in found.items():
                    symbol = f"{name}__{key}"
                    functions[symbol] = function.with_attr("global_symbol", symbol)
                    calls[symbol] = args[key]
                raise _Collected

            return run_all

        for name, test in tests.items():
            with suppress(_Collected, pytest.skip.Exception):
                _with(collect(name), test)
        self._results = execute(link(functions, target, folder), target, calls)

    def replay(self, name: str, test: Test) -> None:
        """The test, with what its kernels have computed."""

        def run_all(found: dict[str, Any], target: TargetSpec, args: Calls) -> Results:
            return {key: self._results[f"{name}__{key}"] for key in found}

        _with(run_all, test)


def _with(run_all: Callable[..., Results], test: Test) -> None:
    """The test, with another way to run kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (building, kernel_contract):
            patch.setattr(module, "run_all", run_all)
        test()


def link(functions: dict[str, Any], target: TargetSpec, folder: Path) -> Path:
    """A program for the target that calls these functions."""
    tools = target.toolchain
    assert tools is not None
    kernels, program = folder / "kernels.o", folder / "program"
    built = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target.tvm_target))
    built.mod.write_to_file(str(kernels), "o")
    include = [f"-I{libinfo.find_include_path()}", f"-I{libinfo.find_dlpack_include_path()}"]
    command = [tools.compiler, "-x", "c", "-O1", "-Wall", "-rdynamic", *include, str(DRIVER)]
    command += ["-x", "none", str(kernels), "-ldl", "-lm", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def execute(program: Path, target: TargetSpec, calls: Calls) -> Results:
    """What the last argument of each call has become."""
    tools = target.toolchain
    assert tools is not None
    emulator = [tools.emulator, "-L", tools.sysroot, str(program)]
    source = b"".join(_call(name, arrays) for name, arrays in calls.items())
    done = subprocess.run(emulator, input=source, capture_output=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr.decode()}"
    results, at = {}, 0
    for name, (*_, last) in calls.items():
        results[name] = np.frombuffer(done.stdout, last.dtype, last.size, at).copy()
        at += last.nbytes
    return results


def _call(name: str, arrays: list[NDArray[Any]]) -> bytes:
    """A call as the program reads it."""
    parts = [f"{name} {len(arrays)}\n".encode()]
    for array in arrays:
        kind, bits = TYPES[array.dtype.kind], array.itemsize * 8
        parts += [f"{kind} {bits} {array.size}\n".encode(), np.ascontiguousarray(array).tobytes()]
    return b"".join(parts)
