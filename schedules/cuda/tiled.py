"""Dense convolution on a GPU as a matrix product that is never laid out as one.

A block of threads computes a tile: `channels` output channels of `pixels` pixels. For some taps at
a time it copies their weights and input values into shared memory, where each value is read by all
threads of a row or column of the tile; meanwhile the next ones are on their way to registers. A
thread has 4 or 8 channels of 4 or 8 pixels in registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import argument, prim_func
from topiarist.schedules.cuda import emit
from topiarist.schedules.cuda.epilogue import Epilogue, add_up
from topiarist.schedules.cuda.thread import QUAD, first_tap, refuses_layouts, tap_offsets
from topiarist.schedules.kernel import ConvViews, KernelConfig, Packed
from topiarist.schedules.workload import ConvWorkload
from topiarist.targets.cuda import MAX_BLOCK_SHARED, MAX_BLOCK_THREADS

LEAST_CHANNELS = 16  # of a group: fewer leave most of a tile empty


@dataclass(frozen=True)
class TiledConfig(KernelConfig):
    """The knobs: a thread's channels and pixels, threads along both; taps in a step; split.

    `split` teams of threads share the taps of a tile and add up their sums.
    """

    channels: int
    pixels: int
    rows: int
    cols: int
    taps: int
    split: int

    def __str__(self) -> str:
        tile = f"{self.tile_channels}x{self.tile_pixels}"
        return f"{tile} by {self.channels}x{self.pixels} {self.taps} taps split {self.split}"

    @property
    def tile_channels(self) -> int:
        """Output channels of a block."""
        return self.channels * self.rows

    @property
    def tile_pixels(self) -> int:
        """Pixels of a block."""
        return self.pixels * self.cols

    @property
    def threads(self) -> int:
        """Threads of a team."""
        return self.rows * self.cols

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return self.channels * self.pixels

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: what is staged, and the sums to add up."""
        staged = self.split * self.taps * (self.tile_channels + self.tile_pixels)
        return 4 * (staged + (self.split - 1) * self.threads * self.sums)


def refuses(workload: ConvWorkload) -> str | None:
    """Why tiles don't suit a layer, None where they do."""
    outputs = workload.out_channels // workload.groups
    if outputs < LEAST_CHANNELS:
        return f"{outputs} output channels in a group don't fill a tile of {LEAST_CHANNELS}"
    return None


def refuses_place(workload: ConvWorkload, config: TiledConfig, views: ConvViews) -> str | None:
    """Why a configuration can't run between these layouts, None where it can."""
    c, threads = config, config.threads * config.split
    why = refuses_layouts(workload, views)
    if why is not None:
        return why
    if c.channels % QUAD or c.pixels % QUAD:
        return f"{c.channels}x{c.pixels} sums are read in fours"
    if c.tile_pixels % c.threads and c.threads % c.tile_pixels:
        return f"{c.threads} threads can't share out {c.tile_pixels} pixels"
    if threads > MAX_BLOCK_THREADS:
        return f"{threads} threads in a block"
    if c.shared_bytes > MAX_BLOCK_SHARED:
        return f"{c.shared_bytes} bytes of shared memory in a block"
    return None


@dataclass(frozen=True)
class Tiles:
    """The kernel of a layer in its place."""

    workload: ConvWorkload
    config: TiledConfig
    views: ConvViews

    @property
    def group_out(self) -> int:
        return self.workload.out_channels // self.workload.groups

    @property
    def group_in(self) -> int:
        return self.workload.in_channels // self.workload.groups

    @property
    def rows(self) -> int:
        """Tiles of a group's output channels."""
        return -(-self.group_out // self.config.tile_channels)

    @property
    def pixels(self) -> int:
        """Of all images."""
        w = self.workload
        return w.batch * w.out_height * w.out_width

    @property
    def cols(self) -> int:
        """Tiles of pixels."""
        return -(-self.pixels // self.config.tile_pixels)

    @property
    def steps(self) -> int:
        """Of each team."""
        taps = self.group_in * math.prod(self.workload.kernel)
        return -(-taps // (self.config.taps * self.config.split))

    def place(self, number: Any) -> tuple[Any, Any, Any]:
        """Image, row and column of a pixel of the output."""
        w = self.workload
        plane = w.out_height * w.out_width
        return number // plane, number % plane // w.out_width, number % w.out_width

    def input_at(self, number: Any, group: Any) -> Any:
        """Where a pixel's tap (0, 0) of a group's first channel lies; beyond the last, the last's.

        `number` is evaluated once.
        """
        w, view = self.workload, self.views.x
        image, row, col = self.place(T.bind(T.min(number, self.pixels - 1)))
        channel = group * self.group_in * view.layout.channel_stride
        at = first_tap(w, view.layout, row, col)
        return T.bind(image * view.layout.size + view.base + channel + at)


def pack(k: Tiles, weight: NDArray[np.float32]) -> Packed:
    """values [groups, rows, steps, teams, taps of a step, channels of a tile], offsets; zeros fill.

    Teams take steps in turn.
    """
    w, c = k.workload, k.config
    at = tap_offsets(w, k.views.x.layout).ravel()
    taps = k.steps * c.split * c.taps
    values = np.zeros((w.groups, k.rows * c.tile_channels, taps), np.float32)
    values[:, : k.group_out, : at.size] = weight.reshape(w.groups, k.group_out, -1)
    tiles = values.reshape(w.groups, k.rows, c.tile_channels, taps).transpose(0, 1, 3, 2)
    offsets = np.zeros(taps, np.int32)
    offsets[: at.size] = at
    return np.ascontiguousarray(tiles).ravel(), offsets


def make_prim_func(k: Tiles, name: str) -> Any:
    """f(x, values, offsets, bias[, residual], y)."""
    w, c = k.workload, k.config
    taps = k.steps * c.split * c.taps
    with prim_func(name) as builder:
        x = argument("x", w.batch * k.views.x.layout.size)
        values = argument("values", w.groups * k.rows * taps * c.tile_channels)
        offsets = argument("offsets", taps, "int32")
        end = Epilogue.arguments(w, k.views)
        grid = (k.cols, w.groups * k.rows)
        with emit.grid(grid, (c.threads, c.split)) as ((tile, row), (thread, team)):
            block = _Block(k, x, values, offsets, tile, row, thread, team)
            sums = block.sums()
            add_up(sums, c.threads, c.split, thread, team)
            with emit.when(team == 0):
                block.store(end, sums)
            worker = (tile * c.split + team) * c.threads + thread
            end.write_halo(block.first, block.count, worker, k.cols * c.threads * c.split)
    return builder.get()


class _Block:
    """One thread of a block at work."""

    def __init__(
        self,
        k: Tiles,
        x: Any,
        values: Any,
        offsets: Any,
        tile: Any,
        row: Any,
        thread: Any,
        team: Any,
    ) -> None:
        c = k.config
        self.k, self.x, self.values, self.offsets = k, x, values, offsets
        self.tile, self.row, self.thread, self.team = tile, row, thread, team
        group, within = row // k.rows, row % k.rows * c.tile_channels
        self.first = group * k.group_out + within  # output channel of the tile
        self.count = T.min(c.tile_channels, k.group_out - within)
        self.group = group

    def sums(self) -> Any:
        """The products of all of the team's taps."""
        c = self.k.config
        sums = emit.local(c.sums)
        for i in range(c.sums):
            T.buffer_store(sums, T.float32(0), [i])
        weights = emit.shared(c.split * c.taps * c.tile_channels)
        inputs = emit.shared(c.split * c.taps * c.tile_pixels)
        fetch = _Fetch(self, weights, inputs)
        fetch.load(0)
        with T.serial(0, self.k.steps) as step:
            fetch.store()
            fetch.load(T.min(step + 1, self.k.steps - 1))
            with T.unroll(0, c.taps) as tap:
                self._multiply(weights, inputs, sums, tap)
        return sums

    def _multiply(self, weights: Any, inputs: Any, sums: Any, tap: Any) -> None:
        """Add a tap's products: its weights times its input values."""
        c = self.k.config
        at = self.team * c.taps + tap
        row, col = self.thread // c.cols, self.thread % c.cols
        a, b = emit.local(c.channels), emit.local(c.pixels)
        for i in range(0, c.channels, QUAD):
            first = at * c.tile_channels + row * c.channels + i
            T.buffer_store(a, weights[T.ramp(first, 1, QUAD)], [T.ramp(i, 1, QUAD)])
        for i in range(0, c.pixels, QUAD):
            first = at * c.tile_pixels + (i // QUAD * c.cols + col) * QUAD
            T.buffer_store(b, inputs[T.ramp(first, 1, QUAD)], [T.ramp(i, 1, QUAD)])
        for i in range(c.channels):
            for j in range(c.pixels):
                n = i * c.pixels + j
                T.buffer_store(sums, sums[n] + a[i] * b[j], [n])

    def store(self, end: Epilogue, sums: Any) -> None:
        """The sums of pixels and channels that there are."""
        k, c = self.k, self.k.config
        row, col = self.thread // c.cols, self.thread % c.cols
        for j in range(c.pixels):
            number = self.tile * c.tile_pixels + (j // QUAD * c.cols + col) * QUAD + j % QUAD
            with emit.when(number < k.pixels):
                image, y, x = k.place(number)
                for i in range(c.channels):
                    channel = row * c.channels + i
                    with emit.when(channel < self.count):
                        end.store(image, self.first + channel, (y, x), sums[i * c.pixels + j])


class _Fetch:
    """A thread's share of what its team copies into shared memory, a step ahead in registers."""

    def __init__(self, block: _Block, weights: Any, inputs: Any) -> None:
        c = block.k.config
        self.block, self.weights, self.inputs = block, weights, inputs
        self.quads = c.taps * c.tile_channels // QUAD
        self.turns = -(-self.quads // c.threads)
        self.held = emit.local(self.turns * QUAD)
        self.across = max(1, c.tile_pixels // c.threads)  # different pixels of a thread
        self.together = max(1, c.threads // c.tile_pixels)  # taps that the team loads at a time
        self.loads = self.across * -(-c.taps // self.together)
        self.values = emit.local(self.loads)
        self.pixels = [self._pixel(i) for i in range(self.across)]

    def load(self, step: Any) -> None:
        """From the device's memory into registers."""
        block, c = self.block, self.block.k.config
        first = (step * c.split + block.team) * c.taps
        row = block.row * (block.k.steps * c.split * c.taps)
        quads = (row + first) * (c.tile_channels // QUAD)
        for turn in range(self.turns):
            quad = turn * c.threads + block.thread
            at = T.ramp((quads + T.min(quad, self.quads - 1)) * QUAD, 1, QUAD)
            T.buffer_store(self.held, block.values[at], [T.ramp(turn * QUAD, 1, QUAD)])
        for i in range(self.loads):
            tap, across = self._tap(i)
            offset = block.offsets[first + T.min(tap, c.taps - 1)]
            T.buffer_store(self.values, block.x[self.pixels[across] + offset], [i])

    def store(self) -> None:
        """From registers into shared memory."""
        block, c = self.block, self.block.k.config
        base = block.team * c.taps
        for turn in range(self.turns):
            quad = turn * c.threads + block.thread
            with emit.when(quad < self.quads):
                at = T.ramp((base * (c.tile_channels // QUAD) + quad) * QUAD, 1, QUAD)
                T.buffer_store(self.weights, self.held[T.ramp(turn * QUAD, 1, QUAD)], [at])
        for i in range(self.loads):
            tap, across = self._tap(i)
            pixel = block.thread % c.tile_pixels + across * c.threads
            with emit.when(tap < c.taps):
                at = (base + tap) * c.tile_pixels + pixel
                T.buffer_store(self.inputs, self.values[i], [at])

    def _tap(self, i: int) -> tuple[Any, int]:
        """The tap in the step and the pixel of the thread's i-th load."""
        first = self.block.thread // self.block.k.config.tile_pixels
        return i // self.across * self.together + first, i % self.across

    def _pixel(self, i: int) -> Any:
        """Where the tap (0, 0) of a thread's pixel lies in the input."""
        block, c = self.block, self.block.k.config
        within = block.thread % c.tile_pixels + i * c.threads
        return block.k.input_at(block.tile * c.tile_pixels + within, block.group)
