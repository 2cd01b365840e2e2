"""The page's pictures: bars, dots and curves, as shares of a width or as plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from topiarist.compiler.compiled import OtherWork
from topiarist.compiler.report.charts import (
    Axis,
    Plot,
    Point,
    Tick,
    linear_axis,
    log_axis,
    place_labels,
)
from topiarist.compiler.report.inputs import Curve, Sweep, SweepPoint
from topiarist.compiler.report.layers import FAMILIES, REST, Row, comparable
from topiarist.compiler.report.texts import axis_share, axis_time, share_text, time_text

LABELLED = 8.0  # percent of the width, from which on a segment carries its name
BAND = 0.1  # around the diagonal of predicted against measured


@dataclass(frozen=True)
class Segment:
    """A piece of a bar: `x` and `width` in percent; `row` is the layer's index, if it is one."""

    x: float
    width: float
    family: str
    title: str
    label: str = ""
    row: int | None = None


@dataclass(frozen=True)
class Bar:
    """A bar of segments, its length in microseconds, and that as a share of the network."""

    name: str
    us: float
    share: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Dots:
    """A layer's time and its dense kernel's, in percent along a logarithmic axis."""

    row: Row
    own: float
    dense: float


@dataclass(frozen=True)
class DotChart:
    """All layers' dots under one axis."""

    rows: tuple[Dots, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Part:
    """What a family of kernels takes of the network."""

    family: str
    name: str
    us: float
    share: float


def stage_bars(rows: Sequence[Row], others: Sequence[OtherWork]) -> list[Bar]:
    """A bar per stage, in the network's order, and one of what has no weights.

    Bars are drawn to one scale: the longest fills the width.
    """
    stages: dict[str, list[tuple[float, str, str, str, int | None]]] = {}
    for row in rows:
        if row.us:
            piece = (row.us, row.family, row.layer, row.short, row.index)
            stages.setdefault(row.stage, []).append(piece)
    for kind, work in _by_kind(others):
        stages.setdefault("no weights", []).append((work, REST, kind, kind, None))
    lengths = {stage: sum(piece[0] for piece in pieces) for stage, pieces in stages.items()}
    scale, total = max(lengths.values(), default=0.0), sum(lengths.values())
    bars = []
    for stage, pieces in stages.items():
        segments, x = [], 0.0
        for us, family, name, label, index in pieces:
            width = 100 * us / scale
            title = f"{name}: {time_text(us)}, {share_text(us / total)}"
            shown = label if width >= max(LABELLED, 0.8 * len(label)) else ""
            segments.append(Segment(x, width, family, title, shown, index))
            x += width
        bars.append(Bar(stage, lengths[stage], lengths[stage] / total, tuple(segments)))
    return bars


def _by_kind(others: Sequence[OtherWork]) -> list[tuple[str, float]]:
    ordered = sorted(others, key=lambda work: work.kind)
    sums = [
        (kind, sum(work.run_us for work in works))
        for kind, works in groupby(ordered, lambda work: work.kind)
    ]
    return sorted((item for item in sums if item[1] > 0), key=lambda item: -item[1])


def sorted_bars(rows: Sequence[Row], others: Sequence[OtherWork]) -> list[Bar]:
    """A bar per layer and per kind of other work, the longest first and filling the width."""
    pieces: list[tuple[float, str, str, int | None]] = [
        (row.us, row.short, row.family, row.index) for row in rows if row.us
    ]
    pieces += [(us, kind, REST, None) for kind, us in _by_kind(others)]
    pieces.sort(key=lambda piece: -piece[0])
    total = sum(piece[0] for piece in pieces)
    return [
        Bar(name, us, us / total, (Segment(0, 100 * us / pieces[0][0], family, "", "", index),))
        for us, name, family, index in pieces
    ]


def parts(rows: Sequence[Row], others: Sequence[OtherWork]) -> list[Part]:
    """What each family takes, in the order of `FAMILIES`."""
    times: dict[str, float] = {}
    for row in rows:
        times[row.family] = times.get(row.family, 0.0) + (row.us or 0.0)
    times[REST] = sum(work.run_us for work in others)
    total = sum(times.values())
    return [
        Part(family, name, times[family], times[family] / total)
        for family, name in FAMILIES.items()
        if times.get(family)
    ]


def half(bars: Sequence[Bar]) -> int:
    """How many of the longest bars make up half of all."""
    seen, count = 0.0, 0
    while seen < 0.5 and count < len(bars):
        seen += bars[count].share
        count += 1
    return count


def dot_chart(rows: Sequence[Row]) -> DotChart | None:
    """Dense against what was chosen; None where too few layers have both times."""
    both = [(row, row.own_us, row.dense_us) for row in rows if row.own_us and row.dense_us]
    if not comparable(rows):
        return None
    axis = log_axis([us for _, own, dense in both for us in (own or 1, dense or 1)], axis_time)
    dots = tuple(
        Dots(row, 100 * axis.at(own or axis.low), 100 * axis.at(dense or axis.low))
        for row, own, dense in both
    )
    return DotChart(dots, tuple(replace(tick, at=100 * tick.at) for tick in axis.ticks))


def curve_plot(curve: Curve, row: Row | None = None) -> Plot:
    """Latency over density, from dense on the left to sparse on the right.

    A layer's plot is small; `row` gives it its family's colour and the best dense kernel's level.
    """
    points = curve.points()
    times = [us for _, us in points] + ([curve.measured[1]] if curve.measured else [])
    densities = [d for d, _ in points] + ([curve.measured[0]] if curve.measured else [])
    dense_us = points[0][1] if points[0][0] == 1 else None
    small = row is not None
    plot = Plot(
        name=f"{row.layer if row else 'The whole network'}: predicted time over density",
        width=190 if small else 420,
        height=112 if small else 270,
        x_axis=_density_axis([d for d in densities if d > 0], small),
        y_axis=linear_axis(times, axis_time, zero=True, steps=2 if small else 5),
        x_label="" if small else "share of weights that are not zero",
        left=48 if small else 56,
    )
    marks = []
    if curve.measured:
        density, us = curve.measured
        title = f"measured: {time_text(us)} at {share_text(density)}"
        marks.append(plot.mark((density, us), row.family if row else "measured", title))
    return replace(
        plot,
        line=plot.path(points),
        level=None if dense_us is None else plot.y(dense_us),
        marks=tuple(marks),
    )


def _density_axis(densities: Sequence[float], small: bool) -> Axis:
    marks = (1, 0.1, 0.01) if small else (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
    low = min(min(densities), 0.5)
    values = tuple(mark for mark in marks if mark >= low * 0.999)
    return Axis(low, 1.0, values, axis_share, log=True, backwards=True)


def scatter(rows: Sequence[Row]) -> Plot | None:
    """Predicted against measured, a dot per layer; None where no layer has both."""
    known = [(row, row.us, row.predicted_us) for row in rows if row.error is not None]
    both = [(row, us, predicted) for row, us, predicted in known if us and predicted]
    if not both:
        return None
    axis = log_axis([us for _, *pair in both for us in pair], axis_time)
    plot = Plot(
        name="Predicted against measured time of each layer",
        width=420,
        height=370,
        x_axis=axis,
        y_axis=axis,
        x_label="measured",
        y_label="predicted",
        left=60,
        top=22,
    )
    marks = tuple(
        plot.mark(
            (us, predicted),
            row.family,
            f"{row.layer}: {time_text(predicted)} predicted, {time_text(us)} measured",
        )
        for row, us, predicted in both
    )
    low, high, up, down = axis.low, axis.high, 1 + BAND, 1 - BAND
    above: list[Point] = [(low, low), (low, low * up), (high / up, high), (high, high)]
    below: list[Point] = [(high, high * down), (low / down, low)]
    diagonal = plot.path([(low, low), (high, high)])
    return replace(plot, line=diagonal, band=plot.path(above + below), marks=marks)


def pareto(sweep: Sweep) -> Plot:
    """Accuracy over latency; those points are joined that no other beats in both."""
    points = _by_latency(sweep)
    plot = Plot(
        name=f"{sweep.quantity} over latency",
        width=420,
        height=290,
        x_axis=linear_axis([p.latency_us for p in points], axis_time, zero=True),
        y_axis=linear_axis([p.accuracy for p in points], axis_share, zero=False),
        x_label="latency, measured",
        y_label=sweep.quantity,
        left=56,
        top=22,
    )
    marks = [
        plot.mark(
            (p.latency_us, p.accuracy),
            "measured",
            f"{p.label}: {share_text(p.accuracy)} at {time_text(p.latency_us)}",
        )
        for p in points
    ]
    line = [(p.latency_us, p.accuracy) for p in front(sweep)]
    placed = place_labels(plot, marks, [p.label for p in points], line)
    return replace(plot, line=plot.path(line), marks=tuple(placed))


def _by_latency(sweep: Sweep) -> list[SweepPoint]:
    return sorted(sweep.points, key=lambda point: (point.latency_us, -point.accuracy))


def front(sweep: Sweep) -> list[SweepPoint]:
    """The networks that no other beats in both, the fastest first."""
    points = _by_latency(sweep)
    return [p for i, p in enumerate(points) if all(p.accuracy > q.accuracy for q in points[:i])]
