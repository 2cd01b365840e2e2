"""`topiarist model`: its forms, its JSON, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from tests.compiler.test_latency import (
    HOST,
    make_log,
    make_record,
    network,
    stated,
)
from topiarist.compiler import collect as collecting
from topiarist.compiler import model_files
from topiarist.compiler.cli import app
from topiarist.compiler.model_files import default_model
from topiarist.compiler.recorded import Device
from topiarist.compiler.worker import Batch, Layer, Outcome, Variant, Worker
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs import regressions, sources
from topiarist.tuning_logs.store import TuningLog

__all__ = ["network", "stated"]  # fixtures


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["model", *(str(a) for a in arguments)])


def call_json(*arguments: object) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output

    def never(text: str) -> None:
        raise AssertionError(text)

    return json.loads(result.stdout, parse_constant=never)


def assert_error(result: Result, exit_code: int, *parts: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    for part in parts:
        assert part in last


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few trees, and a folder of its own."""
    for name in regressions.ROUNDS:
        monkeypatch.setitem(regressions.ROUNDS, name, 5)
    for module in (model_files, sources):
        monkeypatch.setattr(module, "user_folder", lambda: tmp_path / "user")
    yield


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return make_log(tmp_path / "a.jsonl", *[make_record(i) for i in range(200)])


@pytest.fixture
def other_log(tmp_path: Path) -> Path:
    return make_log(tmp_path / "b.jsonl", *[make_record(i, channels=8) for i in range(150)])


@pytest.fixture
def model(log: Path, tmp_path: Path) -> Path:
    assert call("train", log, "-o", tmp_path / "model.json", "--no-check").exit_code == 0
    return tmp_path / "model.json"


@pytest.fixture
def host(stated: TargetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's roofline is stated, so that nothing is timed."""
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda name: stated if name == "host" else get(name))


def test_train_with_errors_beside_baselines(log: Path, other_log: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.json"
    result = call("train", log, other_log, "-o", output)
    assert result.exit_code == 0, result.output
    for part in (
        "a fifth, alone",
        "a, alone",
        "b, alone",
        "latency model",
        "FLOPs on nonzeros",
        "nearest record",
        "pairs in order",
        " %",
        f"wrote {output}: 350 records",
    ):
        assert part in result.stdout  # fmt: skip
    card = call_json("explain", "-m", output)
    assert card["logs"] == {"a": 200, "b": 150} and {*card["errors"]} == {"a fifth", "a", "b"}


def test_train_json(log: Path, tmp_path: Path) -> None:
    document = call_json("train", log, "-o", tmp_path / "model.json")
    assert document["model"] == str(tmp_path / "model.json")
    errors = document["card"]["errors"]["a fifth"]["alone"]
    assert errors["model"]["records"] == 40 and errors["decisions"]["top_8"] is None


def test_train_for_the_user(log: Path) -> None:
    path = default_model(Device.here(HOST, 1).key)
    assert call_json("train", log, "--no-check")["model"] == str(path)
    assert call_json("explain")["records"] == 200


def test_few_records_are_trained_without_errors(tmp_path: Path) -> None:
    log = make_log(tmp_path / "few.jsonl", *[make_record(i) for i in range(110)])
    result = call("train", log, "-o", tmp_path / "m.json")
    assert result.exit_code == 0 and "too few records to hold any out" in result.stdout


def test_few_records_are_enough_with_the_model_of_another_target(
    model: Path, tmp_path: Path
) -> None:
    few = make_log(tmp_path / "few.jsonl", *[make_record(i, threads=2) for i in range(40)])
    output = tmp_path / "adapted.json"
    card = call_json("train", few, "--base", model, "-o", output)["card"]
    assert "1 thread" in card["base"] and "2 threads" in card["target"]
    assert card["errors"]["a fifth"]["alone"]["model"]["records"] == 8
    assert_error(call("train", few, "-o", output), 2, "40 usable records are too few", "--base")


def test_train_from_what_will_not_do(log: Path, tmp_path: Path) -> None:
    output = ("-o", tmp_path / "m.json")
    few = make_log(tmp_path / "few.jsonl", make_record(1))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "text.jsonl").write_text("text\n")
    assert_error(call("train", few, *output), 2, "1 usable records are too few", "model collect")
    assert_error(call("train", tmp_path / "none.jsonl", *output), 3, "there is no tuning log")
    assert_error(call("train", tmp_path / "empty.jsonl", *output), 3, "no usable record")
    assert_error(call("train", tmp_path / "text.jsonl", *output), 4, "no tuning log")
    assert_error(call("train", log, "-o", tmp_path), 2, "is a folder")
    assert_error(call("train", log, "-o", tmp_path / "no" / "m.json"), 2, "doesn't exist")
    assert_error(call("train", log, "--target", "x86-avx3", *output), 2, "x86-avx3")
    assert call("train").exit_code == 2
    assert not (tmp_path / "m.json").exists()


def test_logs_of_two_targets_and_the_choice_between_them(log: Path, tmp_path: Path) -> None:
    TuningLog(log).append([make_record(i, threads=2) for i in range(5)])
    output = ("-o", tmp_path / "m.json", "--no-check")
    assert_error(call("train", log, *output), 2, "1 thread, ", "2 threads", "--threads N")
    assert call_json("train", log, "--threads", 1, *output)["card"]["records"] == 200
    assert_error(call("train", log, "--threads", 3, *output), 3, "no usable record")


def test_lines_that_are_left_out_are_named(log: Path, tmp_path: Path) -> None:
    TuningLog(log).append([make_record(1, kernel_version=99)])
    with log.open("a") as file:
        file.write("garbage\n")
    result = call("train", log, "-o", tmp_path / "m.json", "--no-check")
    assert result.exit_code == 0
    assert f"note: skipped {log}, line 202" in result.stderr
    assert "note: left out 1 records of other versions" in result.stderr


def test_eval(model: Path, log: Path, other_log: Path) -> None:
    errors = call_json("eval", log, other_log, "-m", model)["records not trained on"]
    assert errors["alone"]["model"]["records"] == 150
    result = call("eval", other_log, "-m", model)
    assert result.exit_code == 0 and "records not trained on, alone" in result.stdout
    assert_error(call("eval", log, "-m", model), 2, "trained on all of these", "give it others")
    assert_error(call("eval", log), 2, "there is no latency model", "`topiarist model train`")
    assert_error(call("eval", log, "-m", log), 2, "is no latency model")


@pytest.mark.usefixtures("host")
def test_predict(model: Path, network: Path) -> None:
    document = call_json("predict", network, "-m", model)
    assert [layer["layer"] for layer in document["layers"]] == ["conv", "fc"]
    assert str(model) in document["source"]
    result = call("predict", network)
    assert result.exit_code == 0, result.output
    assert "by the analytic formula" in result.stdout and "unstructured" in result.stdout


@pytest.mark.usefixtures("host")
def test_predict_what_can_not_be(model: Path, network: Path, tmp_path: Path) -> None:
    none = tmp_path / "none.json"
    assert_error(call("predict", network, "-m", none), 2, "no latency model", "none.json")
    assert_error(
        call("predict", network, "-m", model, "--threads", 2), 2, "not for", "model collect"
    )
    assert_error(call("predict", tmp_path / "none.onnx", "-m", model), 2, "none.onnx")
    document = json.loads(model.read_text())
    model.write_text(json.dumps({**document, "features": 99}))
    assert_error(call("predict", network, "-m", model), 2, "other features; train it again")
    model.write_text(json.dumps(document)[:-100])
    assert_error(call("predict", network, "-m", model), 2, "no latency model, or a torn one")


@pytest.mark.usefixtures("host")
def test_explain(model: Path, network: Path) -> None:
    assert call_json("explain", "-m", model)["records"] == 200
    found = call_json("explain", "-m", model, "--network", network)
    assert {*found} == {"conv", "fc"}
    result = call("explain", "-m", model, "--network", network, "--layer", "conv")
    assert result.exit_code == 0 and result.stdout.startswith("conv: ") and " x" in result.stdout
    asked = ("explain", "-m", model, "--network", network, "--layer", "nobody")
    assert_error(call(*asked), 2, "no layer is called nobody", "topiarist inspect")
    assert_error(call("explain", "-m", model, "--layer", "conv"), 2, "--network MODEL.onnx")
    assert_error(call("explain"), 2, "there is no latency model")


class Invented:
    """Every kernel takes 20 us; the user stops at the third batch, or never."""

    def __init__(self, stops: bool) -> None:
        self.stops = stops
        self.batches = 0

    def __call__(self, worker: Worker, layer: Layer, variants: list[Variant]) -> Batch:
        self.batches += 1
        if self.stops and self.batches > 2:
            raise KeyboardInterrupt
        return Batch((Outcome((2e-5,) * 3),) * len(variants), (1e-5,) * 3)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(trial: Any, programs: list[Any]) -> tuple[list[Any], float]:
        return [np.full(len(program.calls), 1e-6) for program in programs], 1e-6

    monkeypatch.setattr(collecting.Trial, "compare_watched", compare)


@pytest.mark.usefixtures("still")
def test_collect(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Invented(stops=False)
    monkeypatch.setattr(Worker, "measure", lambda *args: measure(*args))
    log = tmp_path / "new.jsonl"
    document = call_json("collect", network, "--budget", "1s", "--log", log)
    assert document["log"] == str(log) and document["seconds"] >= 1
    assert document["records"] == sum(1 for _ in TuningLog(log).read()) > 0
    result = call("collect", network, "--budget", "0.2s")
    assert result.exit_code == 0, result.output
    assert f"the log is {tmp_path / 'user' / 'x86.jsonl'}" in result.stdout


@pytest.mark.usefixtures("still")
def test_an_interrupt_keeps_what_was_measured(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Invented(stops=True)
    monkeypatch.setattr(Worker, "measure", lambda *args: measure(*args))
    log = tmp_path / "new.jsonl"
    result = call("collect", network, "--budget", "10m", "--log", log)
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr == f"what was measured is in {log}\ninterrupted\n"
    assert len(list(TuningLog(log).read())) == 2 * collecting.BATCH


def test_collect_what_can_not_be(network: Path, tmp_path: Path) -> None:
    for budget in ("soon", "0s", "-1m", "10"):
        assert_error(call("collect", f"--budget={budget}"), 2, "90s, 10m or 1h")
    assert_error(call("collect", tmp_path / "none.onnx", "--budget", "1s"), 2, "none.onnx")
    assert_error(call("collect", "--target", "arm-neon", "--budget", "1s"), 2, "arm-neon")
    assert call("collect", "--threads", "0").exit_code == 2
    (tmp_path / "broken.jsonl").write_text("text\n")
    asked = ("collect", network, "--budget", "1s", "--log", tmp_path / "broken.jsonl")
    assert_error(call(*asked), 4, "no tuning log")
