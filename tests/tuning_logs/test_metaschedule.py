"""MetaSchedule's databases: every line by itself, one target, and TVM takes back what we write."""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import replace

import pytest
import tvm
from tvm import te, topi
from tvm.s_tir import meta_schedule as ms

from topiarist.errors import MissingRecordsError, TuningLogError
from topiarist.targets import registry
from topiarist.tuning_logs.metaschedule import (
    NO_TIME,
    RECORDS,
    WORKLOADS,
    Expected,
    database_files,
    mcpu_of,
    read_database,
)
from topiarist.tuning_logs.store import TuningLog

TARGET = {"kind": "llvm", "mcpu": "x86-64-v3", "num-cores": 2}
EXPECTED = Expected.of(registry.get("x86-avx2"))


def _conv(size):
    data = te.placeholder((1, 8, size, size), name="data")
    weight = te.placeholder((8, 8, 3, 3), name="weight")
    return te.create_prim_func([data, weight, topi.nn.conv2d_nchw(data, weight, 1, 1, 1)])


def _module(size):
    return tvm.IRModule({"main": _conv(size)})


def _commit(database, size, seconds, target=TARGET):
    module = _module(size)
    schedule = tvm.s_tir.Schedule(module)
    loops = schedule.get_loops(schedule.get_sblock("conv2d_nchw"))
    factors = schedule.sample_perfect_tile(loops[1], 2, 8)
    schedule.split(loops[1], factors=factors)
    arguments = ms.arg_info.ArgInfo.from_prim_func(module["main"])
    workload = database.commit_workload(module)
    record = ms.database.TuningRecord(
        schedule.trace, workload, seconds, tvm.target.Target(target), arguments
    )
    database.commit_tuning_record(record)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A database of TVM's: two layers, four records, one of them failed."""
    folder = tmp_path_factory.mktemp("written")
    database = ms.database.JSONDatabase(work_dir=str(folder))
    for size, seconds in ((8, [2e-4, 2.5e-4]), (8, [1e-4]), (12, [3.5e-4]), (12, [NO_TIME])):
        _commit(database, size, seconds)
    return folder


@pytest.fixture
def database(written, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(written, tmp_path / "database")


def _spoil(folder, name, line, change):
    lines = (folder / name).read_text().splitlines()
    lines[line - 1] = change(lines[line - 1])
    (folder / name).write_text("\n".join(lines) + "\n")


def _write(folder, records):
    folder.mkdir()
    files, others = database_files(records)
    for name, text in files.items():
        (folder / name).write_text(text)
    return others


def test_a_database_is_read(database):
    found = read_database(database, EXPECTED)
    assert (found.broken, found.foreign) == ((), ())
    assert [r.seconds for r in found.records] == [(2e-4, 2.5e-4), (1e-4,), (3.5e-4,), ()]
    assert [r.status for r in found.records] == ["ok", "ok", "ok", "crash"]
    what = found.records[0].input
    assert what.workload["arguments"][0] == ["TENSOR", "float32", [1, 8, 8, 8]]
    assert what.target.threads == 2 and what.target.isa == "avx2"
    assert what.versions["apache-tvm"] == tvm.__version__
    assert mcpu_of(found.records[0]) == "x86-64-v3"
    assert len({r.input.workload_key for r in found.records}) == 2
    assert read_database(database, EXPECTED) == found  # the same ids, so importing twice adds none
    assert (
        read_database(database, replace(EXPECTED, threads=7)).records[0].input.target.threads == 7
    )


def test_records_go_through_a_log_and_back_to_tvm(database, tmp_path, record):
    log = TuningLog(tmp_path / "x86.jsonl")
    records = read_database(database, EXPECTED).records
    log.append(reversed(records))
    log.append([record()])
    assert log.find(records[0].input).record == records[0]
    assert _write(tmp_path / "back", log.read()) == 1  # left out: a kernel of ours
    again = ms.database.JSONDatabase(work_dir=str(tmp_path / "back"))
    assert len(again) == 4
    target = tvm.target.Target(TARGET)
    for size, seconds in ((8, 1e-4), (12, 3.5e-4)):
        best = again.query_tuning_record(_module(size), target, "main")
        assert float(best.run_secs[0]) == pytest.approx(seconds)
        assert again.query_ir_module(_module(size), target, "main") is not None
    returned = read_database(tmp_path / "back", EXPECTED).records
    assert {r.id for r in returned} == {r.id for r in records}


DEFECTS = {
    "torn last record": (RECORDS, 4, lambda line: line[:-40], "no JSON"),
    "garbage": (RECORDS, 2, lambda line: '{"oops', "no JSON"),
    "empty": (RECORDS, 2, lambda line: "", "empty"),
    "no such workload": (RECORDS, 2, lambda line: "[7" + line[2:], "no workload 7"),
    "negative workload": (RECORDS, 2, lambda line: "[-1" + line[2:], "no workload -1"),
    "true workload": (RECORDS, 2, lambda line: "[true" + line[2:], "no workload True"),
    "no trace": (RECORDS, 2, lambda line: "[0,[null,[1],{},null]]", "trace is no list of 2"),
    "odd trace": (RECORDS, 2, lambda line: line.replace('"GetSBlock"', "5"), "instruction"),
    "odd decision": (RECORDS, 2, lambda line: line.replace("[[2,[", "[[99,["), "no instruction"),
    "negative seconds": (RECORDS, 2, lambda line: line.replace("[0.0001", "[-0.0001"), "seconds"),
    "nested": (RECORDS, 2, lambda line: "[" * 50_000, "no JSON"),
    "garbage workload": (WORKLOADS, 2, lambda line: "[", "no JSON"),
    "no base64": (WORKLOADS, 2, lambda line: '["123","*"]', "no base64"),
    "cut module": (WORKLOADS, 2, lambda line: line[:2000] + '"]', "cut off|base64"),
    "module of zeros": (
        *(WORKLOADS, 2),
        lambda line: json.dumps(["123", base64.b64encode(bytes(8)).decode()]),
        "not what TVM writes",
    ),
    "no hash": (WORKLOADS, 2, lambda line: line.replace('["', '["x'), "not a hash"),
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS.keys())
def test_one_bad_line_loses_no_other(database, tmp_path, defect):
    """TVM loses the whole of such a database, or crashes over it."""
    name, line, change, problem = defect
    intact = read_database(database, EXPECTED).records
    _spoil(database, name, line, change)
    found = read_database(database, EXPECTED)
    lost = {4: [0, 1, 2], 2: [0, 2, 3]}[line] if name == RECORDS else [0, 1]
    assert found.records == tuple(intact[i] for i in lost)
    assert (found.broken[0].path.name, found.broken[0].line) == (name, line)
    assert any(word in found.broken[0].problem for word in problem.split("|"))
    _write(tmp_path / "back", found.records)
    assert len(ms.database.JSONDatabase(work_dir=str(tmp_path / "back"))) == len(found.records)


def test_records_of_another_target_are_named_and_left(database):
    _spoil(database, RECORDS, 1, lambda line: line.replace("x86-64-v3", "cortex-a72"))
    _spoil(database, RECORDS, 2, lambda line: line.replace('"llvm"', '"cuda"'))
    _spoil(
        *(database, RECORDS, 3),
        lambda line: line.replace('"mcpu"', '"mtriple":"aarch64-linux-gnu","mcpu"'),
    )
    found = read_database(database, EXPECTED)
    assert len(found.records) == 1 and not found.broken
    texts = [defect.problem for defect in found.foreign]
    assert "processor 'cortex-a72', not 'x86-64-v3' (see --mcpu)" in texts[0]
    assert "'cuda'" in texts[1] and "aarch64" in texts[2]
    arm = Expected.of(registry.get("x86-avx2"), "cortex-a72")
    assert len(read_database(database, arm).records) == 1


def test_targets_do_not_share_a_database(database):
    _spoil(database, RECORDS, 1, lambda line: line.replace("x86-64-v3", "znver3"))
    other = Expected.of(registry.get("x86-avx2"), "znver3")
    records = [r for e in (EXPECTED, other) for r in read_database(database, e).records]
    with pytest.raises(TuningLogError, match=r"2 targets .*--mcpu: .*znver3"):
        database_files(records)
    assert len(database_files(records[:3])[0]) == 2


def test_what_has_no_schedule_is_not_written(record):
    with pytest.raises(MissingRecordsError, match="the 2 of kernels of Topiarist have no"):
        database_files([record(1), record(2)])


@pytest.mark.parametrize("change", [{"workload": {"kind": "x"}}, {"config": {"target": {}}}])
def test_a_record_that_only_says_it_came_from_there(record, change):
    with pytest.raises(TuningLogError, match="is no record of MetaSchedule"):
        database_files([record(kernel="metaschedule", **change)])


def test_where_there_is_no_database(tmp_path):
    with pytest.raises(MissingRecordsError, match="no MetaSchedule database"):
        read_database(tmp_path, EXPECTED)
    (tmp_path / WORKLOADS).touch()
    (tmp_path / RECORDS).touch()
    assert read_database(tmp_path, EXPECTED).records == ()
