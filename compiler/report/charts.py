"""Axes and curves as numbers: where on the page a value lies. The template draws them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

Format = Callable[[float], str]
Point = tuple[float, float]

_CHARACTER = 6.4  # pixels of one character of a label, about
_LINE = 13.0
MOST_MARKS = 9  # of an axis; with more, powers of ten alone


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, as a share of its length, and what it says.

    A `minor` one may do without its label where space is short.
    """

    at: float
    label: str
    minor: bool = False


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` along a length; `backwards` has the highest first."""

    low: float
    high: float
    values: tuple[float, ...]
    text: Format
    log: bool = False
    backwards: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, 0 to 1; values beyond an end lie on it."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return 1 - share if self.backwards else share

    @property
    def ticks(self) -> list[Tick]:
        """The axis' marks."""
        major = [value for value in self.values if math.log10(value) % 1 < 1e-6] if self.log else []
        if len(major) < 2:
            major = [self.values[0], self.values[-1]]
        return [Tick(self.at(v), self.text(v), v not in major) for v in self.values]


def linear_axis(values: Iterable[float], text: Format, *, zero: bool, steps: int = 4) -> Axis:
    """Round values around all of `values`, from 0 if `zero`."""
    known = list(values)
    low, high = (0.0 if zero else min(known)), max(known)
    if high <= low:
        low, high = low - 0.5 * abs(low), high + (0.5 * abs(high) or 1.0)
    step = _round_step((high - low) / steps)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(i * step for i in range(first, last + 1))
    return Axis(marks[0], marks[-1], marks, text)


def log_axis(values: Iterable[float], text: Format) -> Axis:
    """From the 1, 2 or 5 below all of `values` to the one above, marked at some of these."""
    known = list(values)
    exponents = range(math.floor(math.log10(min(known))), math.ceil(math.log10(max(known))) + 1)
    marks = [mantissa * 10.0**exponent for exponent in exponents for mantissa in (1, 2, 5)]
    low = max(mark for mark in marks if mark <= min(known) * (1 + 1e-9))
    high = min(mark for mark in [*marks, 10 * marks[-1]] if mark >= max(known))
    if high <= low:
        high = 2 * low
    inside = [mark for mark in marks if low <= mark <= high]
    if len(inside) > MOST_MARKS:
        inside = [mark for mark in inside if math.log10(mark) % 1 < 1e-6]
    return Axis(low, high, tuple(inside), text, log=True)


def _round_step(step: float) -> float:
    unit = 10.0 ** math.floor(math.log10(step))
    return next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= step * (1 - 1e-9))


@dataclass(frozen=True)
class Mark:
    """A dot of a plot, in pixels. `title` shows on hovering, `label` stands beside it."""

    x: float
    y: float
    family: str
    title: str
    label: str = ""
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True)
class Plot:
    """Two axes and what lies between them, in pixels of a drawing of `width` x `height`.

    `line` and `band` (a filled polygon) hold points as SVG wants them; `level` is a dashed
    horizontal line. `name` describes it to who can't see it.
    """

    name: str
    width: int
    height: int
    x_axis: Axis
    y_axis: Axis
    x_label: str = ""
    y_label: str = ""
    left: int = 46
    top: int = 10
    line: str = ""
    band: str = ""
    level: float | None = None
    marks: tuple[Mark, ...] = field(default=())

    @property
    def right(self) -> int:
        """The plotting area's right end."""
        return self.width - 22

    @property
    def bottom(self) -> int:
        """The plotting area's lower end."""
        return self.height - (34 if self.x_label else 20)

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return round(self.left + (self.right - self.left) * self.x_axis.at(value), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return round(self.bottom - (self.bottom - self.top) * self.y_axis.at(value), 1)

    @property
    def x_ticks(self) -> list[Tick]:
        """Marks below, in pixels."""
        return [Tick(self.x(v), self.x_axis.text(v)) for v in self.x_axis.values]

    @property
    def y_ticks(self) -> list[Tick]:
        """Marks on the left, in pixels."""
        return [Tick(self.y(v), self.y_axis.text(v)) for v in self.y_axis.values]

    def path(self, points: Iterable[Point]) -> str:
        """Values as SVG's list of points."""
        return " ".join(f"{self.x(a)},{self.y(b)}" for a, b in points)

    def mark(self, point: Point, family: str, title: str) -> Mark:
        """A dot at a pair of values."""
        return Mark(self.x(point[0]), self.y(point[1]), family, title)


def place_labels(
    plot: Plot, marks: Sequence[Mark], labels: Sequence[str], line: Sequence[Point]
) -> list[Mark]:
    """The marks with labels beside them, without where these would cover a mark or the line."""
    taken = [(m.x - 5, m.y - 5, m.x + 5, m.y + 5) for m in marks]
    taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in _along(plot, line)]
    placed = []
    for mark, label in zip(marks, labels, strict=True):
        width = len(label) * _CHARACTER
        found = ("", 0.0, 0.0, "start")
        for left, base, anchor in (
            (mark.x + 8, mark.y + 4, "start"),
            (mark.x + 6, mark.y + 15, "start"),
            (mark.x - 8 - width, mark.y + 4, "end"),
            (mark.x - 6 - width, mark.y - 6, "end"),
            (mark.x - width / 2, mark.y - 9, "middle"),
            (mark.x - width / 2, mark.y + 18, "middle"),
        ):
            box = (left, base - _LINE + 3, left + width, base + 3)
            inside = box[0] >= plot.left and box[2] <= plot.width and box[1] >= 0
            if inside and base <= plot.bottom and not any(_overlap(box, t) for t in taken):
                at = {"start": left, "end": left + width, "middle": left + width / 2}[anchor]
                found = (label, round(at, 1), round(base, 1), anchor)
                taken.append(box)
                break
        placed.append(Mark(mark.x, mark.y, mark.family, mark.title, *found))
    return placed


def _along(plot: Plot, line: Sequence[Point], step: float = 3.0) -> Iterator[Point]:
    """Pixels on a line of values, `step` apart."""
    pixels = [(plot.x(a), plot.y(b)) for a, b in line]
    for (x0, y0), (x1, y1) in itertools.pairwise(pixels):
        count = math.ceil(math.dist((x0, y0), (x1, y1)) / step) or 1
        yield from ((x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count))


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
