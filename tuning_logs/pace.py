"""What a time would have been, had the machine been as fast as it usually is.

A virtual machine whose host is busy is slower for minutes or hours, all kernels alike: times of
different hours compare only by what the reference kernel took in each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from topiarist.tuning_logs.record import FIRST_QUARTILE, TargetKey, TuningRecord


@dataclass(frozen=True)
class Pace:
    """What the reference kernel usually takes on each target, in microseconds."""

    usual_us: Mapping[TargetKey, float]

    @staticmethod
    def of(records: Iterable[TuningRecord]) -> Pace:
        """The first quartile over the records of a target, those that know their own."""
        found: dict[TargetKey, list[float]] = defaultdict(list)
        for record in records:
            if record.reference_us is not None:
                found[record.input.target].append(record.reference_us)
        return Pace({key: float(np.quantile(us, FIRST_QUARTILE)) for key, us in found.items()})

    def run_us(self, record: TuningRecord) -> float:
        """The record's time at the usual pace; as it was measured where that isn't known."""
        usual_us = self.usual_us.get(record.input.target)
        if usual_us is None or record.reference_us is None:
            return record.run_us
        return record.run_us * usual_us / record.reference_us
