"""How every convolution on a GPU ends: sums added up, bias, residual, activation, halo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import argument
from topiarist.schedules.cuda import emit
from topiarist.schedules.kernel import ConvViews
from topiarist.schedules.workload import ConvWorkload


@dataclass(frozen=True)
class Epilogue:
    """What the end of a convolution reads and writes."""

    workload: ConvWorkload
    views: ConvViews
    bias: Any
    residual: Any
    y: Any

    @staticmethod
    def arguments(workload: ConvWorkload, views: ConvViews) -> Epilogue:
        """The last arguments of every kernel: bias[, residual], y."""
        bias = argument("bias", workload.out_channels)
        residual = None
        if views.residual is not None:
            residual = argument("residual", workload.batch * views.residual.layout.size)
        y = argument("y", workload.batch * views.y.layout.size)
        return Epilogue(workload, views, bias, residual, y)

    def store(self, image: Any, channel: Any, pixel: tuple[Any, Any], value: Any) -> None:
        """Bias, residual and clamp of a sum, into its place."""
        view, other = self.views.y, self.views.residual
        at = view.at(image, channel) + view.layout.offset(*pixel)
        value = value + self.bias[channel]
        if self.views.in_place:
            value = value + self.y[at]
        elif other is not None:
            value = value + self.residual[other.at(image, channel) + other.layout.offset(*pixel)]
        T.buffer_store(self.y, emit.clamp(value, self.workload.activation), [at])

    def write_halo(self, first: Any, channels: Any, worker: Any, workers: int) -> None:
        """Fill the halo of channels from the first on, shared out among `workers`."""
        view = self.views.y
        with T.serial(0, self.workload.batch) as image, T.serial(0, channels) as channel:
            at = view.at(image, first + channel)
            emit.write_halo(self.y, view, at, worker, workers)


def add_up(sums: Any, threads: int, split: int, thread: Any, part: Any) -> None:
    """The first of `split` threads with parts of the same sums gets the sums of all."""
    if split == 1:
        return
    count = int(sums.shape[0])
    parts = emit.shared((split - 1) * threads * count)

    def at(other: Any, i: int) -> Any:
        return (other * count + i) * threads + thread

    with emit.when(part > 0):
        for i in range(count):
            T.buffer_store(parts, sums[i], [at(part - 1, i)])
    with emit.when(part == 0):
        for other in range(split - 1):
            for i in range(count):
                T.buffer_store(sums, sums[i] + parts[at(other, i)], [i])
