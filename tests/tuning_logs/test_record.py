"""Records: what they hold, refuse, and are found by."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest

from topiarist.errors import NewerLogError, TuningLogError
from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernel import ConvViews
from topiarist.schedules.kernels import conv_kernel
from topiarist.schedules.layout import LaneLayout, View, make_grid, whole
from topiarist.targets import registry
from topiarist.targets.gpu_state import GpuState
from topiarist.tuning_logs.index import _LINE
from topiarist.tuning_logs.record import (
    MESSAGE_LIMIT,
    MeasureInput,
    TargetKey,
    TuningRecord,
    now,
    target_key,
)

VERSIONS = {"topiarist": "0.1.0", "apache-tvm": "0.27.0", "apache-tvm-ffi": "0.1.14"}


def test_a_line_gives_the_record_back(record):
    for made in (record(), record(status="timeout", message="2 s\nwere not enough")):
        line = made.to_line()
        assert "\n" not in line and line.isascii()
        assert list(json.loads(line)) == sorted(json.loads(line))
        again = TuningRecord.from_line(line)
        assert (again, again.id, again.to_line()) == (made, made.id, line)
        assert TuningRecord.from_line(line.encode()) == made
        assert pickle.loads(pickle.dumps(made)) == made
        assert hash(again) == hash(made)


def test_the_line_is_readable(record):
    values = json.loads(record(3).to_line())
    assert values["schema"] == 2
    assert values["workload"]["kernel"] == [3, 3]
    assert values["config"]["cols"] == 3
    assert values["target"]["device_model"] == "Some CPU @ 2.10GHz"
    assert len(values["seconds"]) == 7


def test_the_key_of_a_workload_is_its_own(record, workload):
    assert record().input.workload_key == workload().key


@pytest.mark.parametrize(
    "change",
    [
        {"size": 7},
        {"kernel": "block_sparse"},
        {"kernel_version": 2},
        {"config": {}},
        {"input_layout": "plain"},
        {"output_layout": "plain"},
        {"residual_layout": "in place"},
        {"family": "arm"},
        {"isa": "avx512"},
        {"lanes": 16},
        {"device_model": "Another CPU"},
        {"threads": 2},
        {"cores": "cortex-a76 4-7"},
        {"versions": {**VERSIONS, "apache-tvm": "0.27.1"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_all_that_the_time_depends_on_changes_the_measurement_key(record, change):
    assert record(**change).measurement_key != record().measurement_key


def test_the_outcome_changes_the_id_only(record):
    first = record()
    others = [
        record(us=90.0),
        record(timestamp="2026-01-31T12:00:01Z"),
        record(measured="in network"),
        record(status="wrong_result", message="off by 2"),
        record(drift=1.5),
        record(reference_us=5.0),
        record(versions={**VERSIONS, "topiarist": "0.2.0"}),
    ]
    assert {other.measurement_key for other in others} == {first.measurement_key}
    assert len({first.id, *(other.id for other in others)}) == 8


def test_keys_are_those_of_logs_already_written(record):
    made = record()
    assert (made.input.workload_key, made.measurement_key, made.id) == (
        "b0e39564251d9606",
        "e3abad117aebc6b9",
        "217457ba27b41dd7",
    )


def test_run_us_is_the_first_quartile(record):
    seconds = (5e-6, 1e-6, 2e-6, 9e-6, 4e-6, 3e-6)
    for n in range(1, len(seconds) + 1):
        quartile = np.quantile(seconds[:n], 0.25) * 1e6
        assert record(seconds=seconds[:n]).run_us == pytest.approx(quartile)
    assert record(status="build_error", message="no").run_us == float("inf")


def test_target_key():
    spec = replace(registry.get("x86-avx2"), device_model="Fast(R)  CPU / 3 @ 2GHz")
    assert target_key(spec, 2) == "x86/avx2/8/Fast(R) CPU / 3 @ 2GHz/2 threads"
    assert target_key(replace(spec, device_model=" "), 1) == "x86/avx2/8/unknown/1 thread"
    board = TargetKey("arm", "neon", 4, "Some Board", 4, "cortex-a76 4-7")
    assert str(board) == "arm/neon/4/Some Board/4 threads/cortex-a76 4-7"


def test_a_convolution(workload):
    layout = LaneLayout(64, make_grid(14, 14, 2, 4), (1, 1, 1, 1))
    wide = replace(layout, channels=256)
    views = ConvViews(View(wide, 128, 64), whole(layout), in_place=True)
    kernel, config = conv_kernel("direct_sparse"), DirectConfig(1, 4, 1, 32)
    target = TargetKey.of(registry.get("x86-avx2"), 1)
    what = MeasureInput.of_conv(workload(), kernel, config, views, target, VERSIONS)
    assert what.workload_key == workload().key
    assert what.layouts == (
        "lanes(14x14@2x4:7x4 halo(1, 1, 1, 1)) channels 64 of 256",
        "lanes(14x14@2x4:7x4 halo(1, 1, 1, 1)) channels 64 of 64",
        "in place",
    )
    assert what.config == asdict(config)
    residual = ConvViews(views.x, views.y, whole(layout))
    with_residual = MeasureInput.of_conv(workload(), kernel, config, residual, target, VERSIONS)
    assert with_residual.residual_layout == what.output_layout
    assert with_residual.key != what.key
    assert TuningRecord.from_line(TuningRecord(what, (1e-4,)).to_line()).input == what


def test_a_long_message_keeps_its_end(record):
    made = record(status="build_error", message="x" * 5000 + "\udc80 the cause")
    assert len(made.message) == MESSAGE_LIMIT and made.message.endswith("? the cause")
    assert TuningRecord.from_line(made.to_line()) == made


def test_now_is_a_timestamp(record):
    record(timestamp=now())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("workload", {}),
        ("workload", [1]),
        ("workload", {"a": float("nan")}),
        ("workload", {"a": float("inf")}),
        ("workload", {"a": 10**30}),
        ("workload", {"a": np.float32(1)}),
        ("workload", {1: 2}),
        ("config", None),
        ("config", {"a": [[[[[[[1]]]]]]]}),
        ("config", {"a": object()}),
        ("kernel", ""),
        ("kernel", "two\nlines"),
        ("kernel", "x" * 501),
        ("kernel_version", True),
        ("kernel_version", 0),
        ("input_layout", 3),
        ("residual_layout", None),
        ("lanes", 0),
        ("lanes", 8.0),
        ("threads", 10**400),
        ("device_model", "\ud800"),
        ("versions", {"apache-tvm": "0.27"}),
        ("versions", {**VERSIONS, "apache-tvm": 27}),
        ("seconds", ()),
        ("seconds", "1.0"),
        ("seconds", (0.0,)),
        ("seconds", (-1.0,)),
        ("seconds", (float("nan"),)),
        ("seconds", (float("inf"),)),
        ("seconds", (10**400,)),
        ("seconds", (True,)),
        ("measured", "somewhere"),
        ("measured", ["alone"]),
        ("status", "fine"),
        ("message", "all well"),
        ("message", None),
        ("timestamp", "2026-01-31 12:00:00"),
        ("timestamp", "2026-02-31T12:00:00Z"),
        ("timestamp", "2026-01-31T12:00:00+01:00"),
        ("timestamp", 5),
        ("drift", 0.9),
        ("drift", float("nan")),
        ("drift", "1.0"),
        ("drift", True),
        ("reference_us", 0.0),
        ("reference_us", -5.0),
        ("reference_us", float("nan")),
        ("reference_us", float("inf")),
        ("reference_us", "5.0"),
        ("reference_us", True),
    ],
)
def test_a_wrong_value_is_refused_by_name(record, field, value):
    name = "version" if field == "versions" else field
    with pytest.raises(ValueError, match=name) as caught:
        record(**{field: value})
    assert len(str(caught.value)) < 300


def test_a_failure_needs_a_message(record):
    with pytest.raises(ValueError, match="message"):
        record(status="timeout")


WRONG_LINES = {
    "empty": "",
    "text": "hello",
    "number": "3",
    "list": "[]",
    "null": "null",
    "cut": '{"schema": 1',
    "two values": "{} {}",
    "nested lists": "[" * 60_000,
    "nested objects": '{"a":' * 10_000,
    "huge integer": '{"schema": ' + "9" * 5000 + "}",
    "no schema": "{}",
    "schema true": '{"schema": true}',
    "schema text": '{"schema": "1"}',
    "schema zero": '{"schema": 0}',
    "not a number": '{"schema": NaN}',
    "infinity": '{"schema": -Infinity}',
    "twice": '{"schema": 1, "schema": 1}',
    "missing": '{"schema": 1}',
    "mark": "\ufeff{}",
    "latin": b'{"schema": "\xe9"}',
    "zeros": b"\0" * 100,
}


@pytest.mark.parametrize("line", WRONG_LINES.values(), ids=WRONG_LINES.keys())
def test_a_wrong_line_is_refused(line):
    with pytest.raises(TuningLogError) as caught:
        TuningRecord.from_line(line)
    assert len(str(caught.value)) < 400


JUNK = (None, True, -1, 0, 1.5, 1e308, 10**300, "", "x", "\ud800", [], [[]], {}, {"a": {}})


def _places(values):
    yield from ((values, name) for name in values)
    yield from ((values["target"], name) for name in values["target"])
    yield from ((values["versions"], name) for name in values["versions"])
    yield values["seconds"], 0


def test_junk_in_any_field_is_refused_or_harmless(record):
    line = record().to_line()
    refused = 0
    for at in range(sum(1 for _ in _places(json.loads(line)))):
        for junk in JUNK:
            values = json.loads(line)
            holder, name = list(_places(values))[at]
            holder[name] = junk
            try:
                made = TuningRecord.from_line(json.dumps(values))
            except TuningLogError:
                refused += 1
            else:
                assert TuningRecord.from_line(made.to_line()) == made
    assert refused > 300


def test_every_field_is_needed_and_no_other(record):
    values = json.loads(record().to_line())
    for holder in (values, values["target"]):
        for name in list(holder):
            kept = holder.pop(name)
            with pytest.raises(TuningLogError, match=name):
                TuningRecord.from_line(json.dumps(values))
            holder[name] = kept
        holder["colour"] = 1
        with pytest.raises(TuningLogError, match="colour"):
            TuningRecord.from_line(json.dumps(values))
        del holder["colour"]
    TuningRecord.from_line(json.dumps(values))


def test_an_altered_workload_no_longer_has_its_key(record):
    line = record().to_line()
    with pytest.raises(TuningLogError, match="workload_key"):
        TuningRecord.from_line(line.replace('"height":14', '"height":15'))


def test_a_newer_schema_asks_for_an_upgrade(record):
    line = record().to_line().replace('"schema":2', '"schema":6,"more":[]')
    with pytest.raises(NewerLogError, match=r"schema 6 is newer .* upgrade topiarist"):
        TuningRecord.from_line(line)


def test_only_lines_with_cores_have_schema_3(record):
    """So that older versions read all others, and logs stay as they are byte for byte."""
    plain, board = record(), record(cores="cortex-a76 4-7")
    assert '"schema":2' in plain.to_line() and "cores" not in plain.to_line()
    assert '"schema":3' in board.to_line() and TuningRecord.from_line(board.to_line()) == board
    with pytest.raises(TuningLogError, match="unknown field 'cores'"):
        TuningRecord.from_line(board.to_line().replace('"schema":3', '"schema":2'))
    with pytest.raises(TuningLogError, match="lacks cores"):
        TuningRecord.from_line(plain.to_line().replace('"schema":2', '"schema":3'))
    with pytest.raises(TuningLogError, match="cores is ''"):
        TuningRecord.from_line(board.to_line().replace("cortex-a76 4-7", ""))


def test_only_lines_of_gpus_have_schema_4(record):
    """What the GPU ran with is part of the outcome; nobody has to tell any of it."""
    plain, seen = record(), GpuState(1980, 2619, "580.65.06", "13.0")
    for state in (seen, GpuState(), GpuState(cuda="13.0")):
        made = record(gpu=state)
        line = made.to_line()
        assert '"schema":4' in line and TuningRecord.from_line(line) == made
        assert _LINE.fullmatch(line.encode())  # found without being read
        assert made.measurement_key == plain.measurement_key and made.id != plain.id
    with pytest.raises(TuningLogError, match="unknown field 'gpu'"):
        TuningRecord.from_line(line.replace('"schema":4', '"schema":2'))
    with pytest.raises(TuningLogError, match="lacks gpu"):
        TuningRecord.from_line(plain.to_line().replace('"schema":2', '"schema":4'))
    for old, new, why in (
        ('"driver":null', '"driver":""', "gpu.driver"),
        ('"sm_mhz":null', '"sm_mhz":-1', "gpu.sm_mhz"),
        ('"sm_mhz":null', '"mhz":1', "unknown field 'mhz'|lacks sm_mhz"),
    ):
        with pytest.raises(TuningLogError, match=why):
            TuningRecord.from_line(line.replace(old, new))
    with pytest.raises(ValueError, match="does not go with cores"):
        record(gpu=seen, cores="cortex-a76 4-7")


def test_only_lines_that_say_how_fast_the_machine_was_have_schema_5(record):
    """Of boards and GPUs too; a line of an older schema has no such field, a newer one needs it."""
    boards, gpus = {"cores": "cortex-a76 4-7"}, {"gpu": GpuState(1980, 2619, "580.65.06", "13.0")}
    for change in ({}, boards, gpus):
        plain, made = record(**change), record(reference_us=4.625, **change)
        line = made.to_line()
        assert '"schema":5' in line and TuningRecord.from_line(line) == made
        assert made.to_line() == TuningRecord.from_line(line).to_line()
        assert _LINE.fullmatch(line.encode())  # found without being read
        old = json.loads(plain.to_line())["schema"]
        with pytest.raises(TuningLogError, match="unknown field 'reference_us'"):
            TuningRecord.from_line(line.replace('"schema":5', f'"schema":{old}'))
        with pytest.raises(TuningLogError, match="lacks reference_us"):
            TuningRecord.from_line(plain.to_line().replace(f'"schema":{old}', '"schema":5'))
        for value in ("null", "0", "-1.5", '"5"', "[]", "1e999"):
            with pytest.raises(TuningLogError, match="reference_us is"):
                TuningRecord.from_line(line.replace("4.625", value))


def test_a_line_of_schema_1_says_nothing_of_drift(record):
    line = record().to_line().replace('"drift":null,', "").replace('"schema":2', '"schema":1')
    assert TuningRecord.from_line(line) == record()
    with pytest.raises(TuningLogError, match="unknown field 'drift'"):
        TuningRecord.from_line(record().to_line().replace('"schema":2', '"schema":1'))
    with pytest.raises(TuningLogError, match="lacks drift"):
        TuningRecord.from_line(record().to_line().replace('"drift":null,', ""))


def test_drift_tells_a_disturbed_measurement(record):
    assert not record().disturbed
    assert not record(drift=1).disturbed
    assert record(drift=1.5).disturbed
    assert TuningRecord.from_line(record(drift=1.5).to_line()) == record(drift=1.5)
