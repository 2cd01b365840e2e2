"""Times as sums of counts at learned costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tuning_logs.conftest import make_record
from tests.tuning_logs.invented import candidate, make_what
from topiarist.tuning_logs.boosters import Floats, Rows
from topiarist.tuning_logs.costs import Costs
from topiarist.tuning_logs.features import columns_of, features, table
from topiarist.tuning_logs.record import MeasureInput

Table = tuple[Rows, list[str]]


def tabled(whats: list[MeasureInput]) -> Table:
    rows = [features(what) for what in whats]
    columns = columns_of(rows)
    return table(rows, columns), columns


@pytest.fixture(scope="module")
def candidates() -> Table:
    return tabled([candidate(np.random.default_rng(i)) for i in range(300)])


@pytest.fixture(scope="module")
def machine() -> Costs:
    """Twice as slow as rough costs have it, and loads eight times."""
    found = Costs.rough().scaled(2.0)
    for kernel in ("direct_sparse", "direct_dense"):
        found.by_kernel[kernel]["loads"] *= 4
    return found


def layers(count: int) -> Any:
    return np.array([f"layer {i}" for i in range(count)])


def error(found: Costs, machine: Costs, rows: Rows, columns: list[str]) -> float:
    truth: Floats = machine.predict_us(rows, columns)
    return float(np.abs(found.predict_us(rows, columns) / truth - 1).mean())


def test_costs_are_found_again(candidates: Table, machine: Costs) -> None:
    rows, columns = candidates
    random = np.random.default_rng(0)
    noise = np.exp(random.normal(0, 0.03, 200))
    times = machine.predict_us(rows[:200], columns) * noise
    found = Costs.fit(rows[:200], columns, times, layers(200))
    assert error(found, machine, rows[200:], columns) < 0.1
    assert all(cost >= 0 for costs in found.by_kernel.values() for cost in costs.values())


def test_a_sum_extrapolates(machine: Costs) -> None:
    small = [make_what(inputs=16 * (1 + i % 4), side=7 + i % 8, cols=1 + i % 4) for i in range(80)]
    large = [make_what(inputs=1024, outputs=1024, side=56, cols=4)]
    rows, columns = tabled([*small, *large])
    found = Costs.fit(rows[:80], columns, machine.predict_us(rows[:80], columns), layers(80))
    assert error(found, machine, rows[80:], columns) < 0.1


def test_few_records_of_another_machine(candidates: Table, machine: Costs) -> None:
    rows, columns = candidates
    slower = machine.scaled(3.0)
    known = machine.refit(rows[:8], columns, slower.predict_us(rows[:8], columns), layers(8))
    assert error(known, slower, rows, columns) < 0.02


def test_an_outlier_moves_little(candidates: Table, machine: Costs) -> None:
    rows, columns = candidates
    times = machine.predict_us(rows[:60], columns)
    times[3] *= 1000
    assert error(Costs.fit(rows[:60], columns, times, layers(60)), machine, rows, columns) < 0.15


def test_kernels_without_records_follow_the_others(candidates: Table, machine: Costs) -> None:
    rows, columns = candidates
    found = Costs.fit(rows, columns, machine.predict_us(rows, columns), layers(len(rows)))
    rough = Costs.rough().by_kernel["winograd_dense"]
    ratio = found.by_kernel["winograd_dense"]["calls"] / rough["calls"]
    assert 1.5 < ratio < 4
    strange, names = tabled([make_record(kernel="not_known").input])
    assert found.predict_us(strange, names) > 0
    assert found.predict_us(strange, [name for name in names if "kernel=" not in name]) > 0


def test_costs_come_back_as_they_were(candidates: Table, machine: Costs) -> None:
    rows, columns = candidates
    found = Costs.fit(rows, columns, machine.predict_us(rows, columns), layers(len(rows)))
    again = Costs.from_json(found.to_json())
    assert np.array_equal(again.predict_us(rows, columns), found.predict_us(rows, columns))
