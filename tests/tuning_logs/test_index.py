"""What answers for a layer: the same measurement, a similar one, another TVM's or device's."""

from __future__ import annotations

import json

import pytest

from topiarist.schedules.cpu.direct import DirectConfig
from topiarist.schedules.kernel import ConvViews
from topiarist.schedules.kernels import conv_kernel
from topiarist.schedules.layout import LaneLayout, make_grid, whole
from topiarist.tuning_logs.index import Index, Site
from topiarist.tuning_logs.record import MeasureInput, TuningRecord
from topiarist.tuning_logs.store import TuningLog

VERSIONS = {"topiarist": "0.1.0", "apache-tvm": "0.27.0", "apache-tvm-ffi": "0.1.14"}
OTHER_TVM = {**VERSIONS, "apache-tvm": "0.27.1"}


@pytest.fixture
def log(tmp_path):
    return TuningLog(tmp_path / "x86.jsonl")


@pytest.fixture
def sparse(record, workload):
    """A record of a layer with a density, a pattern and quantiles of its own."""

    def make(density=0.1, number=0, pattern="unstructured", quantiles=(10, 29, 40), **changes):
        values = workload(changes.pop("size", 14)).to_json()
        values["sparsity"] = {
            "density": density,
            "pattern": pattern,
            "row_quantiles": quantiles,
        }
        return record(number, workload=values, **changes)

    return make


def test_the_same_measurement_is_exact(log, sparse):
    log.append([sparse(0.11), sparse(0.1), sparse(0.09)])
    match = log.find(sparse(0.1).input)
    assert match.record == sparse(0.1)
    assert (match.level, match.density_gap, str(match)) == ("exact", 0, "exact")


@pytest.mark.parametrize(
    ("density", "level"),
    [(0.1, "near"), (0.115, "near"), (0.12, "near"), (0.08, "near"), (0.121, None), (0.079, None)],
)
def test_within_two_points_a_density_is_near(log, sparse, density, level):
    log.append([sparse(density, quantiles=(9, 28, 39))])
    match = log.find(sparse(0.1).input)
    assert (None if match is None else match.level) == level
    if match:
        assert match.density_gap == pytest.approx(abs(density - 0.1))
        assert str(match) == f"near (density {density})"
    assert log.find(sparse(0.1).input, loosest="exact") is None


def test_the_nearest_density_answers(log, sparse):
    log.append([sparse(0.12), sparse(0.109), sparse(0.085)])
    assert log.find(sparse(0.1).input).record == sparse(0.109)


@pytest.mark.parametrize(
    "change",
    [
        {"pattern": "block4x1"},
        {"size": 7},
        {"number": 1},
        {"kernel": "block_sparse"},
        {"kernel_version": 2},
        {"input_layout": "plain"},
        {"output_layout": "plain"},
        {"residual_layout": "in place"},
        {"family": "arm"},
        {"isa": "avx512"},
        {"lanes": 16},
        {"threads": 2},
        {"measured": "in network"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_never_answers(log, sparse, change):
    log.append([sparse(**change)])
    assert log.find(sparse().input, loosest="other device") is None


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({"versions": OTHER_TVM}, "other TVM", "other TVM (0.27.1)"),
        ({"device_model": "Another CPU"}, "other device", "other device (Another CPU)"),
        ({"device_model": "A", "versions": OTHER_TVM}, "other device", "other device (A)"),
        ({"cores": "big 4-7"}, "other device", "other device (Some CPU @ 2.10GHz big 4-7)"),
    ],
)
def test_another_tvm_or_device_answers_where_that_is_enough(log, sparse, change, level, text):
    log.append([sparse(0.11, **change)])
    assert log.find(sparse().input) is None
    match = log.find(sparse().input, loosest="other device")
    assert (match.level, str(match)) == (level, text)
    if level == "other device":
        assert log.find(sparse().input, loosest="other TVM") is None
    log.append([sparse(0.12)])
    assert log.find(sparse().input, loosest="other device").level == "near"


def test_another_version_of_topiarist_or_of_the_ffi_is_no_difference(log, sparse):
    versions = {**VERSIONS, "topiarist": "9", "apache-tvm-ffi": "9"}
    log.append([sparse(versions=versions)])
    assert log.find(sparse().input).level == "exact"


def test_the_best_are_of_one_workload(log, sparse):
    """Times at 9 % and at 10 % do not compare: fewer weights are faster on any kernel."""
    exact = [sparse(0.1, number=n, us=100.0 + n) for n in range(3)]
    near = [sparse(0.09, number=n, us=90.0 + n) for n in range(5)]
    log.append([*near, *reversed(exact)])
    site = Site.of(sparse(0.1).input)
    assert [m.record for m in log.best(site)] == exact
    assert [m.record for m in log.best(Site.of(sparse(0.085).input))] == near
    assert log.best(Site.of(sparse(0.085).input))[0].level == "near"
    assert log.best(Site.of(sparse(0.2).input)) == []


def test_where_the_closest_failed_the_next_answer(log, sparse):
    log.append([sparse(0.1, status="crash", message="signal 11"), sparse(0.11)])
    assert [m.record for m in log.best(Site.of(sparse(0.1).input))] == [sparse(0.11)]
    assert log.find(sparse(0.1).input).record.status == "crash"


def test_of_other_devices_one_with_this_tvm_is_closer(log, sparse):
    same, other = sparse(0.12, device_model="B"), sparse(device_model="A", versions=OTHER_TVM)
    log.append([other, same])
    assert log.find(sparse().input, loosest="other device").record == same
    assert log.best(Site.of(sparse().input), loosest="other device")[0].record == same


def test_of_other_devices_one_with_such_cores_is_closer(log, sparse):
    other = sparse(device_model="A", cores="cortex-a55 0-3")
    same = sparse(0.12, device_model="B", cores="cortex-a76 4-7", versions=OTHER_TVM)
    log.append([other, same])
    asked = sparse(device_model="a profile", cores="cortex-a76").input
    assert log.find(asked, loosest="other device").record == same
    assert log.best(Site.of(asked), loosest="other device")[0].record == same


@pytest.mark.parametrize(
    ("of", "asked", "level"),
    [
        ("cortex-a76 4-7", "cortex-a76", "exact"),  # a profile doesn't know the numbers
        ("", "cortex-a76", "exact"),  # tuned on the board itself
        ("cortex-a55 0-3", "cortex-a76", "other device"),
        ("cortex-a76 4-7", "cortex-a76 4-5", "other device"),
        ("cortex-a76 4-7", "", "other device"),
        ("", "cortex-a76 4-7", "other device"),
    ],
)
def test_cores(log, sparse, of, asked, level):
    log.append([sparse(cores=of)])
    assert log.find(sparse(cores=asked).input, loosest="other device").level == level


def test_what_is_not_usable_gives_way(log, sparse):
    """The closest records may be of an old version of the only kernel."""
    old = [sparse(number=n, kernel_version=1) for n in range(2)]
    near = sparse(0.11, kernel_version=2)
    log.append([*old, near])
    site = Site.of(near.input)
    assert [m.record for m in log.best(Site.of(old[0].input))] == old

    def is_new(record):
        return record.input.kernel_version == 2

    assert [m.record for m in log.best(Site.of(old[0].input), usable=is_new)] == [near]
    assert log.best(site, usable=lambda _: False) == []
    assert log.find(old[0].input, usable=is_new) is None


def test_a_workload_without_sparsity(log, record):
    log.append([record(workload={"kind": "other", "size": 3})])
    assert log.find(record(workload={"kind": "other", "size": 3}).input).level == "exact"
    assert log.find(record(workload={"kind": "other", "size": 4}).input) is None


STRANGE = [
    {},
    {"config": {}},
    {"config": {"a": {"b": [1, 2]}}},
    {"config": {"text": 'a "quoted" } brace, {and \\ more'}},
    {"device_model": 'CPU(R) "fast"\\ \u00ae } {'},
    {"drift": 1.25},
    {"drift": 1e5},
    {"cores": "cortex-a76 4-7"},
    {"status": "crash", "message": 'signal 11\n"workload":{},"workload_key":""}'},
    {"workload": {"sparsity": "none"}},
    {"workload": {"sparsity": {"density": 0.1}}},
    {"workload": {"a": {"workload_key": "0"}, "text": '"sparsity":{"density":0.3'}},
    {"seconds": (1e-7, 2.5e-5, 3.0)},
]


@pytest.mark.parametrize("change", STRANGE, ids=str)
def test_a_line_is_indexed_like_its_record(record, change):
    made = record(**change)
    raw = made.to_line().encode() + b"\n"
    by_record, by_line = Index(), Index()
    by_record.add_record(made, 7, len(raw), 3)
    assert len(by_record.of_candidate(made.input)) == 1
    if by_line.add_line(raw, 7, 3):
        assert by_line.of_candidate(made.input) == by_record.of_candidate(made.input)
    else:
        assert "{" in json.dumps(change.get("config"))  # the only ones that are read whole


@pytest.mark.parametrize("change", STRANGE, ids=str)
def test_strange_records_are_found(log, record, change):
    made = record(**change)
    log.append([made])
    assert log.find(made.input, made.measured).record == made


def test_edited_lines_are_found(log, record):
    made = record()
    log.path.write_text(json.dumps(json.loads(made.to_line())) + "\n")
    assert log.find(made.input).record == made


def test_the_site_of_a_convolution_is_that_of_its_candidates(log, record, workload):
    layout = LaneLayout(64, make_grid(14, 14, 2, 4), (1, 1, 1, 1))
    views = ConvViews(whole(layout), whole(layout), in_place=True)
    target = record().input.target
    kernel, config = conv_kernel("direct_sparse"), DirectConfig(1, 4, 1, 32)
    what = MeasureInput.of_conv(workload(), kernel, config, views, target, VERSIONS)
    log.append([TuningRecord(what, (1e-4,))])
    assert log.best(Site.of_conv(workload(), views, target, VERSIONS))[0].record.input == what
