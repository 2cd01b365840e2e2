"""Several logs as one: a file, a folder, what came with the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from topiarist.errors import MissingRecordsError, TuningLogError
from topiarist.targets import registry
from topiarist.tuning_logs.index import Site
from topiarist.tuning_logs.sources import (
    SHIPPED,
    TuningLogs,
    default_log,
    is_folder,
    open_logs,
    shipped_logs,
)
from topiarist.tuning_logs.store import TuningLog

TARGET = registry.get("x86-avx2")
VERSIONS = {"topiarist": "0.1.0", "apache-tvm": "0.27.1", "apache-tvm-ffi": "0.1.14"}


def _paths(logs: TuningLogs) -> list[Path]:
    return [log.path for log in logs.logs]


def test_the_default_is_one_file_per_family(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = default_log(TARGET)
    assert path.name == "x86.jsonl" and path.parent.name == "tuning_logs"
    assert default_log(TARGET, tmp_path) == tmp_path / "x86.jsonl"
    assert open_logs(None, TARGET).own.path == path


def test_a_file_is_one_log(tmp_path):
    assert _paths(open_logs(tmp_path / "mine.jsonl", TARGET, shipped=False)) == [
        tmp_path / "mine.jsonl"
    ]


@pytest.mark.parametrize(
    ("name", "made", "folder"),
    [
        ("new", None, True),
        ("new.jsonl", None, False),
        ("made.jsonl", "folder", True),
        ("made", "file", False),
    ],
)
def test_what_a_path_is(tmp_path, name, made, folder):
    path = tmp_path / name
    if made == "folder":
        path.mkdir()
    elif made == "file":
        path.touch()
    assert is_folder(path) == folder


def test_of_a_folder_all_logs_are_read_and_one_is_written(tmp_path, record):
    TuningLog(tmp_path / "a.jsonl").append([record(1), record(2)])
    TuningLog(tmp_path / "b.jsonl").append([record(2), record(3)])
    (tmp_path / "notes.txt").write_text("not a log")
    logs = open_logs(tmp_path, TARGET, shipped=False)
    assert _paths(logs) == [tmp_path / name for name in ("x86.jsonl", "a.jsonl", "b.jsonl")]
    assert list(logs.read()) == [record(1), record(2), record(3)]
    logs.append([record(4)])
    assert logs.find(record(4).input).record == record(4)
    assert logs.find(record(3).input).record == record(3)
    assert list(TuningLog(tmp_path / "x86.jsonl").read()) == [record(4)]
    again = open_logs(tmp_path, TARGET, shipped=False)
    assert _paths(again) == _paths(logs)


def test_a_folder_that_is_not_there_is_empty(tmp_path, record):
    logs = open_logs(tmp_path / "none", TARGET, shipped=False)
    assert list(logs.read()) == [] and logs.find(record().input) is None
    assert not (tmp_path / "none").exists()
    logs.append([record()])
    assert (tmp_path / "none" / "x86.jsonl").is_file()


def test_the_closest_answers_and_of_equals_the_first_log(tmp_path, record):
    own, other = TuningLog(tmp_path / "own.jsonl"), TuningLog(tmp_path / "other.jsonl")
    logs = TuningLogs(own, [other])
    other.append([record(us=50.0, timestamp="2026-05-01T00:00:00Z"), record(1)])
    own.append([record(us=60.0), record(1, versions=VERSIONS), record(2)])
    assert logs.find(record().input).record == record(us=60.0)
    assert logs.find(record(1).input, loosest="other device").record == record(1)
    assert [m.record for m in logs.best(Site.of(record().input))] == [record(us=60.0), record(2)]
    assert logs.history(record().input)[-1] == record(us=60.0)
    own.path.unlink()
    assert len(logs.best(Site.of(record().input))) == 2


def test_the_logs_of_an_instruction_set_come_with_the_package(tmp_path, record):
    TuningLog(tmp_path / "x86-avx2" / "networks.jsonl").append([record()])
    assert shipped_logs(TARGET, tmp_path) == [tmp_path / "x86-avx2" / "networks.jsonl"]
    assert shipped_logs(registry.get("x86-avx512"), tmp_path) == []
    assert shipped_logs(TARGET) == sorted((SHIPPED / "x86-avx2").glob("*.jsonl"))


def test_defects_of_all_logs_are_told(tmp_path, record):
    for name in ("a", "b"):
        TuningLog(tmp_path / f"{name}.jsonl").append([record()])
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write("broken\n")
    logs = open_logs(tmp_path, TARGET, shipped=False)
    logs.find(record().input)
    assert [(d.path.name, d.line) for d in logs.defects] == [("a.jsonl", 2), ("b.jsonl", 2)]
    assert isinstance(error := logs.not_found("conv1 has no record"), TuningLogError)
    assert str(error).startswith("conv1 has no record; but 2 lines of the logs can't be read")
    assert str(logs.defects[0]) in str(error)


def test_records_that_are_not_there_are_missing(tmp_path, record):
    logs = open_logs(tmp_path, TARGET, shipped=False)
    assert logs.find(record().input) is None
    assert isinstance(error := logs.not_found("conv1 has no record"), MissingRecordsError)
    assert str(error) == "conv1 has no record"
