"""Running a compiled network, with the habits of ONNX Runtime's sessions."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topiarist.compiler import runtime
from topiarist.compiler.bundle import LIBRARY, OpenBundle
from topiarist.compiler.compiled import TensorSignature
from topiarist.compiler.cuda_runtime import CudaRuntime
from topiarist.compiler.gpu_memory import GpuMemory
from topiarist.compiler.manifest import Manifest
from topiarist.errors import BundleError, TopiaristError

Array = NDArray[Any]


@dataclass(frozen=True)
class NodeArg:
    """An input or output as ONNX Runtime's `get_inputs()` describes it."""

    name: str
    shape: list[int]
    type: str


class Session:
    """A bundle ready to run.

        session = Session("model.topi")
        (scores,) = session.run(None, {"input": images})

    `threads` is by default what the bundle was compiled for. The threads are TVM's pool, which
    all sessions that one Python thread runs share. A session may be used from several Python
    threads; its runs then wait for each other.

    Raises BundleError when the bundle is missing, damaged, of another version, or for a CPU with
    other instructions.
    """

    def __init__(self, path: Path | str, *, threads: int | None = None) -> None:
        folder = Path(path).resolve()
        bundle = OpenBundle(folder)
        self.manifest: Manifest = bundle.manifest
        self._pool = runtime.ThreadPool(self.manifest.threads if threads is None else threads)
        self._lock = threading.Lock()
        ffi = runtime.load()
        try:
            on_gpu = self.manifest.target.gpu is not None
            self._main = runtime.load_main(folder / LIBRARY, gpu=on_gpu)
            self._gpu = GpuMemory() if on_gpu else None
            params = _tensors(bundle.weights, self.manifest, ffi)
            self._params = ffi.convert([self._placed(tensor) for tensor in params])
        except (RuntimeError, OSError, AttributeError) as error:
            raise BundleError(f"{folder} can't be loaded: {error}") from error
        bundle.checked()
        self._buffers = [runtime.aligned_empty(s.shape, np.dtype(s.dtype)) for s in self.inputs]
        self._given = [ffi.from_dlpack(b) for b in self._buffers]
        self._arguments = [self._placed(tensor) for tensor in self._given]

    @property
    def inputs(self) -> tuple[TensorSignature, ...]:
        """Name, shape and dtype of each input."""
        return self.manifest.inputs

    @property
    def outputs(self) -> tuple[TensorSignature, ...]:
        """Name, shape and dtype of each output."""
        return self.manifest.outputs

    @property
    def threads(self) -> int:
        """The threads that a run uses."""
        return self._pool.threads

    def get_inputs(self) -> list[NodeArg]:
        """The inputs in ONNX Runtime's form."""
        return [_node_arg(s) for s in self.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """The outputs in ONNX Runtime's form."""
        return [_node_arg(s) for s in self.outputs]

    def run(
        self, output_names: Sequence[str] | None, inputs: Mapping[str, ArrayLike]
    ) -> list[Array]:
        """Run the network and return the named outputs, or all of them for None.

        The first axis may be a multiple of the compiled batch: the network then runs several
        times. Raises ValueError, with what was expected, for other names, dtypes or shapes, and
        TopiaristError where a GPU fails, for want of memory for one.
        """
        wanted = self._positions(output_names)
        arrays = self._checked(inputs)
        chunks = self._chunks(arrays)
        results = [_batched_empty(s, chunks) for s in self.outputs]
        with self._lock:
            try:
                self._pool.call(lambda: self._run_chunks(arrays, results, chunks))
            except RuntimeError as error:
                if self._gpu is None:
                    raise
                reason = " ".join(str(error).split())
                raise TopiaristError(f"the GPU failed: {reason[:300]}") from error
        return [results[i] for i in wanted]

    def gpu_seconds(self) -> float | None:
        """What the GPU needs for one run on the last inputs, without copies; None on a CPU.

        By the GPU's own clock. Raises GpuError where that fails.
        """
        if self._gpu is None:
            return None
        cuda = CudaRuntime()
        with self._lock:
            return self._pool.call(
                lambda: cuda.seconds(lambda: self._main(*self._arguments, self._params))
            )

    def _run_chunks(self, arrays: list[Array], results: list[Array], chunks: int) -> None:
        for chunk in range(chunks):
            for buffer, array in zip(self._buffers, arrays, strict=True):
                np.copyto(buffer, _part(array, buffer.shape, chunk))
            if self._gpu is not None:
                for given, argument in zip(self._given, self._arguments, strict=True):
                    self._gpu.copy(given, argument)
            returned = self._main(*self._arguments, self._params)
            tensors = [returned] if len(results) == 1 and _is_tensor(returned) else list(returned)
            for result, signature, tensor in zip(results, self.outputs, tensors, strict=True):
                np.copyto(_part(result, signature.shape, chunk), self._fetched(tensor, signature))

    def _placed(self, tensor: Any) -> Any:
        """The tensor where kernels find it: as it is, or a copy of it on the GPU."""
        return tensor if self._gpu is None else self._gpu.placed(tensor)

    def _fetched(self, tensor: Any, signature: TensorSignature) -> Array:
        """The values of an output."""
        if self._gpu is None:
            return np.from_dlpack(tensor)
        return self._gpu.fetched(tensor, signature.shape, np.dtype(signature.dtype))

    def _positions(self, names: Sequence[str] | None) -> list[int]:
        known = [s.name for s in self.outputs]
        unknown = [n for n in names or () if n not in known]
        if unknown:
            raise ValueError(f"no output named {unknown[0]!r}; the outputs are {', '.join(known)}")
        return [known.index(n) for n in names or known]

    def _checked(self, inputs: Mapping[str, ArrayLike]) -> list[Array]:
        """The arrays in the order of the inputs, each of the expected dtype and rank."""
        names = [s.name for s in self.inputs]
        if inputs.keys() != set(names):
            expected = ", ".join(describe(s) for s in self.inputs)
            for name in sorted(set(inputs).difference(names)):
                raise ValueError(f"no input named {name!r}; expected {expected}")
            for name in sorted(set(names).difference(inputs)):
                raise ValueError(f"the input {name!r} is missing; expected {expected}")
        return [_checked_array(s, np.asarray(inputs[s.name])) for s in self.inputs]

    def _chunks(self, arrays: list[Array]) -> int:
        """How many times the network has to run for these arrays."""
        counts = {self._chunks_of(s, a) for s, a in zip(self.inputs, arrays, strict=True)}
        if len(counts) > 1:
            raise ValueError("the inputs have different numbers of samples on their first axes")
        return counts.pop()

    def _chunks_of(self, signature: TensorSignature, array: Array) -> int:
        if array.shape == signature.shape:
            return 1
        batch = signature.shape[0] if signature.shape else 0
        fits = batch > 0 and array.shape[1:] == signature.shape[1:]
        if not (
            fits and array.shape[0] > 0 and array.shape[0] % batch == 0 and self.manifest.batched
        ):
            several = (
                f" (or a multiple of {batch} on the first axis)" if self.manifest.batched else ""
            )
            raise ValueError(
                f"the input {signature.name!r} has the shape {list(array.shape)}; "
                f"expected {list(signature.shape)}{several}"
            )
        return int(array.shape[0] // batch)


def describe(signature: TensorSignature) -> str:
    """`input: float32 [1, 3, 224, 224]`."""
    return f"{signature.name}: {signature.dtype} {list(signature.shape)}"


def _checked_array(signature: TensorSignature, array: Array) -> Array:
    if array.dtype != np.dtype(signature.dtype):
        raise ValueError(
            f"the input {signature.name!r} has the dtype {array.dtype}; "
            f"expected {signature.dtype} {list(signature.shape)}"
        )
    return array


def _tensors(weights: mmap, manifest: Manifest, ffi: Any) -> list[Any]:
    """The parameters as tensors on the mapped file, which is never copied."""
    return [
        ffi.from_dlpack(np.ndarray(p.shape, np.dtype(p.dtype), buffer=weights, offset=p.offset))
        for p in manifest.params
    ]


def _batched_empty(signature: TensorSignature, chunks: int) -> Array:
    dtype = np.dtype(signature.dtype)
    if chunks == 1:
        return np.empty(signature.shape, dtype)
    return np.empty((chunks * signature.shape[0], *signature.shape[1:]), dtype)


def _part(array: Array, shape: tuple[int, ...], chunk: int) -> Array:
    """The chunk's samples; the array itself where one run takes all."""
    if array.shape == shape:
        return array
    return array[chunk * shape[0] : (chunk + 1) * shape[0]]


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "__dlpack__")


def _node_arg(signature: TensorSignature) -> NodeArg:
    kind = {"float32": "float", "float64": "double"}.get(signature.dtype, signature.dtype)
    return NodeArg(signature.name, list(signature.shape), f"tensor({kind})")
