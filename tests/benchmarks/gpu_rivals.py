"""What else runs a dense convolution on an NVIDIA GPU: TVM's own rules, and cuDNN through PyTorch.

cuDNN is not in TVM's wheel, so TVM can't call it. PyTorch is imported where it is needed only.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import te
from tvm.s_tir import dlight

from tests.benchmarks.layers import Shape
from topiarist.targets.spec import TargetSpec

COPIES = 8  # of inputs and weights, which take turns
PRECISIONS = ("fp32", "tf32", "fp16")  # of cuDNN
Launch = Callable[[], Any]


def dlight_conv(name: str, shape: Shape, batch: int, target: TargetSpec) -> Any:
    """f(x, weight, y), scheduled by DLight: a matrix product on tiles in shared memory, then relu.

    x is [batch, channels, size + kernel - 1, size + kernel - 1]: padded by somebody else.
    """
    s = shape
    extent = s.size + s.kernel - 1
    x = te.placeholder((batch, s.channels, extent, extent), name="x")
    weight = te.placeholder((s.filters, s.channels, s.kernel, s.kernel), name="weight")
    c, i, j = (te.reduce_axis((0, k)) for k in (s.channels, s.kernel, s.kernel))
    sums = te.compute(
        (batch, s.filters, s.size, s.size),
        lambda n, o, y, z: te.sum(x[n, c, y + i, z + j] * weight[o, c, i, j], axis=[c, i, j]),
        name="sums",
    )
    result = te.compute(sums.shape, lambda *at: te.max(sums(*at), te.const(0, "float32")), name="y")
    function = te.create_prim_func([x, weight, result]).with_attr("global_symbol", name)
    with tvm.target.Target(target.tvm_target):
        module = dlight.ApplyDefaultSchedule(dlight.gpu.Matmul())(tvm.IRModule({name: function}))
    return module[name]


def has_cudnn() -> bool:
    """Whether a PyTorch with it is there to call it."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available() and torch.backends.cudnn.is_available())


def cudnn_conv(x: NDArray[np.float32], weight: NDArray[np.float32], precision: str) -> Launch:
    """The same layer on cuDNN, which picks its algorithm by timing; returns its output.

    In fp16 inputs, weights and outputs are so in memory, too.
    """
    import torch

    torch.backends.cudnn.benchmark = True
    dtype, tf32 = torch.half if precision == "fp16" else torch.float, precision == "tf32"
    copies = [
        tuple(torch.from_numpy(array).cuda().to(dtype) for array in (x, weight))
        for _ in range(COPIES)
    ]
    turns, padding = itertools.cycle(copies), weight.shape[-1] // 2

    def launch() -> Any:
        torch.backends.cudnn.allow_tf32 = tf32
        return torch.relu(torch.nn.functional.conv2d(*next(turns), padding=padding))

    return launch


def captured(launch: Launch, calls: int) -> Callable[[], float]:
    """PyTorch's calls as a CUDA graph; what launches it returns the seconds of a call."""
    import torch

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            launch()

    def seconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    return seconds
