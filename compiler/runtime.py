"""TVM's runtime without TVM's compiler: loads in milliseconds what `import tvm` takes seconds for.

Only `tvm_ffi` and the shared library `libtvm_runtime` are used. Where the process has imported
`tvm` already, the same library is found loaded and everything works alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from topiarist.errors import TopiaristError
from topiarist.targets import detect_cuda

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

ALIGNMENT = 64  # bytes; generated code uses aligned vector moves and crashes on less

CUDA = 2  # DLPack's number
_CPU, _DEVICE, _POOLED_ALLOCATOR = 1, 0, 2
_BIG_CORES = 1
_Result = TypeVar("_Result")
_of_thread = threading.local()


def versions() -> dict[str, str]:
    """The versions that compiled code depends on: topiarist, apache-tvm and apache-tvm-ffi."""
    packages = ("topiarist", "apache-tvm", "apache-tvm-ffi")
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def load() -> Any:
    """Load the runtime library once and return the module `tvm_ffi`."""
    with _without_torch():
        import tvm_ffi

    try:
        ctypes.CDLL(str(_library("libtvm_runtime.so")), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TopiaristError(
            f"TVM's runtime can't be loaded ({error}); reinstall apache-tvm"
        ) from error
    # TVM pins the calling thread to the first core, and even out of a taskset: never here.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    return tvm_ffi


def _library(name: str) -> Path:
    """One of TVM's libraries."""
    spec = importlib.util.find_spec("tvm")  # finds the package without importing it
    if spec is None or spec.origin is None:
        raise TopiaristError("the package apache-tvm isn't installed: `pip install topiarist`")
    return Path(spec.origin).parent / "lib" / name


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Where torch is installed, tvm_ffi imports it, in seconds, for a problem on Windows only."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


@cache
def load_cuda() -> None:
    """Load the part of the runtime that is for NVIDIA GPUs, and CUDA's own."""
    load()
    runtime = detect_cuda.runtime_library()
    if runtime is None:
        raise TopiaristError("CUDA's runtime library is missing: `pip install 'topiarist[cuda]'`")
    ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(str(_library("libtvm_runtime_cuda.so")))
    except OSError as error:
        raise TopiaristError(f"TVM's runtime for GPUs can't be loaded: {error}") from error


def load_main(library: Path, *, gpu: bool = False) -> Callable[..., Any]:
    """The VM function `main` of an exported library. Raises RuntimeError if it can't be loaded."""
    if gpu:
        load_cuda()
    module = load().load_module(_spelled_for(library.resolve()))
    machine = module["vm_load_executable"]()
    devices = (CUDA, _CPU) if gpu else (_CPU,)
    machine["vm_initialization"](*(x for d in devices for x in (d, _DEVICE, _POOLED_ALLOCATOR)))
    main: Callable[..., Any] = machine["main"]
    return main


def _spelled_for(library: Path) -> str:
    """The path with its inode number spelled in slashes and dots: `a/lib.so` -> `a/.//./lib.so`.

    The loader takes a library whose path it has loaded before for the same one, although the
    bundle may have been replaced in the meantime.
    """
    digits = f"{library.stat().st_ino:b}"
    return "".join(
        [str(library.parent), *("/." if d == "1" else "/" for d in digits), "/", library.name]
    )


class ThreadPool:
    """Runs calls with TVM's pool set to `threads`.

    TVM keeps one pool for each calling thread and never lets it grow. A thread whose pool is too
    small already (by code that ran before) is left alone: the calls then go to a thread of ours.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.threads = threads
        self._own: ThreadPoolExecutor | None = None

    def call(self, function: Callable[[], _Result]) -> _Result:
        """`function()`, with this number of threads."""
        if _set_threads(self.threads):
            return function()
        if self._own is None:
            from concurrent.futures import ThreadPoolExecutor  # rarely needed

            self._own = ThreadPoolExecutor(1, "topiarist", _set_threads, (self.threads,))
        return self._own.submit(function).result()


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this thread on as many cores as there are threads: the last, the first has interrupts.

    Threads that are started meanwhile stay there.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _set_threads(threads: int) -> bool:
    """Size the calling thread's pool; False if it was made smaller before."""
    current = _number_of_threads()
    if getattr(_of_thread, "has_pool", False) and current() == threads:
        return True
    os.environ["TVM_NUM_THREADS"] = str(max(threads, _environment_threads()))
    load().get_global_func("runtime.config_threadpool")(_BIG_CORES, threads)
    _of_thread.has_pool = True
    return bool(current() == threads)


@cache
def _number_of_threads() -> Callable[[], int]:
    """TVM's function of the calling thread's pool; finding it takes a microsecond each time."""
    found: Callable[[], int] = load().get_global_func("runtime.NumThreads")
    return found


def _environment_threads() -> int:
    with contextlib.suppress(ValueError):
        return int(os.environ.get("TVM_NUM_THREADS", ""))
    return 1


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised array whose data pointer is aligned for generated code."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
