"""Convolution on tensor cores: factors in fp16, sums in fp32; dense, or without the zeros of 2:4.

As in `tiled` a block of threads computes a tile of output channels and pixels, some taps at a time.
Here a warp has a part of the tile in its registers and multiplies matrices of 16 channels, 32 taps
and 8 pixels (`fragments`): in two instructions, or in one where of four neighbouring input channels
at most two have weights. Inputs lie in memory in fp32 and become fp16 on their way into shared
memory. Weights are packed as the instructions want them and go straight into registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T

from topiarist.schedules.cpu.emit import argument, prim_func
from topiarist.schedules.cuda import emit, fragments
from topiarist.schedules.cuda.epilogue import Epilogue, add_up
from topiarist.schedules.cuda.fragments import (
    CHANNELS,
    GROUP,
    INPUT_WORDS,
    OF_GROUP,
    PIXELS,
    PLACES_CHANNELS,
    SUMS,
    TAPS,
)
from topiarist.schedules.cuda.thread import QUAD, refuses_layouts, tap_offsets
from topiarist.schedules.cuda.tiled import TiledConfig, Tiles
from topiarist.schedules.kernel import ConvViews, Packed
from topiarist.schedules.workload import HALF, ConvWorkload
from topiarist.targets.cuda import MAX_BLOCK_SHARED, MAX_BLOCK_THREADS, WARP
from topiarist.targets.spec import TargetSpec

EIGHT = 8  # taps that a thread copies at a time: four words
MOST_VALUES = 200  # in a thread's registers; the rest are addresses


@dataclass(frozen=True)
class TensorConfig(TiledConfig):
    """The knobs of tiles, with warps in the place of threads: a warp's channels and pixels."""

    @property
    def threads(self) -> int:
        """Threads of a team."""
        return WARP * self.rows * self.cols

    @property
    def sums(self) -> int:
        """Accumulators of a thread."""
        return self.channels * self.pixels // WARP

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: inputs in fp16, and the sums to add up."""
        inputs = self.split * self.taps * self.tile_pixels
        return 2 * inputs + 4 * (self.split - 1) * self.threads * self.sums

    def values(self, sparse: bool) -> int:
        """Words in a thread's registers: sums, weights, and what it copies and multiplies."""
        weights = self.channels // CHANNELS * fragments.words_of(sparse) * self.taps // TAPS
        copied = self.tile_pixels * self.taps // self.threads
        return self.sums + weights + copied + self.pixels // PIXELS * INPUT_WORDS


def refuses(workload: ConvWorkload, target: TargetSpec) -> str | None:
    """Why a layer should not or can't run on the target's tensor cores, None where it can."""
    if workload.dtype != HALF:
        return "it multiplies in fp16, which was not asked for"
    if target.gpu is None or not target.gpu.multiplies_half:
        return f"the tensor cores of {target.isa} multiply smaller matrices, and no sparse ones"
    return None


def refuses_pattern(workload: ConvWorkload) -> str | None:
    """Why not half of the products are known to be zero, None where they are."""
    pattern = workload.sparsity.pattern
    kept, _, group = pattern.partition(":")
    fits = group and (pattern == "1:2" or (int(kept) <= OF_GROUP and int(group) % GROUP == 0))
    if not fits:
        return f"the zeros are {pattern}, not {OF_GROUP}:{GROUP} nor within it"
    inputs, whole = workload.in_channels // workload.groups, max(GROUP, int(group))
    return f"{inputs} input channels are no multiple of {whole}" if inputs % whole else None


def refuses_place(
    workload: ConvWorkload, config: TensorConfig, views: ConvViews, *, sparse: bool
) -> str | None:
    """Why a configuration can't run between these layouts, None where it can."""
    c, threads = config, config.threads * config.split
    why = refuses_layouts(workload, views)
    if why is not None:
        return why
    if c.channels % PLACES_CHANNELS or c.pixels % PIXELS or c.taps % TAPS:
        return f"{c.channels}x{c.pixels} by {c.taps} taps are no whole matrices"
    if c.tile_pixels % c.threads and c.threads % c.tile_pixels:
        return f"{c.threads} threads can't share out {c.tile_pixels} pixels"
    if c.values(sparse) > MOST_VALUES:
        return f"{c.values(sparse)} values in a thread's registers"
    if threads > MAX_BLOCK_THREADS:
        return f"{threads} threads in a block"
    if c.shared_bytes > MAX_BLOCK_SHARED:
        return f"{c.shared_bytes} bytes of shared memory in a block"
    return None


def pack(k: Tiles, weight: NDArray[np.float32], *, sparse: bool) -> Packed:
    """values [groups, rows, 32 taps, 16 channels, threads, words][, places], offsets.

    Taps are in the order [kh, kw, C / groups], zeros fill; teams take steps in turn. Raises
    ValueError where weights are too many for the sparse form.
    """
    w, c = k.workload, k.config
    taps = k.steps * c.split * c.taps
    matrix = np.zeros((w.groups, k.rows * c.tile_channels, taps), np.float32)
    rows = weight.transpose(0, 2, 3, 1).reshape(w.groups, k.group_out, -1)
    matrix[:, : k.group_out, : rows.shape[2]] = rows
    tiles = matrix.reshape(w.groups, k.rows, c.tile_channels, taps)
    offsets = np.zeros(taps, np.int32)
    offsets[: rows.shape[2]] = tap_offsets(w, k.views.x.layout).transpose(1, 2, 0).ravel()
    offsets = offsets.reshape(-1, TAPS)[:, fragments.input_order()].ravel()
    if not sparse:
        return fragments.dense_words(tiles).ravel(), offsets
    values, places = fragments.compressed(tiles)
    words = fragments.weight_words(values).ravel()
    return words, fragments.place_words(places).ravel(), offsets


def make_prim_func(k: Tiles, name: str, *, sparse: bool) -> Any:
    """f(x, values[, places], offsets, bias[, residual], y)."""
    w, c = k.workload, k.config
    taps = k.steps * c.split * c.taps
    pieces = w.groups * k.rows * taps // TAPS * c.tile_channels // CHANNELS
    with prim_func(name) as builder:
        x = argument("x", w.batch * k.views.x.layout.size)
        values = argument("values", pieces * WARP * fragments.words_of(sparse), "int32")
        places = argument("places", pieces // 2 * WARP, "int32") if sparse else None
        offsets = argument("offsets", taps, "int32")
        end = Epilogue.arguments(w, k.views)
        grid = (k.cols, w.groups * k.rows)
        with emit.grid(grid, (c.threads, c.split)) as ((tile, row), (thread, team)):
            lane = _Lane(k, tile, row, thread, team)
            sums = _multiply_all(lane, _Weights(lane, values, places), _Inputs(lane, x, offsets))
            add_up(sums, c.threads, c.split, thread, team)
            with emit.when(team == 0):
                lane.store(end, sums)
            worker = (tile * c.split + team) * c.threads + thread
            end.write_halo(lane.first, lane.count, worker, k.cols * c.threads * c.split)
    return builder.get()


def _multiply_all(lane: _Lane, weights: _Weights, inputs: _Inputs) -> Any:
    """The products of all of the team's taps."""
    k, c = lane.k, lane.k.config
    sums = emit.local(c.sums)
    for i in range(c.sums):
        T.buffer_store(sums, T.float32(0), [i])
    weights.load(0)
    inputs.load(0)
    with T.serial(0, k.steps) as step:
        following = T.min(step + 1, k.steps - 1)
        inputs.store()
        inputs.load(following)
        for piece in range(c.taps // TAPS):
            read = inputs.read(piece)
            for m in range(c.channels // CHANNELS):
                for n in range(c.pixels // PIXELS):
                    at = (m * (c.pixels // PIXELS) + n) * SUMS
                    weights.multiply(T.address_of(sums[at]), piece, m, read, n)
        weights.load(following)  # on their way while the inputs are stored
    return sums


class _Lane:
    """A thread of a warp: its part of the tile."""

    def __init__(self, k: Tiles, tile: Any, row: Any, thread: Any, team: Any) -> None:
        c = k.config
        self.k, self.tile, self.row, self.thread, self.team = k, tile, row, thread, team
        self.group, within = row // k.rows, row % k.rows * c.tile_channels
        self.first = self.group * k.group_out + within  # output channel of the tile
        self.count = T.min(c.tile_channels, k.group_out - within)
        self.lane = thread % WARP
        self.g, self.t = self.lane // 4, self.lane % 4
        self.down, self.across = thread // WARP // c.cols, thread // WARP % c.cols

    def piece(self, step: Any, piece: int) -> Any:
        """The number of 32 taps among all."""
        c = self.k.config
        return (step * c.split + self.team) * (c.taps // TAPS) + piece

    def store(self, end: Epilogue, sums: Any) -> None:
        """The sums of pixels and channels that there are."""
        k, c = self.k, self.k.config
        pixels = c.pixels // PIXELS
        for n in range(pixels):
            for i in range(2):
                within = self.across * c.pixels + n * PIXELS + 2 * self.t + i
                number = self.tile * c.tile_pixels + within
                with emit.when(number < k.pixels):
                    image, y, x = k.place(number)
                    for m in range(2 * c.channels // CHANNELS):
                        channel = self.down * c.channels + m * (CHANNELS // 2) + self.g
                        at = (m // 2 * pixels + n) * SUMS + m % 2 * 2 + i
                        with emit.when(channel < self.count):
                            end.store(image, self.first + channel, (y, x), sums[at])


class _Weights:
    """A warp's weights of a step, in its threads' registers."""

    def __init__(self, lane: _Lane, values: Any, places: Any) -> None:
        c = lane.k.config
        self.lane, self.values, self.places = lane, values, places
        self.words = fragments.words_of(places is not None)
        self.matrices = c.channels // CHANNELS
        count = c.taps // TAPS * self.matrices
        self.held = emit.local(count * self.words, "int32")
        self.held_places = emit.local(count // 2, "int32") if places is not None else None

    def load(self, step: Any) -> None:
        """From the device's memory."""
        lane, c = self.lane, self.lane.k.config
        pieces = lane.k.steps * c.split * c.taps // TAPS
        for piece in range(c.taps // TAPS):
            first = lane.row * pieces + lane.piece(step, piece)
            matrix = first * (c.tile_channels // CHANNELS) + lane.down * self.matrices
            for i in range(self.matrices * self.words // QUAD):
                m, quad = i // (self.words // QUAD), i % (self.words // QUAD)
                thread = (matrix + m) * WARP + lane.lane
                at = (thread * (self.words // QUAD) + quad) * QUAD
                held = (piece * self.matrices * self.words // QUAD + i) * QUAD
                words = self.values[T.ramp(at, 1, QUAD)]
                T.buffer_store(self.held, words, [T.ramp(held, 1, QUAD)])
            if self.places is not None:
                pairs = first * (c.tile_channels // PLACES_CHANNELS)
                for i in range(self.matrices // 2):
                    pair = pairs + lane.down * (self.matrices // 2) + i
                    place = self.places[pair * WARP + lane.lane]
                    T.buffer_store(self.held_places, place, [piece * self.matrices // 2 + i])

    def multiply(self, sums: Any, piece: int, m: int, inputs: Any, n: int) -> None:
        """Add the products of 16 channels and 8 pixels."""
        matrix = piece * self.matrices + m
        weights = T.address_of(self.held[matrix * self.words])
        args = [sums, weights, T.address_of(inputs[n * INPUT_WORDS])]
        if self.held_places is None:
            name, source = "multiply", fragments.DENSE_SOURCE
        else:
            name, source = f"multiply_{m % 2}", fragments.sparse_source(m % 2)
            args.append(self.held_places[matrix // 2])
        T.evaluate(T.cuda.func_call(name, *args, source_code=source))


class _Inputs:
    """What a team copies into shared memory, a step ahead in its threads' registers.

    There it lies as [team, 32 taps, pixel, t, word], so that a thread of a warp reads its four
    words at once; the order of a pixel's four t makes threads that read or write at a time use
    different banks.
    """

    def __init__(self, lane: _Lane, x: Any, offsets: Any) -> None:
        c = lane.k.config
        self.lane, self.x, self.offsets = lane, x, offsets
        self.shared = emit.shared(c.split * c.taps * c.tile_pixels // 2, "int32")
        self.across = max(1, c.tile_pixels // c.threads)  # different pixels of a thread
        self.together = max(1, c.threads // c.tile_pixels)  # eights that the team loads at a time
        self.eights = c.taps // EIGHT
        self.loads = self.across * -(-self.eights // self.together)
        self.values = emit.local(self.loads * EIGHT)
        self.pixels = [
            lane.k.input_at(lane.tile * c.tile_pixels + self._pixel(i), lane.group)
            for i in range(self.across)
        ]

    def load(self, step: Any) -> None:
        """From the device's memory into registers."""
        for i in range(self.loads):
            eight = T.min(self._eight(i), self.eights - 1)
            first = self.lane.piece(step, 0) * (TAPS // EIGHT) + eight
            offsets = emit.local(EIGHT, "int32")
            for tap in range(0, EIGHT, QUAD):
                four = self.offsets[T.ramp(first * EIGHT + tap, 1, QUAD)]
                T.buffer_store(offsets, four, [T.ramp(tap, 1, QUAD)])
            for tap in range(EIGHT):
                value = self.x[self.pixels[i % self.across] + offsets[tap]]
                T.buffer_store(self.values, value, [i * EIGHT + tap])

    def store(self) -> None:
        """From registers into shared memory."""
        for i in range(self.loads):
            eight = self._eight(i)
            with emit.when(eight < self.eights):
                words = emit.local(INPUT_WORDS, "int32")
                for word in range(INPUT_WORDS):
                    two = [self.values[i * EIGHT + 2 * word + half] for half in range(2)]
                    made = T.cuda.func_call(
                        "as_halves", *two, source_code=fragments.PAIR_SOURCE, return_type="int32"
                    )
                    T.buffer_store(words, made, [word])
                at = self._at(eight // 4, self._pixel(i % self.across), eight % 4)
                T.buffer_store(self.shared, words[T.ramp(0, 1, QUAD)], [T.ramp(at, 1, QUAD)])

    def read(self, piece: int) -> Any:
        """The words of 32 taps of the warp's pixels."""
        lane, c = self.lane, self.lane.k.config
        words = emit.local(c.pixels // PIXELS * INPUT_WORDS, "int32")
        for n in range(c.pixels // PIXELS):
            pixel = lane.across * c.pixels + n * PIXELS + lane.g
            read = self.shared[T.ramp(self._at(piece, pixel, lane.t), 1, QUAD)]
            T.buffer_store(words, read, [T.ramp(n * INPUT_WORDS, 1, QUAD)])
        return words

    def _at(self, piece: Any, pixel: Any, t: Any) -> Any:
        c = self.lane.k.config
        row = (self.lane.team * (c.taps // TAPS) + piece) * c.tile_pixels + pixel
        return (row * 4 + T.bitwise_xor(t, pixel // 2 % 4)) * QUAD

    def _pixel(self, i: int) -> Any:
        """The pixel in the tile of a thread's i-th load."""
        c = self.lane.k.config
        return self.lane.thread % c.tile_pixels + i * c.threads

    def _eight(self, i: int) -> Any:
        """The eight taps in the step of a thread's i-th load."""
        first = self.lane.thread // self.lane.k.config.tile_pixels
        return i // self.across * self.together + first
