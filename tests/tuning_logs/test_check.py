"""Checking names every line that can't be read and what is odd; repair moves only broken lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from topiarist.errors import MissingRecordsError, TuningLogError
from topiarist.tuning_logs.check import LINES_NAMED, Current, check_log
from topiarist.tuning_logs.store import TuningLog

CURRENT = Current("0.27.0", {"direct_sparse": 1})
OTHER_TVM = {"topiarist": "0.1.0", "apache-tvm": "0.27.1", "apache-tvm-ffi": "0.1.14"}


@pytest.fixture
def log(tmp_path):
    return TuningLog(tmp_path / "x86.jsonl")


def _add(log, text):
    with log.path.open("a") as file:
        file.write(text)


def test_a_sound_log_has_no_findings(log, record):
    log.append([record(0), record(1), record(2, kernel="something else", kernel_version=7)])
    checked = check_log(log.path, CURRENT)
    assert (checked.records, checked.broken, checked.notes) == (3, (), ())


def test_all_broken_lines_are_named(log, record):
    log.append([record(0)])
    _add(log, "<<<<<<< HEAD\n")
    log.append([record(1)])
    _add(log, record(2).to_line().replace('"schema":2', '"schema":7') + "\n")
    _add(log, record(3).to_line().replace('"height":14', '"height":15') + "\n")
    checked = check_log(log.path, CURRENT)
    assert checked.records == 2
    assert [(d.line, d.newer) for d in checked.broken] == [(2, False), (4, True), (5, False)]
    assert "no JSON" in checked.broken[0].problem
    assert "upgrade" in checked.broken[1].problem
    assert "workload_key" in checked.broken[2].problem


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"device_model": "B", "isa": "avx512"}, "1 line: of another target, x86/avx512/8/B/1 th"),
        ({"kernel_version": 2}, "1 line: of direct_sparse version 2, which is now 1: they don't"),
        ({"versions": OTHER_TVM}, "1 line: of TVM 0.27.1, here is 0.27.0: they only rank (3)"),
        ({"drift": 1.2}, "1 line: measured while the machine drifted (3)"),
        ({"timestamp": "2999-01-01T00:00:00Z"}, "1 line: from the future"),
        ({"timestamp": "2020-01-01T00:00:00Z"}, "1 line: older than the line before: a clock"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_answer_is_noted(log, record, change, note):
    log.append([record(0), record(1), record(2, **change)])
    current = Current("0.27.0", {"direct_sparse": 1}, "x86/avx2/8/")
    checked = check_log(log.path, current)
    assert checked.broken == () and checked.records == 3
    assert len(checked.notes) == 1 and checked.notes[0].startswith(note)


def test_torn_empty_and_repeated_lines_are_noted(log, record):
    log.append([record(0), record(1), record(0)])
    _add(log, "\n  \n" + record(2).to_line()[:100])
    assert check_log(log.path, CURRENT).notes == (
        "the last line is torn (100 bytes): it is left out, and a writer moves it aside",
        "2 lines: empty (4, 5)",
        "1 line: the same record again (3)",
    )


def test_many_lines_are_counted_and_some_named(log, record):
    log.append([record(0)] * 20)
    (note,) = check_log(log.path, CURRENT).notes
    assert note == "19 lines: the same record again (2, 3, 4, 5, 6, ...)"
    assert note.count(",") == LINES_NAMED


def test_contradictions_are_noted_but_not_of_a_disturbed_machine(log, record):
    log.append([record(0, us=100.0), record(0, us=125.0), record(1, us=10.0)])
    log.append([record(1, us=50.0, drift=1.5)])
    assert not any("one measurement" in note for note in check_log(log.path, CURRENT).notes)
    log.append([record(0, us=140.0)])
    notes = check_log(log.path, CURRENT).notes
    assert any(n.startswith("lines 1 and 5: one measurement took 101.5 us and 142") for n in notes)


def test_what_is_no_log(tmp_path):
    with pytest.raises(MissingRecordsError, match=r"no tuning log .*none\.jsonl"):
        check_log(tmp_path / "none.jsonl", CURRENT)
    with pytest.raises(TuningLogError, match="directory"):
        check_log(tmp_path, CURRENT)
    (tmp_path / "text").write_text("one\ntwo\n")
    with pytest.raises(TuningLogError, match="text is no tuning log: line 1: no JSON"):
        check_log(tmp_path / "text", CURRENT)
    (tmp_path / "empty").touch()
    assert check_log(tmp_path / "empty", CURRENT).records == 0


def test_repair_moves_broken_lines_and_touches_no_other(log, record):
    edited = json.dumps(json.loads(record(1).to_line()))
    newer = record(2).to_line().replace('"schema":2', '"schema":7')
    long = "x" * 200_000
    lines = [record(0).to_line(), "garbage", edited, "", newer, long, '{"schema":1}']
    log.path.write_text("".join(f"{line}\n" for line in lines) + '{"half')
    assert log.repair() == 3
    kept = [lines[0], edited, "", newer]
    assert log.path.read_text() == "".join(f"{line}\n" for line in kept)
    moved = Path(f"{log.path}.broken")
    assert moved.read_text() == f'garbage\n{long}\n{{"schema":1}}\n'
    assert Path(f"{log.path}.torn").read_text() == '{"half\n'
    assert log.find(record(1).input).record == record(1)
    assert log.repair() == 0
    _add(log, "more\n")
    assert log.repair() == 1
    assert moved.read_text().endswith("}\nmore\n")


def test_repair_leaves_what_is_no_log(log):
    log.path.write_text("one\ntwo\n")
    with pytest.raises(TuningLogError, match="no tuning log"):
        log.repair()
    assert log.path.read_text() == "one\ntwo\n"
