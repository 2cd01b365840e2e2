"""What pruning a layer further would gain, read off its predicted curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from topiarist.compiler.report.inputs import Curve
from topiarist.compiler.report.layers import Row
from topiarist.compiler.report.texts import axis_share, share_text

WORTH = 0.02  # of a layer's time: less is no gain, a prediction is not that exact
STEP = 0.97  # a level is sparser than what a layer has if it keeps less than this share of it


@dataclass(frozen=True)
class Step:
    """A layer at the next level that pays: microseconds now and, predicted, then.

    `least_us` is its time at the sparsest level looked at, `least_density`. `dropped` is the number
    of weights that would go, None where the bundle doesn't say how many there are.
    """

    row: Row
    density: float
    next_density: float
    now_us: float
    next_us: float
    least_density: float
    least_us: float
    dropped: int | None

    @property
    def gain_us(self) -> float:
        """What is to be gained."""
        return self.now_us - self.next_us


@dataclass(frozen=True)
class Stay:
    """A layer that no sparser level makes faster, and why."""

    row: Row
    reason: str


def outlook(rows: Sequence[Row], curves: Sequence[Curve]) -> tuple[list[Step], list[Stay]]:
    """Layers by what the next level that pays gains, the most first; and those without a gain."""
    by_name = {curve.layer: curve for curve in curves}
    steps, stays = [], []
    for row in rows:
        curve = by_name.get(row.layer)
        if curve is None or not row.density:
            continue
        found = _look(row, row.density, curve)
        if isinstance(found, Step):
            steps.append(found)
        else:
            stays.append(found)
    return sorted(steps, key=lambda step: -step.gain_us), stays


def _look(row: Row, density: float, curve: Curve) -> Step | Stay:
    now = curve.at(density)
    sparser = [point for point in curve.points() if point[0] < STEP * density]
    if not sparser:
        return Stay(row, f"{share_text(density)} is already the sparsest level looked at.")
    pays = next((point for point in sparser if point[1] <= (1 - WORTH) * now), None)
    if pays is None:
        down_to = axis_share(sparser[-1][0])
        return Stay(row, f"No level down to {down_to} is predicted to be faster{_because(row)}.")
    # The share that a level gains is predicted better than the time itself.
    scale = row.us / now if row.us and not row.estimated else 1.0
    dropped = None if row.weights is None else round((density - pays[0]) * row.weights)
    return Step(
        row, density, pays[0], scale * now, scale * pays[1], sparser[-1][0],
        scale * min(us for _, us in sparser), dropped,
    )  # fmt: skip


def _because(row: Row) -> str:
    if row.family == "depthwise":
        return ": with one input channel per filter there is little to skip"
    if row.bound == "memory" and row.roofline is not None:
        return f": it waits for memory, at {share_text(row.roofline)} of that limit"
    return ""
