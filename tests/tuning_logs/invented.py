"""Measurements of an invented machine, whose time for every candidate is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.tuning_logs.conftest import make_record
from topiarist.schedules.workload import ConvWorkload, SparsitySignature
from topiarist.tuning_logs.record import Measured, MeasureInput, TuningRecord

NETWORK_FACTOR = 1.3  # what a network adds to every time
NOISE = {"alone": 0.02, "in network": 0.08}  # standard deviation of the logarithm
SPARSE = frozenset({"direct_sparse"})
CHANNELS = (16, 32, 64, 96, 128, 256)
SIDES = (7, 14, 28, 56)


def records(
    count: int, seed: int = 0, measured: Measured = "alone", noise: bool = True
) -> Iterator[TuningRecord]:
    """So many candidates of random layers, timed with the noise of the place."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        what = candidate(random)
        scatter = random.normal(0, NOISE[measured]) if noise else 0.0
        us = true_us(what) * (NETWORK_FACTOR if measured == "in network" else 1.0)
        yield TuningRecord(what, (us * float(np.exp(scatter)) * 1e-6,), measured)


def candidate(random: np.random.Generator) -> MeasureInput:
    """A kernel with random knobs for a random layer."""
    channels = [int(random.choice(CHANNELS)) for _ in range(2)]
    side, taps = int(random.choice(SIDES)), int(random.choice((1, 3)))
    density = round(float(random.uniform(0.02, 0.5)), 3)
    kernel = str(random.choice(("direct_sparse", "direct_dense")))
    knobs = [int(random.choice(sizes)) for sizes in ((1, 2), (2, 4, 7), (1, 2, 4))]
    return make_what(kernel, *channels, side, taps, density, *knobs)


def make_what(
    kernel: str = "direct_sparse",
    inputs: int = 64,
    outputs: int = 64,
    side: int = 14,
    taps: int = 3,
    density: float = 0.1,
    rows: int = 1,
    cols: int = 4,
    out_block: int = 1,
    **changes: Any,
) -> MeasureInput:
    """A candidate of a square layer that keeps its plane; `changes` are those of `make_record`."""
    sparsity = SparsitySignature(density, "unstructured", (1, 2, 3))
    pad = taps // 2
    workload = ConvWorkload(
        *(1, inputs, side, side, outputs, (taps, taps), (1, 1), (pad,) * 4, (1, 1), 1, sparsity),
        activation=(0.0, None),
    )
    vectors = f"lanes({side}x{side}@2x4:{-(-side // 2)}x{-(-side // 4)}"
    record = make_record(
        kernel=kernel,
        workload=workload.to_json(),
        config={"rows": rows, "cols": cols, "out_block": out_block, "in_block": 32},
        input_layout=f"{vectors} halo(1, 1, 1, 1)) channels {inputs} of {inputs}",
        output_layout=f"{vectors} tile1x4) channels {outputs} of {outputs}",
        **changes,
    )
    return record.input


def true_us(what: MeasureInput) -> float:
    """Microseconds: work at a rate that depends on the knobs, and moved bytes."""
    w, knobs = what.workload, what.config
    planes = w["height"] * w["width"]
    macs = w["in_channels"] * w["out_channels"] * w["kernel"][0] ** 2 * planes
    tile = knobs["rows"] * knobs["cols"]
    if what.kernel in SPARSE:
        macs *= w["sparsity"]["density"] * 2.5 * (1 + 1 / tile)
    else:
        macs *= 1 + 1 / (tile * knobs["out_block"])
    return 2.0 + macs / 30e3 + 4 * planes * (w["in_channels"] + w["out_channels"]) / 40e3
