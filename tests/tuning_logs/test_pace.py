"""Times at the usual pace of a machine."""

from __future__ import annotations

import pytest

from topiarist.tuning_logs.pace import Pace


def test_a_slow_hour_is_taken_out(record) -> None:
    """The usual pace is the first quartile's; a slow start makes no slow machine."""
    slow = [record(i, us=150.0, reference_us=7.5, drift=1.5) for i in range(3)]
    quiet = [record(10 + i, us=100.0, reference_us=5.0) for i in range(3)]
    pace = Pace.of([*slow, *quiet])
    assert [pace.run_us(each) for each in (*slow, *quiet)] == pytest.approx([quiet[0].run_us] * 6)


def test_each_target_has_its_own_pace(record) -> None:
    mine, theirs = record(reference_us=5.0), record(reference_us=20.0, device_model="Slow CPU")
    pace = Pace.of([mine, theirs])
    assert [pace.run_us(mine), pace.run_us(theirs)] == [mine.run_us, theirs.run_us]


def test_what_is_not_known_changes_nothing(record) -> None:
    old, new = record(1), record(2, reference_us=5.0)
    assert Pace.of([old]).run_us(new) == new.run_us
    assert Pace.of([record(3, reference_us=4.0)]).run_us(old) == old.run_us
