"""What all convolutions on GPUs share: which pixels a thread has, and what becomes of its sums.

A thread has `pixels` of a picture's column for `channels` neighbouring output channels in its
registers. Neighbouring threads have neighbouring pixels, so loads and stores are coalesced. Where
the pixels are few, `split` threads share what is to be summed and add up their sums at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.direct import refuses_views
from topiarist.schedules.cuda import emit
from topiarist.schedules.cuda.epilogue import Epilogue, add_up
from topiarist.schedules.kernel import ConvViews, KernelConfig
from topiarist.schedules.layout import LaneLayout
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.cuda import MAX_BLOCK_SHARED, MAX_BLOCK_THREADS

QUAD = 4  # values of the widest load


@dataclass(frozen=True)
class CudaConfig(KernelConfig):
    """The knobs: output channels and pixels of a thread; threads; threads that split a row.

    `chunk` nonzeros at a time are staged in shared memory, 0 reads them where they are. With
    `quads` the pixels are four neighbours, and one load has them all.
    """

    channels: int
    pixels: int
    threads: int
    split: int
    chunk: int = 0
    quads: bool = False

    def __str__(self) -> str:
        staged = f" chunks of {self.chunk}" if self.chunk else ""
        pixels = f"{self.pixels} quads" if self.quads else f"{self.pixels}"
        return f"{self.channels}x{pixels} {self.threads}x{self.split} threads{staged}"

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return self.channels * self.pixels

    @property
    def block_threads(self) -> int:
        """Threads of a block."""
        return self.threads * self.split

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the sums to add up, and what is staged."""
        sums = (self.split - 1) * self.threads * self.sums
        return 4 * (sums + self.split * self.chunk * (1 + self.channels))


def refuses_layouts(workload: ConvWorkload, views: ConvViews) -> str | None:
    """Why no kernel can run between these layouts, None where all can."""
    layouts = [v.layout for v in (views.x, views.y, views.residual) if v is not None]
    if any(layout.grid.lanes > 1 or layout.tile for layout in layouts):
        return "a GPU reads planes of pixels, no vectors and no tiles"
    return refuses_views(workload, views)


def tap_offsets(workload: ConvWorkload, layout: LaneLayout) -> NDArray[np.int64]:
    """Of the taps [C / groups, kh, kw] in the input, from the tap (0, 0) of a group's channel 0."""
    w = workload
    channel = np.arange(w.in_channels // w.groups) * layout.channel_stride
    ky = np.arange(w.kernel[0]) * w.dilation[0] * layout.row_vectors
    kx = np.arange(w.kernel[1]) * w.dilation[1]
    return channel[:, None, None] + ky[:, None] + kx


def first_tap(workload: ConvWorkload, layout: LaneLayout, row: Any, col: Any) -> Any:
    """Where the tap (0, 0) of an output pixel lies in an input channel."""
    top, left = (0, 0) if workload.pointwise else workload.padding[:2]
    return layout.offset(row * workload.strides[0] - top, col * workload.strides[1] - left)


def refuses_place(workload: ConvWorkload, config: CudaConfig, views: ConvViews) -> str | None:
    """Why a configuration can't run between these layouts, None where it can."""
    w = workload
    why = refuses_layouts(w, views)
    if why is not None:
        return why
    if w.out_channels // w.groups % config.channels:
        return f"output channels per group are no multiple of {config.channels}"
    if config.quads and not (_flat(views.x.layout) and w.pointwise and w.strides == (1, 1)):
        return "four pixels at a time need a pointwise layer of stride 1 and an input without halo"
    if not config.quads and w.out_height % config.pixels:
        return f"{w.out_height} rows are no multiple of {config.pixels}"
    if config.block_threads > MAX_BLOCK_THREADS:
        return f"{config.block_threads} threads in a block"
    if config.shared_bytes > MAX_BLOCK_SHARED:
        return f"{config.shared_bytes} bytes of shared memory in a block"
    return None


def _flat(layout: LaneLayout) -> bool:
    """Whether the rows of a plane follow each other without a gap."""
    return layout.row_vectors == layout.grid.width and layout.halo[0] == 0


@dataclass(frozen=True)
class Loops:
    """The kernel of a layer in its place; `sparse` skips zeros."""

    workload: ConvWorkload
    config: CudaConfig
    views: ConvViews
    sparse: bool
    adjacent: bool = False  # a thread's pixels lie in neighbouring rows, so that taps share loads

    @property
    def group_in(self) -> int:
        return self.workload.in_channels // self.workload.groups

    @property
    def group_out(self) -> int:
        return self.workload.out_channels // self.workload.groups

    @property
    def rows(self) -> int:
        """Blocks of output channels: the rows of the packed weight."""
        return self.workload.out_channels // self.config.channels

    @property
    def taps(self) -> int:
        """Weights of an output channel."""
        return self.group_in * math.prod(self.workload.kernel)

    @property
    def places(self) -> int:
        """Places of an image that threads have, each with so many pixels."""
        w, pixels = self.workload, self.config.pixels
        if self.config.quads:
            return -(-w.out_height * w.out_width // QUAD)
        return w.out_height // pixels * w.out_width

    @property
    def tiles(self) -> int:
        """Blocks of threads over all images."""
        return -(-self.workload.batch * self.places // self.config.threads)

    @property
    def offset_unit(self) -> int:
        """What an offset counts in: quads are told to be aligned by their index."""
        return QUAD if self.config.quads else 1

    @property
    def row_step(self) -> int:
        """Output rows from one of a thread's pixels to the next."""
        return 1 if self.adjacent else self.workload.out_height // self.config.pixels

    @property
    def input_step(self) -> int:
        """The same in the values of the input."""
        return self.row_step * self.workload.strides[0] * self.views.x.layout.row_vectors


@dataclass(frozen=True)
class Place:
    """A thread's pixels: where the first lies in the input and in the outputs, and the steps.

    `exists` is false in the last block's spare threads, which compute with others' inputs.
    """

    x: Any
    image: Any
    row: Any
    col: Any
    exists: Any


@dataclass(frozen=True)
class Thread:
    """A thread of a kernel's grid, with its accumulators; `row` is its block of channels."""

    place: Place
    sums: Any
    row: Any
    tx: Any
    ty: Any


@contextmanager
def each_thread(k: Loops) -> Iterator[Thread]:
    """The kernel's last arguments and its grid: what is added to the sums is stored at the end."""
    c = k.config
    end = Epilogue.arguments(k.workload, k.views)
    with emit.grid((k.tiles, k.rows), (c.threads, c.split)) as ((tile, row), (tx, ty)):
        place = _place(k, tile * c.threads + tx)
        sums = emit.local(c.sums)
        for i in range(c.sums):
            T.buffer_store(sums, T.float32(0), [i])
        yield Thread(place, sums, row, tx, ty)
        add_up(sums, c.threads, c.split, tx, ty)
        with emit.when(T.And(place.exists, ty == 0)):
            _store(k, end, place, sums, row)
        worker = (tile * c.split + ty) * c.threads + tx
        end.write_halo(row * c.channels, c.channels, worker, k.tiles * c.block_threads)


def _place(k: Loops, number: Any) -> Place:
    """The thread's pixels, from its number among all threads."""
    w, views = k.workload, k.views
    count = w.batch * k.places
    place = T.bind(T.min(number, count - 1))
    image = place // k.places
    layout = views.x.layout
    start = image * layout.size + views.x.base
    if k.config.quads:
        quad = place % k.places
        # In quads, for the compiler to see that it is aligned.
        x = image * (layout.size // QUAD) + views.x.base // QUAD + quad
        return Place(T.bind(x), image, quad, 0, number < count)
    row, col = place // w.out_width % (w.out_height // k.config.pixels), place % w.out_width
    row = row * k.config.pixels if k.adjacent else row
    first = first_tap(w, layout, row, col)
    return Place(T.bind(start + first), image, row, col, number < count)


def _store(k: Loops, end: Epilogue, place: Place, sums: Any, row: Any) -> None:
    """Bias, residual, clamp; every pixel by one thread."""
    w, c = k.workload, k.config
    for v in range(c.pixels):
        if c.quads:
            pixel = place.row * QUAD + v
            y, x, inside = pixel // w.out_width, pixel % w.out_width, w.out_height * w.out_width
            with emit.when(pixel < inside):
                _store_pixel(k, end, place.image, (y, x), sums, row, v)
        else:
            y = place.row + v * k.row_step
            _store_pixel(k, end, place.image, (y, place.col), sums, row, v)


def _store_pixel(
    k: Loops, end: Epilogue, image: Any, pixel: tuple[Any, Any], sums: Any, row: Any, v: int
) -> None:
    c = k.config
    for a in range(c.channels):
        end.store(image, row * c.channels + a, pixel, sums[a * c.pixels + v])
