"""Fully connected layers, dense and sparse, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.schedules import references
from tests.schedules.building import (
    NAME,
    TARGETS,
    FloatArray,
    distinct_nans,
    random_image,
    relative_error,
    run,
)
from topiarist.schedules.cpu.linear import (
    LinearShape,
    dense_linear_prim_func,
    pack_dense_linear,
    pack_sparse_linear,
    sparse_linear_prim_func,
)
from topiarist.targets.spec import TargetSpec

TOLERANCE = 1e-5
KINDS = ("dense", "sparse")
RELU = (0.0, None)


@dataclass(frozen=True)
class LinearCase:
    """A layer and the share of its weights that are not zero."""

    outputs: int
    inputs: int = 50
    batch: int = 1
    density: float = 0.2
    activation: tuple[float | None, float | None] = (None, None)
    threads: int = 1
    empty_rows: bool = False


CASES = {
    "1_output": LinearCase(1),
    "10_outputs": LinearCase(10, batch=3),
    "37_outputs": LinearCase(37, activation=(0.0, 6.0)),
    "1000_outputs": LinearCase(1000, inputs=70, batch=3, threads=2),
    "1_input": LinearCase(37, inputs=1, density=0.5),
    "empty_rows": LinearCase(37, empty_rows=True, batch=3, activation=RELU),
    "density_0": LinearCase(37, density=0.0, activation=RELU),
    "density_1": LinearCase(64, density=1.0, threads=2),
    "batch_9": LinearCase(70, inputs=1100, batch=9, activation=RELU, threads=2),
    "inputs_beyond_16_bits": LinearCase(20, inputs=70000, density=0.02, batch=2),
}


def make_weight(case: LinearCase) -> FloatArray:
    """A weight [M, K] with zeros anywhere."""
    rng = np.random.default_rng(1)
    weight = random_image(rng, case.outputs, case.inputs)
    weight[rng.random(weight.shape) >= case.density] = 0
    if case.empty_rows:
        weight[:17] = 0
        weight[20] = 0
    return weight


def make(
    kind: str, case: LinearCase, weight: FloatArray, lanes: int
) -> tuple[Any, tuple[NDArray[Any], ...]]:
    """The function and its constants."""
    shape = LinearShape(case.batch, case.inputs, case.outputs, case.activation)
    if kind == "dense":
        packed = (pack_dense_linear(weight, lanes),)
        return dense_linear_prim_func(NAME, shape, lanes, case.threads), packed
    return sparse_linear_prim_func(NAME, shape, lanes, case.threads), pack_sparse_linear(
        weight, lanes
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, kind: str, target: TargetSpec) -> None:
    case = CASES[name]
    rng, weight = np.random.default_rng(2), make_weight(case)
    x, bias = random_image(rng, case.batch, case.inputs), random_image(rng, case.outputs)
    function, packed = make(kind, case, weight, target.lanes)
    got = run(function, target, x.ravel(), *packed, bias, distinct_nans(case.batch * case.outputs))
    want = references.clamp(x.astype(np.float64) @ weight.T + bias, case.activation)
    assert relative_error(got.reshape(want.shape), want) < TOLERANCE


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_packs_every_nonzero_once(name: str, kind: str, lanes: int) -> None:
    case = CASES[name]
    weight = make_weight(case)
    values = make(kind, case, weight, lanes)[1][0]
    assert np.array_equal(np.sort(values[values != 0]), np.sort(weight[weight != 0]))


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("name", CASES)
def test_sparse_columns_and_starts_are_in_range(name: str, lanes: int) -> None:
    """Padding included, since padding is read as well."""
    case = CASES[name]
    values, columns, starts = pack_sparse_linear(make_weight(case), lanes)
    assert len(values) == len(columns) == starts[-1] + 1
    assert columns.min() >= 0
    assert columns.max() < case.inputs
    assert (np.diff(starts) >= 0).all()
