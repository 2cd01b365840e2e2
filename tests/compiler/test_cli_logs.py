"""`topiarist log`: its forms, its JSON, and exit codes that tell missing from broken."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner, Result

from topiarist.compiler import cli_logs
from topiarist.compiler.cli import app
from topiarist.compiler.runtime import versions
from topiarist.schedules.kernels import conv_kernel
from topiarist.schedules.workload import ConvWorkload, SparsitySignature
from topiarist.tuning_logs import sources
from topiarist.tuning_logs.record import MeasureInput, TargetKey, TuningRecord
from topiarist.tuning_logs.store import TuningLog

MakeLog = Callable[..., Path]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["log", *(str(a) for a in arguments)])


def call_json(*arguments: object, exit_code: int = 0) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def assert_error(result: Result, exit_code: int, *parts: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last


def make_record(number: int = 0, us: float = 100.0, **changes: Any) -> TuningRecord:
    sparsity = SparsitySignature(0.1, "unstructured", (10, 29, 40))
    workload = ConvWorkload(
        *(1, 64, 14, 14, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, sparsity, (0.0, None))
    )
    what = MeasureInput(
        workload=workload.to_json(),
        kernel="direct_sparse",
        kernel_version=conv_kernel("direct_sparse").version,
        config={"cols": number},
        input_layout="plain",
        output_layout="plain",
        residual_layout="none",
        target=TargetKey("x86", changes.pop("isa", "avx2"), 8, "Some CPU", 1),
        versions=versions(),
    )
    if changes.get("status", "ok") == "ok":
        changes["seconds"] = (us * 1e-6,)
    return TuningRecord(what, **({"timestamp": "2026-01-31T12:00:00Z"} | changes))


@pytest.fixture
def make_log(tmp_path: Path) -> MakeLog:
    def make(*records: TuningRecord, name: str = "x86.jsonl", text: str = "") -> Path:
        TuningLog(tmp_path / name).append(records)
        with (tmp_path / name).open("a") as file:
            file.write(text)
        return tmp_path / name

    return make


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the user's logs nor those of the package."""
    monkeypatch.setattr(cli_logs, "user_folder", lambda: tmp_path / "user")
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(cli_logs, "SHIPPED", tmp_path / "shipped")
    yield


def test_list(make_log: MakeLog) -> None:
    log = make_log(
        make_record(1), make_record(2, 50.0), make_record(3, status="crash", message="-")
    )
    document = call_json("list", log)
    assert document["logs"] == [str(log)] and document["skipped"] == []
    (found,) = document["workloads"]
    assert (found["workload"], found["density"]) == ("64x14x14 3x3 -> 64", 0.1)
    assert (found["candidates"], found["failed"], found["run_us"]) == (3, 1, pytest.approx(50.0))
    text = call("list", log).stdout
    assert "direct_sparse" in text and "3 records in 1 log" in text


def test_list_without_a_log_is_of_the_user_and_the_package(tmp_path: Path) -> None:
    assert call_json("list")["workloads"] == []
    TuningLog(tmp_path / "user" / "x86.jsonl").append([make_record(1)])
    TuningLog(tmp_path / "shipped" / "x86-avx2" / "networks.jsonl").append([make_record(2)])
    document = call_json("list")
    assert [Path(path).name for path in document["logs"]] == ["x86.jsonl", "networks.jsonl"]
    assert document["workloads"][0]["candidates"] == 2


def test_list_of_a_folder_with_a_broken_line(make_log: MakeLog, tmp_path: Path) -> None:
    make_log(make_record(1), name="a.jsonl", text="<<<<<<< HEAD\n")
    make_log(make_record(2), name="b.jsonl")
    result = call("list", tmp_path)
    assert result.exit_code == 0 and "2 records in 2 logs" in result.stdout
    assert result.stderr.startswith(f"skipped {tmp_path / 'a.jsonl'}, line 2: no JSON")
    assert len(call_json("list", tmp_path)["skipped"]) == 1


def test_show(make_log: MakeLog) -> None:
    failed = make_record(3, status="crash", message="signal 11")
    log = make_log(make_record(1), failed, make_record(2, 50.0, drift=1.3))
    key = make_record().input.workload_key
    records = call_json("show", key[:6], log)["records"]
    assert [r["run_us"] for r in records] == [pytest.approx(50.0), pytest.approx(100.0), None]
    assert records[0]["seconds"] == [pytest.approx(5e-5)] and records[0]["drift"] == 1.3
    (one,) = call_json("show", failed.id, log)["records"]
    assert (one["status"], one["message"]) == ("crash", "signal 11")
    assert "crash: signal 11" in call("show", key, log).stdout


def test_what_is_missing_exits_with_3(make_log: MakeLog, tmp_path: Path) -> None:
    log = make_log(make_record(1))
    none = tmp_path / "none.jsonl"
    assert_error(call("show", "zz", log), 3, "begins with 'zz'")
    for arguments in (("list", none), ("check", none), ("compact", none), ("merge", log, none)):
        assert_error(call(*arguments), 3, "no tuning log", "none.jsonl")
    assert not none.exists()


def test_what_is_broken_exits_with_4(make_log: MakeLog, tmp_path: Path) -> None:
    broken = make_log(make_record(1), text="garbage\n")
    sound = make_log(make_record(2), name="sound.jsonl")
    (tmp_path / "text.jsonl").write_text("text\n")
    before = broken.read_bytes()
    assert_error(call("compact", broken), 4, "line 2", "log check --repair")
    assert_error(call("merge", sound, broken), 4, "line 2", "log check --repair")
    for name in ("list", "check", "export"):
        assert_error(call(name, tmp_path / "text.jsonl"), 4, "no tuning log")
    assert broken.read_bytes() == before


def test_merge_and_compact(make_log: MakeLog, tmp_path: Path) -> None:
    others = tmp_path / "others"
    make_log(make_record(1), make_record(2, 50.0), name="others/a.jsonl")
    make_log(make_record(3, 70.0), name="others/b.jsonl")
    log = make_log(make_record(1))
    assert call_json("merge", log, others) == {"log": str(log), "added": 2}
    assert "0 records came into" in call("merge", log, others).stdout
    assert call_json("compact", log, "--keep", 1) == {"log": str(log), "dropped": 2}
    assert list(TuningLog(log).read()) == [make_record(2, 50.0)]
    assert "0 records went from" in call("compact", log).stdout


def test_check_of_a_sound_log(make_log: MakeLog) -> None:
    log = make_log(make_record(1), make_record(1))
    (found,) = call_json("check", log)["logs"]
    assert (found["records"], found["broken"], found["moved"]) == (2, [], 0)
    assert found["notes"] == ["1 line: the same record again (2)"]
    assert "2 records, sound" in call("check", log).stdout
    (found,) = call_json("check", log, "--target", "x86-avx512")["logs"]
    assert any("of another target, x86/avx2/8/Some CPU" in note for note in found["notes"])
    assert call("check", log, "--target", "x86-avx3").exit_code == 2


def test_check_names_broken_lines_and_repairs_them(make_log: MakeLog) -> None:
    log = make_log(make_record(1), text="garbage\n{}\n")
    result = call("check", log)
    assert result.exit_code == 4
    assert "1 record, 2 broken lines" in result.stdout
    assert "line 2: no JSON at column 1" in result.stdout and "--repair" in result.stdout
    (found,) = call_json("check", log, exit_code=4)["logs"]
    assert [broken["line"] for broken in found["broken"]] == [2, 3]
    (found,) = call_json("check", log, "--repair")["logs"]
    assert (found["moved"], found["broken"]) == (2, [])
    assert Path(f"{log}.broken").read_text() == "garbage\n{}\n"
    assert call("check", log).exit_code == 0


def test_a_newer_schema_is_not_repaired_away(make_log: MakeLog) -> None:
    newer = make_record(2).to_line().replace('"schema":2', '"schema":9') + "\n"
    log = make_log(make_record(1), text=newer)
    result = call("check", log, "--repair")
    assert result.exit_code == 4
    assert "upgrade" in result.stdout and "--repair" not in result.stdout
    assert log.read_text().endswith(newer)
    assert_error(call("compact", log), 4, "upgrade")


def test_export_to_csv(make_log: MakeLog, tmp_path: Path) -> None:
    log = make_log(make_record(1), make_record(2), text="garbage\n")
    result = call("export", log)
    assert len(list(csv.DictReader(io.StringIO(result.stdout)))) == 2
    assert "skipped" in result.stderr
    output = tmp_path / "out.csv"
    assert call_json("export", log, "-o", output) == {
        "output": str(output),
        "records": 2,
        "left_out": 0,
    }
    assert output.read_text() == result.stdout
    assert_error(call("export", log, "-o", tmp_path / "none" / "out.csv"), 2, "can't write")


def test_compiling_from_a_log_tells_missing_from_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SHIPPED", tmp_path / "shipped")
    model, log, bundle = tmp_path / "m.onnx", tmp_path / "log.jsonl", tmp_path / "m.topi"
    onnx.save(_one_conv(), model)
    strict = ("compile", model, "--strict", "--log", log, "-o", bundle)

    def compiling(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    assert_error(compiling(*strict), 3, "no tuning log")
    log.write_text(make_record().to_line() + "\n")
    assert_error(compiling(*strict), 3, "conv0")
    log.write_text(make_record().to_line() + "\n<<<<<<< HEAD\n")
    assert_error(compiling(*strict), 4, "conv0", "line 2")
    log.write_text("<<<<<<< HEAD\n")
    assert_error(compiling(*strict), 4, "no tuning log")
    log.unlink()
    assert compiling("compile", model, "--log", log, "-o", bundle).exit_code == 0
    with log.open("a") as file:
        file.write("<<<<<<< HEAD\n")
    result = compiling(*strict)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"skipped {log}, line ")


def _one_conv() -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)
    shape = ["n", 8, 8, 8]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], "conv0", pads=[1, 1, 1, 1])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_metaschedule_there_and_back(make_log: MakeLog, tmp_path: Path) -> None:
    database = _database(tmp_path / "database")
    log = tmp_path / "x86.jsonl"
    named = ("import", database, "--into", log, "--target", "x86-avx2")
    document = call_json(*named)
    assert (document["added"], len(document["skipped"])) == (1, 1)
    assert call_json(*named)["added"] == 0
    make_log(make_record(1))
    out = tmp_path / "out"
    options = ("export", log, "--format", "metaschedule")
    assert call_json(*options, "-o", out) == {"output": str(out), "records": 1, "left_out": 1}
    assert sorted(path.name for path in out.iterdir()) == [
        "database_tuning_record.json",
        "database_workload.json",
    ]
    again = ("import", out, "--into", tmp_path / "again.jsonl", "--target", "x86-avx2")
    assert call_json(*again)["added"] == 1
    assert_error(call(*options), 2, "-o DIR")
    assert_error(call(*options, "-o", out), 2, "exists already")
    assert_error(call(*options, "--mcpu", "znver3", "-o", tmp_path / "new"), 3, "no record came")
    assert_error(call(*again[:-1], "x86-sse4"), 3, "no record for x86-sse4")
    assert_error(call("import", tmp_path, "--into", log), 3, "no MetaSchedule database")
    (out / "database_tuning_record.json").write_text("garbage\n")
    assert_error(call(*again), 4, "can be read")


def _database(folder: Path) -> Path:
    """A database with a sound line and a torn one. The module is as TVM frames it, and empty."""
    graph = {"root_index": 0, "nodes": [{"type": "None"}], "metadata": {"tvm_version": "0.27.0"}}
    text = json.dumps(graph).encode()
    module = base64.b64encode(len(text).to_bytes(8, "little") + text).decode()
    target = {"kind": "llvm", "mcpu": "x86-64-v3"}
    content = [[[["GetSBlock", [], ["conv", "main"], ["b0"]]], []], [1e-4], target, None]
    folder.mkdir()
    (folder / "database_workload.json").write_text(json.dumps(["123", module]) + "\n")
    line = json.dumps([0, content])
    (folder / "database_tuning_record.json").write_text(f"{line}\n{line[:50]}\n")
    return folder
