"""Running a bundle for another machine under QEMU, by the C++ example and TVM's runtime for it."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler.board_runtime import (
    BoardRuntime,
    cache_folder,
    check_runtime,
    fetch_runtime,
)
from topiarist.compiler.bundle import check_bundle
from topiarist.errors import BuildError, BundleError, TargetError
from topiarist.targets import arm
from topiarist.targets.linux import available_cores
from topiarist.targets.spec import TargetSpec
from topiarist.targets.toolchain import Toolchain

TIMEOUT_S = 1200.0  # ResNet-50 with 90 % zeros takes 6 s an image
_FLAGS = ("-std=c++17", "-O1", "-Wl,--no-as-needed,--allow-shlib-undefined")

Array = NDArray[Any]


class EmulatedSession:
    """A bundle for another machine, ready to run here: a `Session`, as far as `verify` needs one.

    `runtime` is the machine's runtime in a folder, by default the wheels'. Raises BundleError when
    the bundle is damaged, TargetError when something is missing that has to be installed, and
    BuildError.
    """

    def __init__(
        self, path: Path | str, *, runtime: Path | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._bundle = Path(path).resolve()
        self.manifest = check_bundle(self._bundle)
        self._timeout_s = timeout_s
        target = self.manifest.target
        toolchain = target.toolchain
        if toolchain is None or not toolchain.emulator:
            raise TargetError(f"{path} is for {target.name}, which can't be emulated here")
        emulator = _tool(toolchain.emulator, toolchain.emulator_package)
        self._cpu = cpu_model(target, toolchain, _cpu_models(emulator))
        if runtime is None:
            built_with = fetch_runtime(target)
        else:
            built_with = check_runtime(BoardRuntime(runtime.resolve()), toolchain)
        program = build_program(toolchain, built_with)
        self._command = [emulator, "-L", toolchain.sysroot, "-cpu", self._cpu, str(program)]

    def run(self, output_names: None, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs; the first axis of the inputs may be a multiple of the compiled batch.

        Raises ValueError for other names of inputs and BundleError when the program fails.
        """
        names = [signature.name for signature in self.manifest.inputs]
        if set(inputs) != set(names):
            raise ValueError(f"the inputs are {', '.join(names)}, got {', '.join(inputs)}")
        with TemporaryDirectory(prefix="topiarist-") as folder:
            takes = [f"in{i}.npy" for i, _ in enumerate(names)]
            makes = [f"out{i}.npy" for i, _ in enumerate(self.manifest.outputs)]
            for name, file in zip(names, takes, strict=True):
                np.save(Path(folder, file), np.ascontiguousarray(inputs[name]))
            files = [*(("-i", file) for file in takes), *(("-o", file) for file in makes)]
            self._execute([part for option in files for part in option], folder)
            return [np.load(Path(folder, file)) for file in makes]

    def _execute(self, options: Sequence[str], folder: str) -> None:
        # More threads than cores wait for each other in loops.
        threads = min(self.manifest.threads, available_cores())
        command = [*self._command, str(self._bundle), *options, "--runs", "0"]
        command += ["--threads", str(threads)]
        try:
            process = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=self._timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise BundleError(
                f"{self._bundle} was not done after {self._timeout_s:.0f} s under QEMU, which is "
                "slow; give it fewer samples (--inputs)"
            ) from error
        if process.returncode != 0:
            raise BundleError(self._explain(process.returncode, process.stderr))

    def _explain(self, code: int, said: str) -> str:
        """Why the program ended: its own message, or the signal that ended it."""
        if code == -signal.SIGILL:
            return (
                f"{self._bundle} has an instruction that QEMU's model {self._cpu} lacks (SIGILL): "
                f"the features of {self.manifest.target.name} claim more than its cores have "
                "(`topiarist targets show`), or QEMU is too old to know it"
            )
        if code < 0:
            return f"{self._bundle} crashed under QEMU ({signal.Signals(-code).name})"
        lines = said.strip().splitlines() or [f"exit code {code}"]
        return lines[0].removeprefix("error: ")


def cpu_model(target: TargetSpec, toolchain: Toolchain, known: Sequence[str]) -> str:
    """QEMU's model of a target's cores, so that instructions that these lack are found out.

    Where QEMU has no such model, none of the `known`, it is the one with all features.
    """
    if target.mcpu in known:
        return target.mcpu
    extensions = {f"+{feature.llvm}" for feature in arm.FEATURES.values()}
    extended = not extensions.isdisjoint(target.tvm_target.get("mattr", ()))
    plain = toolchain.plain_cpu if target.mcpu == "generic" and not extended else ""
    return plain or "max"


def build_program(toolchain: Toolchain, runtime: BoardRuntime) -> Path:
    """The C++ example for a machine; built once, until something that it is made of changes.

    Raises TargetError without a compiler and BuildError when it fails.
    """
    compiler = _tool(toolchain.compiler, toolchain.package)
    source = (resources.files("topiarist.deploy_cpp") / "run_bundle.cc").read_bytes()
    flags = [*_FLAGS, f"-Wl,-rpath,{runtime.folder / 'lib'}"]
    parts = [source, *(library.read_bytes() for library in runtime.libraries)]
    parts += [" ".join(flags).encode(), _said([compiler, "--version"]).encode()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    program = cache_folder() / "programs" / f"run_bundle-{toolchain.machine}-{digest[:16]}"
    if program.is_file():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=program.parent, prefix=".building-") as work:
        (Path(work) / "run_bundle.cc").write_bytes(source)
        fresh = Path(work) / "run_bundle"
        libraries = [str(library) for library in runtime.libraries]
        command = [compiler, *flags, "-isystem", str(runtime.include), f"{work}/run_bundle.cc"]
        _said([*command, "-o", str(fresh), *libraries])
        fresh.rename(program)
    return program


def _said(command: Sequence[str]) -> str:
    """What a tool prints. Raises BuildError when it fails."""
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if process.returncode != 0:
        reason = " ".join(process.stderr.split())[:500]
        raise BuildError(f"{Path(command[0]).name} failed: {reason}")
    return process.stdout


def _cpu_models(emulator: str) -> list[str]:
    # QEMU's exit code for this is 1.
    process = subprocess.run(
        [emulator, "-cpu", "help"], capture_output=True, text=True, check=False
    )
    return process.stdout.split()


def _tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise TargetError(f"{name} isn't installed; on Debian: apt-get install {package}")
    return found
