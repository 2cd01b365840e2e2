"""The picture of guided against unguided pruning, of figures that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.bench_gsl import DENSE, Point, draw


def _point(way: str, rate: float, accuracy: float, latency_ms: float) -> Point:
    return Point(way, rate, accuracy, accuracy, 0.1, latency_ms, (1.0, 1.0, 1.0), {})


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs matplotlib: pip install "topiarist[plots]"')
    points = [_point(DENSE, 0, 0.9, 1.0), _point("guided", 1, 0.89, 0.6)]
    draw([*points, _point("unguided", 1, 0.85, 0.6)], tmp_path / "gsl.png")
    assert (tmp_path / "gsl.png").read_bytes().startswith(b"\x89PNG")
