"""What candidates and programs share: TIR functions, their machine code, packed weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from topiarist.compiler.gpu_code import use_compiler
from topiarist.errors import BuildError
from topiarist.schedules.kernel import ConvKernel, ConvSite, ConvViews, KernelConfig
from topiarist.schedules.operators import operators_for
from topiarist.schedules.workload import ConvWorkload, SparsitySignature
from topiarist.targets.linker import find_linker
from topiarist.targets.linux import available_cores
from topiarist.targets.spec import TargetSpec

ANY_SPARSITY = SparsitySignature(0.0, "any", (0, 0, 0))


class Parts:
    """Everything made so far for one target and thread count, by what determines it."""

    def __init__(self, target: TargetSpec, threads: int) -> None:
        self.target = target
        self.threads = threads
        self.operators = operators_for(target)
        self.device = tvm.cpu(0) if target.gpu is None else tvm.cuda(0)
        use_compiler(target)
        self.functions: dict[str, Any] = {}
        self._names: dict[Any, str] = {}
        self._constants: dict[Any, Sequence[NDArray[Any]]] = {}
        self._compiled: dict[str, Callable[..., None]] = {}

    def function(self, key: Any, label: str, make: Callable[[str], Any]) -> str:
        """The name of the function for this key, made on first use."""
        if key not in self._names:
            name = f"{label}_{len(self._names)}"
            self.functions[name] = make(name)
            self._names[key] = name
        return self._names[key]

    def constants(
        self, key: Any, make: Callable[[], Sequence[NDArray[Any]]]
    ) -> Sequence[NDArray[Any]]:
        """The arrays for this key, made on first use."""
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def forget_constants(self) -> None:
        """Let go of all arrays: the next network has other weights."""
        self._constants.clear()

    def site(self, workload: ConvWorkload, views: ConvViews) -> ConvSite:
        """A convolution in its place, on this target."""
        return ConvSite(workload, views, self.target, self.threads)

    def convolution(
        self,
        kernel: ConvKernel[Any],
        site: ConvSite,
        config: KernelConfig,
        weight: NDArray[np.float32],
    ) -> str:
        """The name of a convolution's function; layers that differ in zeros only share it.

        With kernels whose code holds the weight, only layers with the same weight do.
        """
        w = site.workload
        held = hashlib.sha256(weight.tobytes()).digest() if kernel.weight_in_code else None
        label = f"{kernel.name}_{w.in_channels}x{w.height}_{w.out_channels}_k{w.kernel[0]}"
        return self.function(
            (kernel.name, replace(w, sparsity=ANY_SPARSITY), config, site.views, held),
            label,
            lambda name: kernel.specialised(site, config, name, weight),
        )

    def compiled(self, names: Sequence[str]) -> Mapping[str, Callable[..., None]]:
        """The functions ready to call on this machine. Raises BuildError."""
        new = [name for name in dict.fromkeys(names) if name not in self._compiled]
        shares = available_cores() if self.target.gpu is None else 1
        groups = [group for i in range(shares) if (group := new[i::shares])]
        if groups:
            with ThreadPoolExecutor(len(groups)) as pool:  # TVM lets go of Python's lock
                for group, library in zip(groups, pool.map(self.built, groups), strict=True):
                    self._compiled.update({name: library[name] for name in group})
        return self._compiled

    def export(self, names: Sequence[str], path: Path) -> Path:
        """The functions as a shared library for the target's machine. Raises BuildError."""
        linker = find_linker(self.target)
        self.built(names).export_library(str(path), fcompile=linker)
        return path

    def built(self, names: Sequence[str]) -> Any:
        """The machine code of the functions together. Raises BuildError."""
        functions = {name: self.functions[name] for name in names}
        try:
            built = tvm.compile(
                tvm.IRModule(functions), target=tvm.target.Target(self.target.tvm_target)
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise BuildError(
                f"TVM could not build {', '.join(names)} for {self.target.name}: {error}"
            ) from error
        return built.mod if hasattr(built, "mod") else built
