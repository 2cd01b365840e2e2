"""The latency model in use: its logs, its file, and what a network would take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.models import Net
from topiarist.compiler import latency
from topiarist.compiler.latency import (
    card_of,
    default_model,
    evaluate_unseen,
    evaluations,
    explain_network,
    open_model,
    open_source,
    predict_network,
    read_logs,
    users_predictor,
)
from topiarist.compiler.prices import Analytic, Learned
from topiarist.compiler.recorded import Device, is_current
from topiarist.errors import CostModelError, MissingRecordsError, ModelError, TuningLogError
from topiarist.pruning.one_shot import prune_model
from topiarist.schedules.kernels import conv_kernel
from topiarist.schedules.workload import ConvWorkload, SparsitySignature
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs import cost_model
from topiarist.tuning_logs.cost_model import Dataset, LatencyModel
from topiarist.tuning_logs.record import MeasureInput, TuningRecord
from topiarist.tuning_logs.store import TuningLog

HOST = registry.get("host")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few trees: what is looked at is not how good they are."""
    for name in cost_model.ROUNDS:
        monkeypatch.setitem(cost_model.ROUNDS, name, 5)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(latency, "user_folder", lambda: tmp_path / "user")
    (tmp_path / "user").mkdir()
    yield


def make_record(number: int, threads: int = 1, channels: int = 16, **changes: Any) -> TuningRecord:
    """Of today's kernels on this machine, invented: more nonzeros take longer."""
    device = Device.here(HOST, threads)
    kernel = conv_kernel("direct_sparse" if number % 2 else "direct_dense")
    density = round(0.01 + number % 40 / 100, 2)
    sparsity = SparsitySignature(density, "unstructured", (1, 2, 3))
    workload = ConvWorkload(
        *(1, channels, 8, 8, 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, sparsity)
    )
    layout = f"lanes(8x8@2x4:4x2 halo(1, 1, 1, 1)) channels {channels} of {channels}"
    what = MeasureInput(
        workload=workload.to_json(),
        kernel=kernel.name,
        kernel_version=kernel.version,
        config={"rows": 1, "cols": 1 + number // 40, "out_block": 1, "in_block": 16},
        input_layout=layout,
        output_layout="lanes(8x8@2x4:4x2 tile1x2) channels 16 of 16",
        residual_layout="none",
        target=changes.pop("target", device.key),
        versions=changes.pop("versions", device.versions),
    )
    changes = {name: changes[name] for name in changes}
    if "kernel_version" in changes:
        what = replace(what, kernel_version=changes.pop("kernel_version"))
    us = 10 + 50 * density if kernel.sparse else 30.0
    return TuningRecord(what, (us * 1e-6,), **changes)


def make_log(path: Path, *records: TuningRecord) -> Path:
    TuningLog(path).append(records)
    return path


@pytest.fixture
def model(tmp_path: Path) -> LatencyModel:
    return LatencyModel.train(Dataset.of([make_record(i) for i in range(200)]))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution of 10 % nonzeros and a dense fully connected layer."""
    net = Net()
    x = net.conv(net.input(1, 16, 8, 8), 32, 16, name="conv")
    x = net.node("Flatten", net.node("GlobalAveragePool", net.node("Relu", x)))
    x = net.node("Gemm", x, net.weight(10, 32), net.weight(10), name="fc", transB=1)
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    pruned, _ = prune_model(net.model(x), density=0.1, layer_density={"conv": 0.1, "fc": 1.0})
    onnx.save(pruned, path)
    return path


@pytest.fixture
def stated() -> TargetSpec:
    """This machine, with its roofline stated: nothing is measured."""
    return replace(HOST, peak_gflops=200.0, bandwidth_gbs=20.0)


def test_logs_are_read_with_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    make_log(folder / "a.jsonl", *[make_record(i) for i in range(3)])
    make_log(folder / "b.jsonl", make_record(2), make_record(3))
    found = read_logs([folder])
    assert found.groups.tolist() == ["a", "a", "a", "b"]  # what both have belongs to the first
    assert len(found.data) == 4 and found.notes == ()
    twice = read_logs([folder / "a.jsonl", folder / "a.jsonl"])
    assert len(twice.data) == 3


def test_logs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name / "x86.jsonl" for name in "ab"]
    for i, path in enumerate(paths):
        make_log(path, make_record(i))
    assert read_logs(paths).groups.tolist() == [str(path) for path in paths]


def test_old_and_broken_lines_are_left_out_and_named(tmp_path: Path) -> None:
    device = Device.here(HOST, 1)
    log = make_log(
        tmp_path / "log.jsonl",
        make_record(1),
        make_record(2, kernel_version=99),
        make_record(3, versions={**device.versions, "apache-tvm": "0.1"}),
    )
    with log.open("a") as file:
        file.write("garbage\n")
    found = read_logs([log])
    assert len(found.data) == 1
    assert found.notes[0].startswith(f"skipped {log}, line 4")
    assert found.notes[1] == "left out 2 records of other versions of TVM or of kernels"


def test_only_one_target_if_it_is_asked_for(tmp_path: Path) -> None:
    key = Device.here(HOST, 1).key
    other = replace(key, isa="avx2", lanes=8 if key.lanes != 8 else 4)
    log = make_log(
        tmp_path / "log.jsonl",
        *(make_record(1), make_record(2, threads=2), make_record(3, target=other)),
    )
    assert len(read_logs([log]).data) == 3
    assert len(read_logs([log], threads=2).data) == 1
    assert len(read_logs([log], HOST).data) == 2
    assert len(read_logs([log], HOST, 1).data) == 1
    with pytest.raises(MissingRecordsError, match="no usable record"):
        read_logs([log], threads=7)


def test_missing_empty_and_broken_logs(tmp_path: Path) -> None:
    with pytest.raises(MissingRecordsError, match=r"no tuning log .*none\.jsonl"):
        read_logs([tmp_path / "none.jsonl"])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "empty.jsonl", tmp_path / "folder"):
        with pytest.raises(MissingRecordsError, match=r"no usable record\. `topiarist model coll"):
            read_logs([path])
    (tmp_path / "text.jsonl").write_text("text\n")
    with pytest.raises(TuningLogError, match="no tuning log"):
        read_logs([tmp_path / "text.jsonl"])
    failed = TuningRecord(make_record(1).input, status="crash", message="died")
    with pytest.raises(MissingRecordsError):
        read_logs([make_log(tmp_path / "failed.jsonl", failed)])


def test_records_of_other_work_are_current_by_their_version() -> None:
    what = make_record(1).input
    assert is_current(what)
    pool = replace(what, kernel="avg_pool", kernel_version=1)
    assert is_current(pool) and not is_current(replace(pool, kernel_version=2))


def test_evaluations_hold_out_a_part_and_each_log() -> None:
    data = Dataset.of(
        [*(make_record(i) for i in range(200)), *(make_record(i, channels=8) for i in range(150))]
    )
    groups = np.array(["a"] * 200 + ["b"] * 150)
    assert {*evaluations(data, groups)} == {"a fifth", "a", "b"}
    assert {*evaluations(data, np.array(["a"] * len(data)))} == {"a fifth"}
    few = data.where(np.arange(len(data)) < 110)
    assert evaluations(few, groups[:110]) == {}


def test_the_card_says_what_a_model_is_made_of() -> None:
    data = Dataset.of([make_record(i) for i in range(120)])
    groups = np.array(["a"] * 120)
    card = card_of(data, groups, evaluations(data, groups))
    assert (card["records"], card["in network"], card["logs"]) == (120, 0, {"a": 120})
    assert {*card["versions"]} >= {"topiarist", "apache-tvm"}
    assert card["roofline"]["alpha"] >= 1
    with_errors = card_of(data, groups, {"x": evaluate_unseen(*_half(data))})
    assert {*with_errors["errors"]["x"]["alone"]} >= {"model", "flops", "nearest", "covered"}


def _half(data: Dataset) -> tuple[LatencyModel, Dataset]:
    return LatencyModel.train(data.where(np.arange(len(data)) < 110)), data


def test_only_what_was_not_trained_on_is_evaluated(model: LatencyModel) -> None:
    seen = [make_record(i) for i in range(200)]
    new = [make_record(i, channels=24) for i in range(30)]
    (found,) = evaluate_unseen(model, Dataset.of([*seen, *new])).values()
    assert found.model.records == 30
    with pytest.raises(CostModelError, match="trained on all of these records; give it others"):
        evaluate_unseen(model, Dataset.of(seen))
    elsewhere = [make_record(i, threads=2) for i in range(5)]
    (found,) = evaluate_unseen(model, Dataset.of([*new, *elsewhere])).values()
    assert found.model.records == 30
    with pytest.raises(CostModelError, match=r"not for .*2 threads"):
        evaluate_unseen(model, Dataset.of(elsewhere))


def test_the_user_has_a_model_for_each_target(tmp_path: Path, model: LatencyModel) -> None:
    one, two = (Device.here(HOST, threads).key for threads in (1, 2))
    assert default_model(one).parent == tmp_path / "user"
    assert default_model(one) != default_model(two)
    with pytest.raises(CostModelError, match="no latency model"):
        open_model(None, one)
    model.save(default_model(one))
    assert open_model(None, one).covers == model.covers
    model.save(tmp_path / "named.json")
    assert open_model(tmp_path / "named.json", two).covers == model.covers


def test_what_prices_layers(tmp_path: Path, model: LatencyModel, stated: TargetSpec) -> None:
    source = open_source(stated, 1, None)
    assert isinstance(source.pricer, Analytic) and "analytic formula" in source.name
    assert source.pricer.roofline.dense_gflops == pytest.approx(150.0)
    model.save(tmp_path / "named.json")
    source = open_source(stated, 1, tmp_path / "named.json")
    assert isinstance(source.pricer, Learned) and "named.json" in source.name
    with pytest.raises(CostModelError, match=r"not for .*2 threads"):
        open_source(stated, 2, tmp_path / "named.json")
    model.save(default_model(Device.here(HOST, 1).key))
    assert isinstance(open_source(stated, 1, None).pricer, Learned)
    assert isinstance(open_source(stated, 2, None).pricer, Analytic)
    with pytest.raises(CostModelError, match="no latency model"):
        open_source(stated, 1, tmp_path / "none.json")


def test_a_broken_model_of_the_user_is_named(stated: TargetSpec) -> None:
    default_model(Device.here(HOST, 1).key).write_text("{")
    with pytest.raises(CostModelError, match=r"latency\.json is no latency model"):
        open_source(stated, 1, None)


def test_a_target_that_this_machine_can_not_run(
    stated: TargetSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "runs_here", lambda spec: "it lacks something")
    foreign = replace(stated, peak_gflops=None)
    with pytest.raises(CostModelError, match=r"Measure on the device.*name the model"):
        open_source(foreign, 1, None)
    assert isinstance(open_source(stated, 1, None).pricer, Analytic)


def test_the_formula_predicts_a_network(network: Path, stated: TargetSpec) -> None:
    found = predict_network(network, stated)
    conv, fc = found.layers
    assert (conv.layer, conv.pattern, fc.pattern) == ("conv", "unstructured", "-")
    assert conv.density == pytest.approx(0.1, abs=0.01) and fc.density == 1.0
    assert conv.price.sparse_us is not None and fc.price.sparse_us is None
    assert found.total_us == sum(layer.price.run_us for layer in found.layers)
    assert found.total_us <= found.dense_us
    document = found.to_json()
    assert document["layers"][0]["run_us"] == conv.price.run_us


def test_a_learned_model_predicts_and_explains_a_network(
    network: Path, stated: TargetSpec, model: LatencyModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.json"
    model.save(path)
    found = predict_network(network, stated, 1, path)
    assert all(layer.price.run_us > 0 for layer in found.layers)
    factors = explain_network(network, stated, 1, path, "conv", 3)
    assert {*factors} == {"conv"} and len(factors["conv"]) == 3
    assert {*explain_network(network, stated, 1, path, None, 3)} == {"conv", "fc"}
    with pytest.raises(ModelError, match="no layer is called nobody; `topiarist inspect`"):
        explain_network(network, stated, 1, path, "nobody", 3)


def test_the_users_model_stands_in_for_the_clock(model: LatencyModel) -> None:
    assert users_predictor(HOST, 1) is None
    file = default_model(Device.here(HOST, 1).key)
    model.save(file)
    predictor = users_predictor(HOST, 1)
    assert predictor is not None and predictor.device.key == model.covers.target
    assert predictor.run_us([]) == []
    assert all(us > 0 for us in predictor.run_us([make_record(i).input for i in range(3)]))


def test_a_model_of_another_device_or_version_does_not(model: LatencyModel) -> None:
    model.save(default_model(Device.here(HOST, 1).key))
    assert users_predictor(replace(HOST, device_model="Another CPU"), 1) is None
    for stale in ({"tvm": "0.1"}, {"kernels": {"direct_sparse": 0}}):
        changed = LatencyModel.train(Dataset.of([make_record(i) for i in range(200)]))
        changed.covers = replace(changed.covers, **stale)
        changed.save(default_model(Device.here(HOST, 1).key))
        assert users_predictor(HOST, 1) is None


def test_a_board_is_priced_by_what_its_profile_states() -> None:
    """Not by this machine's model, and not by its roofline."""
    rpi4 = registry.get("rpi4")
    source = open_source(rpi4, 1, None)
    assert isinstance(source.pricer, Analytic)
    assert source.pricer.roofline.bandwidth_gbs == rpi4.bandwidth_gbs
