"""A latency model in place of the clock, where it is of the right device and version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compiler.test_latency import HOST, make_record
from topiarist.compiler import model_files
from topiarist.compiler.predictor import find_predictor
from topiarist.compiler.recorded import Device
from topiarist.tuning_logs.cost_model import Dataset, LatencyModel


@pytest.fixture(scope="module")
def model() -> LatencyModel:
    """Of a few invented records of this machine."""
    return LatencyModel.train(Dataset.of([make_record(i) for i in range(200)]))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's model is looked for."""
    path = tmp_path / "latency.json"
    monkeypatch.setattr("topiarist.compiler.model_files.default_model", lambda key: path)
    return path


def test_the_users_model_stands_in_for_the_clock(model: LatencyModel, place: Path) -> None:
    assert find_predictor(HOST, 1) is None
    model.save(place)
    predictor = find_predictor(HOST, 1)
    assert predictor is not None and predictor.device.key == Device.named(HOST, 1).key
    assert predictor.run_us([]) == []
    assert all(us > 0 for us in predictor.run_us([make_record(i).input for i in range(3)]))


@pytest.mark.parametrize("stale", [{"tvm": "0.1"}, {"kernels": {"direct_sparse": 0}}])
def test_a_model_of_another_version_does_not(
    stale: Mapping[str, Any],
    model: LatencyModel,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "covers", replace(model.covers, **stale))
    model.save(place)
    assert find_predictor(HOST, 1) is None


def test_where_the_user_has_none_the_model_of_the_package_does(
    model: LatencyModel, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files, "SHIPPED", tmp_path)
    file = tmp_path / f"{HOST.family}-{HOST.isa}" / model_files.SHIPPED_FILE
    file.parent.mkdir()
    model.save(file)
    found = find_predictor(replace(HOST, device_model="Another CPU"), 1)
    assert found is not None and "comes with topiarist" in found.name
    assert found.device.key.device_model == "Another CPU"
    model.save(place)
    users = find_predictor(HOST, 1)
    assert users is not None and str(place) in users.name


def test_a_model_of_another_device_does_not(model: LatencyModel, place: Path) -> None:
    model.save(place)
    assert find_predictor(replace(HOST, device_model="Another CPU"), 1) is None
