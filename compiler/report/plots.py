"""The report's plot of accuracy over latency as a PNG, with matplotlib (the extra `plots`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from topiarist.compiler.output_file import check_output, write_file
from topiarist.compiler.report.inputs import Sweep
from topiarist.compiler.report.pictures import front
from topiarist.compiler.report.texts import axis_share, axis_time
from topiarist.errors import OutputError

INCHES = (6.4, 4.4)
DPI = 150
ROOM = 1.13  # for the label of the slowest
INK, LINE, GRID = "#2b3a35", "#2a7d5f", "#dfe5e2"


def write_sweep_plot(sweep: Sweep, output: Path) -> Path:
    """Write the networks of a sweep as a picture; those are joined that no other beats.

    Raises OutputError, also where matplotlib is missing.
    """
    check_output(output)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError(
            f"drawing {output} needs matplotlib: pip install 'topiarist[plots]'"
        ) from error
    figure = Figure(figsize=INCHES, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure.add_subplot(), sweep)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    write_file(output, data.getvalue())
    return output


def _draw(axes: Any, sweep: Sweep) -> None:
    points = sweep.points
    best = front(sweep)
    axes.plot([p.latency_us for p in best], [p.accuracy for p in best], color=LINE, zorder=2)
    axes.scatter([p.latency_us for p in points], [p.accuracy for p in points], color=LINE, zorder=3)
    for point in points:
        axes.annotate(
            point.label,
            (point.latency_us, point.accuracy),
            xytext=(7, -11),
            textcoords="offset points",
            color=INK,
            fontsize=9,
            parse_math=False,
        )
    axes.set_xlabel("latency, measured", color=INK)
    axes.set_ylabel(sweep.quantity, color=INK, parse_math=False)
    axes.xaxis.set_major_formatter(lambda us, _: axis_time(us))
    axes.yaxis.set_major_formatter(lambda share, _: axis_share(share))
    axes.margins(y=0.12)
    axes.set_xlim(0, ROOM * max(point.latency_us for point in points))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
