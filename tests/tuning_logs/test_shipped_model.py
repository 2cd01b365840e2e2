"""The latency models that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from topiarist.tuning_logs.cost_model import LatencyModel
from topiarist.tuning_logs.sources import SHIPPED

MODELS = sorted(SHIPPED.glob("*/latency_model.json"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.name)
def test_it_is_small_and_says_where_it_comes_from(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    model = LatencyModel.load(path)
    target = model.covers.target
    assert path.parent.name == f"{target.family}-{target.isa}"
    assert model.card["data"] and model.card["records"] == len(model.seen)
    assert {"a fifth", "r18"} <= model.card["errors"].keys()
