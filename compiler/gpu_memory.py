"""Tensors in the memory of a GPU, by TVM's runtime alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from topiarist.compiler import runtime


class GpuMemory:
    """Copies tensors to the first GPU and back."""

    def __init__(self) -> None:
        ffi = runtime.load()
        self._ffi = ffi
        self._device = ffi.Device(runtime.CUDA, 0)
        self._allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._copy = ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._wait = ffi.get_global_func("runtime.Device_StreamSync")

    def placed(self, tensor: Any) -> Any:
        """A copy on the GPU."""
        shape = self._ffi.Shape(tensor.shape)
        made = self._allocate(shape, tensor.dtype, self._device, None)
        self.copy(tensor, made)
        return made

    def copy(self, source: Any, target: Any) -> None:
        """Between tensors of one shape; what was launched before is done first."""
        self._copy(source, target)
        self._wait(self._device, 0)

    def fetched(self, tensor: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The values of a tensor on the GPU."""
        array = runtime.aligned_empty(shape, dtype)
        self.copy(tensor, self._ffi.from_dlpack(array))
        return array
