"""Logs: nothing lost, nothing torn, found again, and errors that say what to do."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import filelock
import pytest

from topiarist.errors import MissingRecordsError, NewerLogError, OutputError, TuningLogError
from topiarist.tuning_logs import lines, store
from topiarist.tuning_logs.index import Site
from topiarist.tuning_logs.store import TuningLog


@pytest.fixture
def log(tmp_path):
    return TuningLog(tmp_path / "folder" / "x86.jsonl")


def _torn(log):
    return Path(f"{log.path}.torn")


def _find(log, asked, **options):
    """The record found for what another one measured, or None."""
    match = log.find(asked.input, **options)
    return None if match is None else match.record


def _best(log, asked, **options):
    return [match.record for match in log.best(Site.of(asked.input), **options)]


def test_a_new_log_is_empty_and_makes_no_file(log, record):
    assert list(log.read()) == []
    assert log.find(record().input) is None
    log.append([])
    assert not log.path.parent.exists()


def test_records_come_back_in_order(log, record):
    records = [record(n) for n in range(5)]
    log.append(records[:3])
    log.append(r for r in records[3:])
    assert list(log.read()) == records
    assert log.path.read_bytes().count(b"\n") == 5


def test_empty_lines_are_tolerated(log, record):
    records = [record(n) for n in range(2)]
    log.append(records)
    lines = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"\n  \n" + lines[0] + b"\r\n\n" + lines[1] + b"\n\n")
    assert list(log.read()) == records
    log.append([record(2)])
    assert len(list(log.read())) == 3


def test_a_line_torn_at_any_byte(tmp_path, record):
    """Torn lines are skipped, moved aside by the next append, and merge with nothing."""
    first, last, more = record(1), record(2), record(3)
    ends = [len((r.to_line() + "\n").encode()) for r in (first, last)]
    text = (first.to_line() + "\n" + last.to_line() + "\n").encode()
    for size in range(ends[0], ends[0] + ends[1] + 1):
        log = TuningLog(tmp_path / f"{size}.jsonl")
        log.path.write_bytes(text[:size])
        whole = size >= len(text) - 1  # but for the newline
        kept = [first, last] if whole else [first]
        assert list(log.read()) == kept
        assert (log.find(last.input) is not None) == whole
        log.append([more])
        assert list(log.read()) == [*kept, more]
        assert _find(log, more) == more
        assert len(_best(log, last)) == len(kept) + 1
        fragment = text[ends[0] : size]
        if whole or not fragment:
            assert not _torn(log).exists()
        else:
            assert _torn(log).read_bytes() == fragment + b"\n"


def test_zeros_after_a_power_failure_are_a_torn_line(log, record):
    log.append([record(1)])
    with log.path.open("ab") as file:
        file.write(bytes(5000))
    assert list(log.read()) == [record(1)]
    log.append([record(2)])
    assert list(log.read()) == [record(1), record(2)]


BROKEN = ["", "{", '{"schema":1}', "[" * 50_000, "\x00", "x" * 70_000, "<<<<<<< HEAD\n"]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_line_is_named_and_the_rest_is_used(log, record, broken):
    lines = [record(n).to_line() for n in range(3)]
    lines[1] = broken + lines[1][30:]
    log.path.parent.mkdir()
    log.path.write_text("\n".join(lines) + "\n")
    for _ in range(2):
        assert _find(log, record(0)) == record(0)
        assert _find(log, record(1)) is None
        assert _find(log, record(2)) == record(2)
        assert str(log.defects[0]).startswith(f"{log.path}, line 2: ")
    assert list(log.read()) == [record(0), record(2)]
    assert log.defects[0].line == 2 and not log.defects[0].newer
    log.append([record(3)])  # results are never lost because of what others wrote
    assert log.path.read_text().endswith(record(3).to_line() + "\n")
    assert _find(log, record(3)) == record(3)
    before = log.path.read_bytes()
    for rewrite in (log.compact, lambda: TuningLog(log.path).merge([])):
        with pytest.raises(TuningLogError, match=r"x86\.jsonl, line 2: .*log check --repair"):
            rewrite()  # which would lose the line
    assert log.path.read_bytes() == before


def test_a_line_that_only_seems_a_record_gives_way_to_the_next(log, record):
    """Lines are found by parts of their text, and checked when they are used."""
    good = record(us=50.0)
    bad = record(us=70.0, timestamp="2026-02-01T00:00:00Z").to_line()
    log.append([good, record(1)])
    for line in (
        bad.replace('"status":"ok"', '"status":"splendid"'),
        bad.replace('"seconds":[', '"seconds":[0.0,'),
        bad.replace('"height":14', '"height":15'),
    ):
        with log.path.open("a") as file:
            file.write(line + "\n")
        assert _find(log, good) == good
        assert _best(log, good) == [good, record(1)]
    assert "status" in log.defects[0].problem and log.defects[0].line == 3
    assert "seconds" in log.defects[1].problem and log.defects[1].line == 4


def test_an_unended_line_of_json_that_is_no_record_is_a_defect(log, record):
    log.append([record()])
    with log.path.open("a") as file:
        file.write('{"schema": 1}')
    assert list(log.read()) == [record()]
    assert "the record lacks" in log.defects[0].problem


def test_a_line_of_a_newer_schema_asks_for_an_upgrade(log, record):
    log.append([record(0), record(1)])
    log.path.write_text(log.path.read_text().replace('"schema":2', '"schema":9', 1))
    assert _find(log, record(0)) is None
    assert _find(log, record(1)) == record(1)
    assert log.defects[0].newer
    with pytest.raises(NewerLogError, match=r"line 1: schema 9 is newer .*upgrade") as caught:
        log.compact()
    assert "repair" not in str(caught.value)


def test_a_log_of_newer_records_only_is_a_log(log, record):
    log.path.parent.mkdir()
    log.path.write_text(record().to_line().replace('"schema":2', '"schema":9') + "\n")
    assert list(log.read()) == [] and log.defects[0].newer
    assert log.find(record().input) is None


@pytest.mark.parametrize("content", [bytes(200_000), b"import os\n", b"\x89PNG\r\n\x1a\nmore\n"])
def test_a_file_that_is_no_log(log, record, content):
    log.path.parent.mkdir()
    log.path.write_bytes(content)
    for use in (lambda: list(log.read()), lambda: log.find(record().input)):
        with pytest.raises(TuningLogError, match=r"x86\.jsonl is no tuning log"):
            use()


def test_an_endless_line_is_not_written_after(log):
    log.path.parent.mkdir()
    log.path.write_bytes(bytes(200_000))
    with pytest.raises(OutputError, match="no tuning log"):
        log.compact()


def test_a_folder_is_no_log(tmp_path):
    with pytest.raises(TuningLogError, match="directory"):
        list(TuningLog(tmp_path).read())


def test_random_bytes_never_crash(log, record):
    rng = random.Random(0)
    log.append([record(n) for n in range(2)])
    good = log.path.read_bytes()
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        log.path.write_bytes(data)
        for use in (lambda: list(log.read()), lambda: log.find(record(1).input)):
            with suppress(TuningLogError):  # both lines are broken
                use()
        assert all(defect.problem for defect in log.defects)


def test_find_gives_the_newest(log, record):
    old = record(us=50.0)
    new = record(us=70.0, timestamp="2026-02-01T00:00:00Z")
    failed = record(status="wrong_result", message="off", timestamp="2026-03-01T00:00:00Z")
    log.append([new, old])
    assert _find(log, old) == new
    log.append([failed])
    assert _find(log, old) == failed
    assert _find(log, old, measured="in network") is None
    assert log.history(old.input) == [old, new, failed]


def test_of_one_second_the_last_counts(log, record):
    first, second = record(us=50.0), record(us=70.0)
    log.append([first, second])
    assert _find(log, first) == second
    assert _best(log, first) == [second]


def test_a_steady_measurement_is_believed_before_a_disturbed_one(log, record):
    steady = record(us=50.0, drift=1.05)
    disturbed = record(us=80.0, drift=1.3, timestamp="2026-02-01T00:00:00Z")
    log.append([steady, disturbed])
    assert _find(log, steady) == steady
    assert _best(log, steady) == [steady]
    assert log.history(steady.input) == [disturbed, steady]
    assert log.compact() == 1
    assert list(log.read()) == [steady]


def test_a_record_from_the_future_gives_way(log, record):
    """A clock that was ahead does not hide all that is measured after it was set right."""
    ahead = record(us=10.0, timestamp="2999-01-01T00:00:00Z")
    log.append([ahead, record(us=50.0)])
    assert _find(log, ahead) == record(us=50.0)
    assert log.compact() == 1
    assert list(log.read()) == [record(us=50.0)]


def test_find_sees_what_other_writers_did(log, record):
    other = TuningLog(log.path)
    assert _find(log, record(1)) is None
    other.append([record(1)])
    assert _find(log, record(1)) == record(1)
    fast = record(3, us=1.0)
    other.append([record(2), fast])
    assert _find(log, record(2)) == record(2)
    other.compact(keep_best=1)
    assert _find(log, record(2)) is None
    assert _find(log, fast) == fast
    log.path.unlink()
    assert _find(log, fast) is None


def test_errors_name_the_right_line_after_a_missing_newline(log, record):
    log.append([record(1)])
    log.path.write_bytes(log.path.read_bytes()[:-1])
    assert _find(log, record(1)) == record(1)
    log.append([record(2)])
    with log.path.open("a") as file:
        file.write("broken\n")
    log.find(record().input)
    assert log.defects[0].line == 3


def test_a_line_is_indexed_once(log, record, monkeypatch):
    log.append([record(n) for n in range(3)])
    log.find(record().input)
    seen = []
    monkeypatch.setattr(store, "raw_lines", lambda *at: seen.append(at) or lines.raw_lines(*at))
    log.find(record().input)
    assert seen == []
    size = log.path.stat().st_size
    log.append([record(3)])
    assert _find(log, record(3)) == record(3)
    assert [at[1:] for at in seen] == [(size, 3)]


def test_best_of_a_workload(log, record):
    fast, slow = record(1, us=10.0), record(2, us=20.0)
    again = record(1, us=30.0, timestamp="2026-02-01T00:00:00Z")
    elsewhere = [
        record(3, us=1.0, threads=2),
        record(4, us=1.0, size=7),
        record(5, us=1.0, measured="in network"),
        record(6, status="timeout", message="2 s"),
    ]
    plain = record(7, us=15.0, input_layout="plain")
    log.append([slow, fast, *elsewhere, plain])
    assert _best(log, fast) == [fast, slow]
    assert _best(log, plain) == [plain]
    assert _best(log, fast, measured="in network") == [elsewhere[2]]
    log.append([again])
    assert _best(log, fast) == [slow, again]
    assert _best(log, record(size=28)) == []


def test_merge_is_a_union_whichever_way(tmp_path, record):
    records = [record(n, timestamp=f"2026-01-{1 + n % 4:02d}T00:00:00Z") for n in range(9)]
    parts = records[:5], records[3:8], [records[8], records[0], records[0]]
    merged = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        folder = tmp_path / str(order[0])
        logs = [TuningLog(folder / f"{i}.jsonl") for i in range(3)]
        for log, part in zip(logs, parts, strict=True):
            log.append(part)
        own = {r.id for r in parts[order[0]]}
        assert logs[order[0]].merge(logs[i].path for i in order[1:]) == 9 - len(own)
        merged.append(logs[order[0]].path.read_bytes())
        assert logs[order[0]].merge([logs[order[1]].path]) == 0
    assert merged[0] == merged[1] == merged[2]
    assert {r.id for r in log.read()} <= {r.id for r in records}
    with pytest.raises(MissingRecordsError, match=r"no tuning log .*none\.jsonl"):
        log.merge([tmp_path / "none.jsonl"])


def test_merge_keeps_a_torn_line_aside(log, record, tmp_path):
    other = TuningLog(tmp_path / "other.jsonl")
    other.append([record(1)])
    log.append([record(2)])
    with log.path.open("a") as file:
        file.write('{"half')
    log.merge([other.path])
    assert {r.id for r in log.read()} == {record(1).id, record(2).id}
    assert _torn(log).read_text() == '{"half\n'


def test_compact_keeps_the_best_and_the_failed(log, record):
    later = "2026-02-01T00:00:00Z"
    best = [record(n, us=10.0 + n) for n in range(3)]
    worse = [record(n, us=10.0 + n) for n in range(3, 6)]
    outdated = record(0, us=1.0, timestamp="2025-01-01T00:00:00Z")
    failed = [record(n, status="build_error", message="no", timestamp=later) for n in (7, 8)]
    failed_before = record(7, status="timeout", message="2 s")
    others = [
        record(9, us=99.0, kernel="direct_dense"),
        record(9, us=99.0, kernel_version=2),
        record(9, us=99.0, threads=4),
        record(9, us=99.0, size=7),
        record(9, us=99.0, residual_layout="in place"),
        record(9, us=99.0, measured="in network"),
    ]
    log.append([*worse, outdated, *best, failed_before, *failed, *others, best[0]])
    assert log.compact(keep_best=3) == 6
    assert list(log.read()) == [*best, *failed, *others]
    assert log.compact(keep_best=3) == 0
    assert not Path(f"{log.path}.new").exists()
    with pytest.raises(ValueError, match="keep_best"):
        log.compact(keep_best=0)


def test_a_full_disk_loses_nothing(log, record):
    log.append([record(1)])
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 1500, hard))
    try:
        with pytest.raises(
            OutputError, match=r"can't write .*x86\.jsonl: File too large; make room"
        ):
            log.append([record(2), record(3)])
        assert log.path.read_bytes() == before
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 10, hard))
        with pytest.raises(OutputError):
            log.compact()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == before
    assert not Path(f"{log.path}.new").exists()
    log.append([record(2), record(3)])
    assert list(log.read()) == [record(1), record(2), record(3)]


def test_where_nothing_can_be_written(tmp_path, record):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"can't write .*; make room or permit writing"):
        TuningLog(tmp_path / "file" / "x86.jsonl").append([record()])
    log = TuningLog(tmp_path / "log.jsonl")
    log.path.mkdir()
    with pytest.raises(OutputError, match="can't write"):
        log.append([record()])


def test_a_lock_that_is_held_is_waited_for_and_then_named(log, record):
    log.append([record(1)])
    impatient = TuningLog(log.path, lock_timeout_s=0.05)
    with filelock.FileLock(f"{log.path}.lock"):
        assert list(impatient.read()) == [record(1)]  # readers need no lock
        with pytest.raises(OutputError, match=r"another process is writing .*x86\.jsonl"):
            impatient.append([record(2)])
    impatient.append([record(2)])


def test_a_record_too_long_for_a_line_is_refused(log, record):
    with pytest.raises(ValueError, match="bytes"):
        log.append([record(config={str(n): "x" * 500 for n in range(200)})])
    assert not log.path.exists()


WRITER = """
import sys
from pathlib import Path
from topiarist.tuning_logs.record import TuningRecord
from topiarist.tuning_logs.store import TuningLog

source, path, worker = sys.argv[1:]
line = Path(source).read_text()
log = TuningLog(Path(path))
while not Path(path + ".go").exists():
    pass
for n in range(300):
    mine = line.replace('"cols":0', f'"cols":{n}').replace('"rows":1', f'"rows":{worker}')
    log.append([TuningRecord.from_line(mine)])
    if n % 50 == 0:
        list(log.read())
"""


def test_two_processes_append_at_the_same_time(tmp_path, record):
    (tmp_path / "line").write_text(record(0).to_line())
    path = tmp_path / "x86.jsonl"
    command = [sys.executable, "-c", WRITER, str(tmp_path / "line"), str(path)]
    writers = [subprocess.Popen([*command, str(worker)]) for worker in (1, 2)]
    (tmp_path / "x86.jsonl.go").touch()
    log = TuningLog(path)
    while any(writer.poll() is None for writer in writers):
        log.find(record().input)
        time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0]
    configs = [(r.input.config["rows"], r.input.config["cols"]) for r in log.read()]
    assert sorted(configs) == [(worker, n) for worker in (1, 2) for n in range(300)]
    for worker in (1, 2):
        assert [n for w, n in configs if w == worker] == list(range(300))
    assert not _torn(log).exists()


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
from topiarist.tuning_logs.record import TuningRecord
from topiarist.tuning_logs.store import TuningLog

source, path, kills = sys.argv[1:]
line = Path(source).read_text()
rng = random.Random(0)


def write(kill, done):
    log = TuningLog(Path(path))
    for n in range(10_000):
        mine = line.replace('"cols":0', f'"cols":{n}').replace('"rows":1', f'"rows":{kill + 1}')
        log.append([TuningRecord.from_line(mine)])
        os.write(done, f"{kill + 1} {n}\\n".encode())


for kill in range(int(kills)):
    read, done = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        write(kill, done)
    os.close(done)
    time.sleep(rng.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read) as finished:
        sys.stdout.write(finished.read())
"""


def test_killed_writers_lose_nothing_that_was_finished(tmp_path, record, kills=50):
    (tmp_path / "line").write_text(record(0).to_line())
    path = tmp_path / "x86.jsonl"
    command = [sys.executable, "-c", KILLS, tmp_path / "line", path, str(kills)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    finished = {tuple(map(int, text.split())) for text in said.splitlines()}
    log = TuningLog(path)
    log.append([record(999)])  # as the next writer does, which mends what was torn
    kept = {(r.input.config["rows"], r.input.config["cols"]) for r in log.read()}
    assert finished and finished <= kept and log.defects == []
    assert len(kept - finished) <= kills + 1  # written, and killed before it was said


def test_a_large_log_is_indexed_without_being_parsed(log, record):
    line = record(0).to_line()
    log.path.parent.mkdir()
    with log.path.open("w") as file:
        file.writelines(line.replace('"cols":0', f'"cols":{n}') + "\n" for n in range(50_000))
    seconds = []
    for _ in range(2):
        fresh = TuningLog(log.path)
        start = time.process_time()
        assert _find(fresh, record(49_999)) == record(49_999)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2.5  # 0.35 on a slow core, 5 if each were parsed: to notice that
