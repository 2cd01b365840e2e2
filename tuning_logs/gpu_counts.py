"""What a kernel on a GPU has to do, and how the device can share it out: counts, and times of it.

A record names its GPU's architecture only, so the figures of a well-known device of it stand for
all. They turn instructions, loads and bytes into nanoseconds of the busiest multiprocessor, which
are no forecast: costs are learned of them, and are alike from one GPU to the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from topiarist.schedules.workload import BLOCKS
from topiarist.targets.cuda import GPUS, MAX_THREAD_REGISTERS, WARP
from topiarist.targets.gpu import Gpu
from topiarist.tuning_logs.counts import density

Numbers = Mapping[str, float]

OTHER_REGISTERS = 32.0  # addresses, loop counters
WAIT_CYCLES = 8.0  # for a load, when the compiler has some on their way at a time
INSTRUCTION_BYTES = 16.0
IN_CODE = "kernel=cuda_compiled"  # has its weights in the code
# On tensor cores, with the share of products that is left; warps have tiles there, not threads.
MATRIX_TAPS = 32
IN_MATRICES = {"kernel=cuda_mma": 1.0, "kernel=cuda_sparse_mma": 0.5}
_BY_ARCH = {gpu.arch: gpu for gpu in GPUS}


def gpu_of(family: str, arch: str) -> Gpu | None:
    """The GPU that stands for a target's, None for what is no GPU or an unknown one."""
    return _BY_ARCH.get(arch) if family == "cuda" else None


def gpu_counts(n: Numbers, gpu: Gpu) -> dict[str, float]:
    """Counts by name, from the numbers of a candidate."""
    get = n.get
    if "workload.read_bytes" in n:  # a pool, a move, a sum
        moved = n["workload.read_bytes"] + get("workload.written_bytes", 0.0)
        return {"calls": 1.0, "bytes_moved": moved, "memory_ns": moved / gpu.bandwidth_gbs}
    batch, groups = get("workload.batch", 1.0), max(get("workload.groups", 1.0), 1.0)
    inputs = get("workload.in_channels", get("workload.inputs", 1.0))
    outputs = get("workload.out_channels", get("workload.outputs", 1.0))
    taps = get("workload.kernel.0", 1.0) * get("workload.kernel.1", 1.0) * inputs / groups
    pixels = batch * get("output.height", 1.0) * get("output.width", 1.0)
    read = 4 * batch * inputs * get("input.height", 1.0) * get("input.width", 1.0)
    weights = outputs * taps
    nonzeros = weights * density(n)
    streamed = nonzeros * (8.0 if "workload.sparsity.density" in n else 4.0)
    moved = read + 4 * outputs * pixels
    found = {
        "calls": 1.0,
        "macs": weights * pixels,
        "warp_fmas": nonzeros * pixels / WARP,
        "weights": weights,
        "nonzeros": nonzeros,
        "bytes_moved": moved,
        "weight_bytes": streamed,
        "memory_ns": (moved + streamed) / gpu.bandwidth_gbs,
    }
    tile = _Tile.of(n)
    if tile is None:
        return found
    return found | _shares(n, gpu, tile, outputs, taps, pixels)


@dataclass(frozen=True)
class _Tile:
    """What threads or warps have: channels and pixels each, and how a block is made of them."""

    channels: float
    pixels: float
    across: float  # threads or warps of a block side by side on pixels
    down: float  # and on channels
    split: float
    staged: float  # taps in shared memory at a time
    products: float | None  # share of them that tensor cores multiply, None where threads do

    @staticmethod
    def of(n: Numbers) -> _Tile | None:
        """None where the knobs are others or make no sense: a log can be edited by hand."""
        knobs = {name: n.get(f"config.{name}", 0.0) for name in ("channels", "pixels", "split")}
        tiled = "config.cols" in n
        knobs["across"] = n.get("config.cols" if tiled else "config.threads", 0.0)
        knobs["down"] = n.get("config.rows", 0.0) if tiled else 1.0
        if not all(1 <= value < 2**20 for value in knobs.values()):
            return None
        staged = n.get("config.taps" if tiled else "config.chunk", 0.0)
        products = next((share for kernel, share in IN_MATRICES.items() if n.get(kernel)), None)
        return _Tile(**knobs, staged=staged, products=products)

    @property
    def team(self) -> float:
        """Threads that share their taps."""
        return self.across * self.down * (1.0 if self.products is None else WARP)

    @property
    def threads(self) -> float:
        """Of a block."""
        return self.team * self.split

    @property
    def sums(self) -> float:
        """Accumulators of a thread."""
        return self.channels * self.pixels / (1.0 if self.products is None else WARP)

    @property
    def registers(self) -> float:
        """Of a thread, about."""
        factors = self.channels + self.pixels
        if self.products is not None:  # in fp16, and values on their way to shared memory
            copied = self.across * self.pixels * self.staged / self.team
            factors = (self.channels * self.products + self.pixels) / 2 + copied
        wanted = self.sums + factors + OTHER_REGISTERS
        return min(wanted, MAX_THREAD_REGISTERS)

    @property
    def shared_bytes(self) -> float:
        """Of a block: what is staged, and sums to add up."""
        sums = (self.split - 1) * self.team * self.sums
        if self.products is not None:  # inputs only, in fp16
            return 2 * self.split * self.staged * self.across * self.pixels + 4 * sums
        inputs = self.across * self.pixels if self.down > 1 else 1.0
        staged = self.split * max(self.staged, 0.0) * (self.channels * self.down + inputs)
        return 4 * (staged + sums)

    def loads(self, columns: float) -> float:
        """Of a thread on tensor cores, in so many taps: to copy inputs, and of whole matrices."""
        assert self.products is not None
        matrices = self.pixels / 8 + self.channels / 16 * 2 * self.products
        return columns * (self.across * self.pixels / self.team + matrices / MATRIX_TAPS)


def _shares(
    n: Numbers, gpu: Gpu, tile: _Tile, outputs: float, taps: float, pixels: float
) -> dict[str, float]:
    """Blocks on multiprocessors, and what the busiest of these does."""
    alike = next((b for p, b in BLOCKS.items() if n.get(f"workload.sparsity.pattern={p}")), 1)
    union = 1 - (1 - density(n)) ** max(1.0, tile.channels / alike)
    columns = taps * union / tile.split
    in_code = bool(n.get(IN_CODE))
    sums = taps * density(n) / tile.split if in_code else columns
    wide = 4.0 if n.get("config.quads") or tile.down > 1 else 1.0
    loads = columns * tile.pixels / wide
    loads += 0.0 if in_code else columns * (tile.channels / 4 + 1)
    blocks = math.ceil(pixels / tile.pixels / tile.across)
    blocks *= math.ceil(outputs / tile.channels / tile.down)
    warps = math.ceil(tile.threads / WARP)
    at_once = min(
        gpu.threads / (warps * WARP),
        gpu.registers / (tile.registers * warps * WARP),
        gpu.shared_bytes / max(tile.shared_bytes, 1.0),
    )
    at_once = max(1.0, math.floor(at_once))
    busiest = math.ceil(blocks / gpu.multiprocessors)
    in_turn = math.ceil(busiest / at_once)
    issued = (sums * tile.sums + loads) * WARP / gpu.fp32_lanes
    if tile.products is not None:
        loads = tile.loads(columns)
        products = columns * tile.channels * tile.pixels * tile.products
        issued = max(products / gpu.half_lanes, loads * WARP / gpu.fp32_lanes)
    code = sums * tile.sums * INSTRUCTION_BYTES * outputs / tile.channels * tile.split
    ns = 1 / gpu.clock_ghz
    return {
        "columns": columns,
        "loads": loads * blocks * warps,
        "blocks": blocks,
        "block_warps": warps,
        "registers": tile.registers,
        "shared_bytes": tile.shared_bytes,
        "resident_warps": min(at_once, busiest) * warps,
        "waves": in_turn,
        "code_bytes": code if in_code else 0.0,
        "issue_ns": busiest * warps * issued * ns,
        "load_ns": busiest * warps * loads * ns,
        "wait_ns": in_turn * loads * WAIT_CYCLES * ns,
    }
