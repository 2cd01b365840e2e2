"""Runs CUDA code without a GPU: TVM's own runtime on a driver whose device is the processor.

`load` belongs into a process of its own (the fixture `gpu`): whatever runs there later sees a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cuda import ptx

HERE = Path(__file__).parent
_KERNEL = re.compile(r'extern "C" __global__ void [^;{]*?(\w+)\(([^;{)]*)\) {')
# Reads of vectors that aren't aligned and of arrays past their end end the process.
_CHECKS = ("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error")
_GXX = ("g++", "-std=c++17", "-w", "-fPIC", "-shared")

_loaded: list[ctypes.CDLL] = []


def load(folder: Path) -> None:
    """Make the driver and let TVM find it; kernels are compiled into the folder.

    So do processes that measure kernels and are started from here.
    """
    import tvm
    import tvm_ffi

    from topiarist.compiler import worker
    from topiarist.targets import nvrtc

    libraries = [folder / name for name in ("libcudart.so.13", "libcuda.so.1", "libnvidia-ml.so.1")]
    if not libraries[-1].exists():
        _make(*libraries)
    _loaded.extend(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL) for library in libraries)
    _loaded.append(ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so")))
    if (folder / "limits.json").exists():
        limit(**json.loads((folder / "limits.json").read_text()))
    worker.serve = functools.partial(_serve, folder)

    def compile_source(source: str, arch: str, *, ptx: bool = False) -> nvrtc.Compiled:
        return nvrtc.Compiled(compile_for_processor(source, folder), "")

    nvrtc.compile_source, nvrtc.require = compile_source, lambda: None
    tvm_ffi.register_global_func(
        "tvm_callback_cuda_compile",
        lambda source: compile_for_processor(source, folder),
        override=True,
    )


def _serve(folder: Path, connection: Connection, threads: int, parent: int) -> None:
    """`worker.serve` in a process that has the GPU; its times mean nothing, so they are few."""
    from topiarist.compiler import layer_bench
    from topiarist.compiler.worker import serve

    load(folder)
    layer_bench.ROUNDS = layer_bench.FEW_ROUNDS = 1
    serve(connection, threads, parent)


def _make(runtime: Path, driver: Path, nvml: Path) -> None:
    folder = runtime.parent
    script = folder / "version.script"
    script.write_text("libcudart.so.13 { global: *; };\n")
    source, empty = str(HERE / "device.cc"), folder / "empty.c"
    empty.write_text("")
    versioned = f"-Wl,-soname,{runtime.name},--version-script={script}"
    subprocess.run([*_GXX, "-O1", source, versioned, "-o", runtime], check=True)
    named = f"-Wl,-soname,{driver.name},--no-as-needed"
    subprocess.run([*_GXX, empty, named, runtime, "-o", driver], check=True)
    subprocess.run([*_GXX, HERE / "nvml.cc", f"-Wl,-soname,{nvml.name}", "-o", nvml], check=True)


def launches() -> tuple[int, int]:
    """Kernels that were launched by themselves, and graphs."""
    counters = ("emulated_launches", "emulated_graphs")
    return tuple(ctypes.c_int.in_dll(_loaded[0], name).value for name in counters)


def grant_memory(size: int) -> None:
    """How much memory the GPU has left for new buffers."""
    limit(memory=size)


def limit(**values: int) -> None:
    """What the GPU of this process has: `memory`, `threads` of a block."""
    for name, value in values.items():
        kind = ctypes.c_size_t if name == "memory" else ctypes.c_int
        kind.in_dll(_loaded[0], f"emulated_{name}").value = value


@contextlib.contextmanager
def limited_workers(folder: Path, **values: int) -> Iterator[None]:
    """As `limit`, of the processes that measure kernels and are started meanwhile."""
    file = folder / "limits.json"
    file.write_text(json.dumps(values))
    try:
        yield
    finally:
        file.unlink()


def compile_for_processor(source: str, folder: Path) -> bytes:
    """CUDA source as what the driver takes for a module."""
    name = hashlib.sha256(source.encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        unit = folder / f"{name}.cc"
        source = ptx.in_c(source).replace("__shared__ alignas(64)", "alignas(64) static")
        unit.write_text(source + "".join(_runner(source, m) for m in _KERNEL.finditer(source)))
        subprocess.run([*_GXX, *_CHECKS, f"-I{HERE}", unit, "-o", library], check=True)
    return str(library).encode() + b"\0"


def _runner(source: str, kernel: re.Match[str]) -> str:
    """What the driver calls instead of the kernel."""
    name, arguments = kernel[1], kernel[2].split(",")
    types = [" ".join(a.replace("__restrict__", "").split()[:-1]) for a in arguments]
    values = ", ".join(f"*({type_}*)p[{i}]" for i, type_ in enumerate(types))
    body = source[kernel.end() :].split('extern "C"')[0]
    barriers = "true" if "__syncthreads" in body or "__shfl" in body else "false"
    return f"""
static void {name}_call(void** p) {{ {name}({values}); }}
extern "C" const int {name}_params = {len(arguments)};
extern "C" void {name}_run(void** p, const unsigned* dims) {{
  fibers::run_grid({name}_call, p, dims, {barriers});
}}
"""


def run_all(
    functions: dict[str, Any], target: Any, calls: dict[str, list[NDArray[Any]]]
) -> dict[str, NDArray[np.float32]]:
    """Build the functions as one module and call each; their last arguments afterwards."""
    import tvm

    executable = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(target.tvm_target))
    results = {}
    for name, arrays in calls.items():
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a), tvm.cuda(0)) for a in arrays]
        executable[name](*tensors)
        results[name] = tensors[-1].numpy()
    return results
