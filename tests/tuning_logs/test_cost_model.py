"""The latency model on an invented machine: what it learns, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuning_logs.conftest import make_record
from tests.tuning_logs.invented import (
    NETWORK_FACTOR,
    candidate,
    make_what,
    records,
    true_us,
)
from topiarist.errors import CostModelError
from topiarist.tuning_logs import regressions
from topiarist.tuning_logs.boosters import Floats
from topiarist.tuning_logs.cost_model import LEAST, Covers, Dataset, LatencyModel, layer_of
from topiarist.tuning_logs.evaluate import flop_baseline, nearest_baseline
from topiarist.tuning_logs.features import features, table
from topiarist.tuning_logs.record import Measured, MeasureInput, TuningRecord

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset.of([*records(700), *records(400, seed=1, measured="in network")])


@pytest.fixture(scope="module")
def model(data: Dataset) -> LatencyModel:
    return LatencyModel.train(data, {"records": len(data)})


@pytest.fixture(scope="module")
def small() -> LatencyModel:
    """Of few trees: quick to write and to break."""
    with pytest.MonkeyPatch.context() as patch:
        for name in regressions.ROUNDS:
            patch.setitem(regressions.ROUNDS, name, 4)
        return LatencyModel.train(Dataset.of(records(150)), {"note": "few trees"})


@pytest.fixture
def saved(small: LatencyModel, tmp_path: Path) -> Path:
    small.save(tmp_path / "model.json")
    return tmp_path / "model.json"


def upper_us(model: LatencyModel, whats: Sequence[MeasureInput], measured: Measured) -> Floats:
    return model.expected_and_upper_us(whats, measured)[1]


def test_what_was_not_seen_is_predicted_far_better_than_by_baselines(
    data: Dataset, model: LatencyModel
) -> None:
    test = Dataset.of(records(300, seed=2, noise=False))
    alone = data.where(~data.in_network)

    def error(predicted: Any) -> float:
        return float(np.median(np.abs(predicted / test.run_us - 1)))

    own = error(model.predict_us(test.inputs, "alone"))
    assert own < 0.06
    assert error(nearest_baseline(alone)(test)) > 3 * own
    assert error(flop_baseline(alone)(test)) > 5 * own


def test_what_a_network_adds_is_learned_on_top(model: LatencyModel) -> None:
    whats = [candidate(np.random.default_rng(i)) for i in range(100)]
    ratio = model.predict_us(whats, "in network") / model.predict_us(whats, "alone")
    assert np.median(ratio) == pytest.approx(NETWORK_FACTOR, rel=0.03)
    truth = [true_us(what) * NETWORK_FACTOR for what in whats]
    errors = np.abs(model.predict_us(whats, "in network") / truth - 1)
    assert np.median(errors) < 0.07


@pytest.mark.parametrize("measured", ["alone", "in network"])
def test_nine_of_ten_times_are_below_the_upper_quantile(
    model: LatencyModel, measured: Measured
) -> None:
    """In both places, though times scatter four times as much in a network."""
    test = Dataset.of(records(400, seed=3, measured=measured))
    upper = upper_us(model, test.inputs, measured)
    assert 0.83 <= float((test.run_us <= upper).mean()) <= 0.97
    wide = upper_us(model, test.inputs, "in network") / model.predict_us(test.inputs, "in network")
    narrow = upper_us(model, test.inputs, "alone") / model.predict_us(test.inputs, "alone")
    assert np.median(wide) > np.median(narrow)


def test_dense_kernels_take_the_same_whatever_the_zeros(model: LatencyModel) -> None:
    dense = [make_what("direct_dense", density=density) for density in (0.02, 0.3, 1.0)]
    assert len({*model.predict_us(dense, "in network").tolist()}) == 1
    sparse = [make_what("direct_sparse", density=density) for density in (0.02, 0.2, 0.5)]
    assert np.all(np.diff(model.predict_us(sparse, "in network")) > 0)


def test_only_times_in_networks(model: LatencyModel) -> None:
    found = LatencyModel.train(Dataset.of(records(200, measured="in network")))
    what = make_what()
    assert found.predict_us([what], "alone") == found.predict_us([what], "in network")


def test_one_layer_alone_has_an_upper_quantile() -> None:
    random = np.random.default_rng(0)
    found = []
    for i in range(160):
        what = make_what(density=round(0.01 + 0.4 * float(random.random()), 3), cols=1 + i % 7)
        scatter = float(np.exp(random.normal(0, 0.05)))
        found.append(TuningRecord(what, (true_us(what) * scatter * 1e-6,)))
    data = Dataset.of(found)
    model = LatencyModel.train(data)
    expected = model.predict_us(data.inputs, "alone")
    assert np.median(upper_us(model, data.inputs, "alone") / expected) > 1.02


def test_training_is_deterministic(data: Dataset, tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    part = data.where(np.arange(len(data)) < 150)
    for path in paths:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(regressions.ROUNDS, "alone", 4)
            LatencyModel.train(part).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_contributions_multiply_to_the_correction(model: LatencyModel) -> None:
    what = make_what()
    factors = model.contributions(what, len(model.columns))
    sizes = [abs(np.log(factor)) for _, factor in factors]
    assert sizes == sorted(sizes, reverse=True)
    other = make_what(density=0.4)
    ratio = model.predict_us([other], "alone") / model.predict_us([what], "alone")
    rows = table([features(each) for each in (what, other)], model.columns)
    scale = np.divide(*model.learned.costs.predict_us(rows, model.columns)[::-1])
    found = np.prod([f for _, f in model.contributions(other, 999)]) / np.prod(
        [factor for _, factor in factors]
    )
    assert found * scale == pytest.approx(ratio[0], rel=1e-3)
    assert len(model.contributions(what, 3)) == 3


def test_disturbed_and_failed_records_are_left_out() -> None:
    sound = make_record(1)
    found = [
        sound,
        make_record(2, drift=1.5),
        make_record(3, status="crash", message="died"),
        make_record(4, kernel="network"),
        make_record(5, kernel="metaschedule"),
    ]
    assert Dataset.of(found).inputs == (sound.input,)


def test_times_are_brought_to_the_usual_pace() -> None:
    """Those of a disturbed machine too, if they say how slow it was."""
    found = [
        *(make_record(i, us=100.0, reference_us=5.0) for i in range(3)),
        make_record(3, us=150.0, reference_us=7.5, drift=1.5),
        make_record(4, us=100.0),
        make_record(5, us=300.0, reference_us=15.0, drift=3.0),
    ]
    assert Dataset.of(found).run_us.tolist() == pytest.approx([found[0].run_us] * 5)


def test_repeated_measurements_count_once() -> None:
    times = [make_record(1, us=us, timestamp=f"2026-01-0{us // 100}T00:00:00Z") for us in
             (100, 300, 200)]  # fmt: skip
    in_network = TuningRecord(times[0].input, (5e-4,), "in network")
    data = Dataset.of([*times, in_network])
    assert data.in_network.tolist() == [False, True]
    assert data.run_us.tolist() == pytest.approx([times[2].run_us, 500.0])
    assert len({*data.ids}) == 2


def test_parts_of_a_dataset(data: Dataset) -> None:
    half = np.arange(len(data)) % 2 == 0
    assert len(data.where(half)) + len(data.where(~half)) == len(data)
    assert data.where(~half).inputs[0] == data.inputs[1]
    assert len(data.where(half & ~half)) == 0


def test_layers_are_told_by_their_geometry() -> None:
    layer = layer_of(make_what())
    assert layer_of(make_what("direct_dense", density=0.3, cols=2)) == layer
    assert layer_of(make_what(inputs=32)) != layer
    linear = {"kind": "linear", "batch": 1, "inputs": 8, "outputs": 4, "activation": [None, None]}
    found = [
        layer_of(make_record(workload={**linear, **change}).input)
        for change in (
            {"sparsity": {"density": 0.1}},
            {"sparsity": {"density": 0.9}},
            {"outputs": 5},
        )
    ]
    assert found[0] == found[1] != found[2]


def test_too_few_records() -> None:
    for count in (0, LEAST - 1):
        with pytest.raises(CostModelError, match=rf"{count} usable records.*`topiarist model coll"):
            LatencyModel.train(Dataset.of(records(count)))


def test_few_records_adapt_the_model_of_another_target(model: LatencyModel) -> None:
    """A device three times as slow, with an instruction set that the model does not know."""

    def there(what: MeasureInput) -> MeasureInput:
        target = replace(what.target, isa="neon", family="arm", device_model="Board")
        return replace(what, target=target)

    found = [
        TuningRecord(there(record.input), tuple(3.0 * s for s in record.seconds))
        for record in records(30, seed=4)
    ]
    adapted = LatencyModel.train(Dataset.of(found), base=model)
    test = Dataset.of(records(200, seed=5, noise=False))
    whats = [there(what) for what in test.inputs]
    errors = np.abs(adapted.predict_us(whats, "alone") / (3.0 * test.run_us) - 1)
    assert np.median(errors) < 0.08
    assert adapted.covers.target.family == "arm"
    assert adapted.covers.kernels.keys() >= model.covers.kernels.keys()
    assert (upper_us(adapted, whats, "in network") > 0).all()
    with pytest.raises(CostModelError, match=r"19 usable records.* 20 are the least"):
        LatencyModel.train(Dataset.of(found[:19]), base=model)


def test_the_upper_quantile_holds_in_networks_that_were_left_out() -> None:
    """Networks that are slower than others as a whole: their bias counts, not just the scatter."""
    found, groups = [], []
    for i, factor in enumerate((0.8, 0.9, 1.0, 1.1, 1.25)):
        for record in records(120, seed=20 + i):
            found.append(TuningRecord(record.input, tuple(factor * s for s in record.seconds)))
            groups.append(f"net {i}")
    data = Dataset.of(found)
    model = LatencyModel.train(data, groups=np.array(groups[: len(data)]))
    unseen = Dataset.of(records(200, seed=30))
    times = unseen.run_us * 1.1
    assert float((times <= upper_us(model, unseen.inputs, "alone")).mean()) > 0.85


def test_records_that_do_not_go_together_are_named() -> None:
    what = make_what()
    with pytest.raises(CostModelError, match=r"targets x86/avx2/8/.*1 thread, .*2 threads.*choose"):
        Covers.of([what, make_what(threads=2)])
    with pytest.raises(CostModelError, match=r"kernels direct_sparse 1, direct_sparse 2\."):
        Covers.of([what, make_what(kernel_version=2)])
    newer = {**what.versions, "apache-tvm": "0.28.0"}
    with pytest.raises(CostModelError, match=r"TVM 0\.27\.0, 0\.28\.0\. Give logs"):
        Covers.of([what, replace(what, versions=newer)])


def test_what_a_model_was_not_trained_for_is_refused_by_name(small: LatencyModel) -> None:
    what = make_what()
    newer = replace(what, versions={**what.versions, "apache-tvm": "0.28.0"})
    for other, text in (
        (make_what(threads=2), r"is for x86/avx2/8/.*/1 thread, not for .*/2 threads: train one"),
        (make_what(device_model="Else"), r"not for x86/avx2/8/Else/1 thread: train one"),
        (newer, r"is for TVM 0\.27\.0, not for 0\.28\.0: train it again"),
        (make_what(kernel_version=9), r"knows version 1 of direct_sparse, not version 9: train it"),
    ):
        with pytest.raises(CostModelError, match=text):
            small.predict_us([what, other], "alone")


def test_a_model_comes_back_as_it_was(model: LatencyModel, data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    model.save(path)
    again = LatencyModel.load(path)
    whats = [candidate(np.random.default_rng(i)) for i in range(50)]
    places: tuple[Measured, ...] = ("alone", "in network")
    for measured in places:
        assert np.array_equal(again.predict_us(whats, measured), model.predict_us(whats, measured))
        assert np.array_equal(
            upper_us(again, whats, measured),
            upper_us(model, whats, measured),
        )
    assert (again.card, again.covers, again.columns) == (model.card, model.covers, model.columns)
    assert again.has_seen(data).all()
    assert not again.has_seen(Dataset.of(records(50, seed=9))).any()
    assert [*tmp_path.iterdir()] == [path]


def test_the_file_is_plain_json(saved: Path) -> None:
    def never(text: str) -> None:
        raise AssertionError(text)

    document = json.loads(saved.read_bytes(), parse_constant=never)
    assert document["card"] == {"note": "few trees"}
    assert document["covers"]["kernels"] == {"direct_dense": 1, "direct_sparse": 1}
    assert document["boosters"]["alone"]["learner"]["objective"]["name"] == "reg:squarederror"


def test_a_card_that_is_no_json_writes_nothing(tmp_path: Path, small: LatencyModel) -> None:
    small_card = LatencyModel(small.learned, small.covers, {"x": float("nan")})
    with pytest.raises(ValueError):
        small_card.save(tmp_path / "model.json")
    assert not [*tmp_path.iterdir()]


def test_a_file_that_is_no_model(saved: Path, tmp_path: Path) -> None:
    text = saved.read_bytes()
    with pytest.raises(CostModelError, match=r"no latency model .*none\.json; `topiarist model tr"):
        LatencyModel.load(tmp_path / "none.json")
    for content in (
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b"[" * 100_000,
        text[:-9],
        text[: len(text) // 2],
    ):
        saved.write_bytes(content)
        with pytest.raises(CostModelError, match=r"model\.json is no latency model"):
            LatencyModel.load(saved)
    with pytest.raises(CostModelError, match="no latency model"):
        LatencyModel.load(tmp_path)


def test_a_model_of_another_version(saved: Path) -> None:
    for name in ("schema", "features"):
        edit(saved, lambda document, name=name: document.update({name: 99}))
        with pytest.raises(CostModelError, match=r"other features; train it again"):
            LatencyModel.load(saved)


@pytest.mark.parametrize(
    "name", ["columns", "covers", "card", "boosters", "costs", "margins", "seen"]
)
def test_a_model_without_a_part(saved: Path, name: str) -> None:
    edit(saved, lambda document: document.pop(name))
    with pytest.raises(CostModelError, match=rf"is broken, it lacks '{name}'; train it again"):
        LatencyModel.load(saved)


def tree_of(document: dict[str, Any]) -> Any:
    return document["boosters"]["alone"]["learner"]["gradient_booster"]["model"]["trees"][0]


HOSTILE: dict[str, Edit] = {
    "a child that is not there": lambda d: tree_of(d)["left_children"].__setitem__(0, 10**6),
    "a circle": lambda d: tree_of(d)["left_children"].__setitem__(1, 0),
    "a parent that is not there": lambda d: tree_of(d)["parents"].__setitem__(3, -1),
    "two parents": lambda d: tree_of(d)["left_children"].__setitem__(0, 2),
    "a quantile of words": lambda d: d["boosters"]["upper"]["learner"]["objective"].update(
        quantile_loss_param={}
    ),
    "half a leaf": lambda d: tree_of(d)["left_children"].__setitem__(0, -1),
    "a feature that is not there": lambda d: tree_of(d)["split_indices"].__setitem__(0, 10**6),
    "a negative feature": lambda d: tree_of(d)["split_indices"].__setitem__(0, -1),
    "a categorical split": lambda d: tree_of(d)["split_type"].__setitem__(0, 1),
    "a list too short": lambda d: tree_of(d)["split_conditions"].pop(),
    "more nodes than lists": lambda d: tree_of(d)["tree_param"].update(num_nodes="99999"),
    "no number": lambda d: tree_of(d)["base_weights"].__setitem__(0, "x"),
    "an infinite leaf": lambda d: tree_of(d)["split_conditions"].__setitem__(0, float("inf")),
    "another feature count": lambda d: d["columns"].append("zzz"),
    "a feature twice": lambda d: d["columns"].__setitem__(0, d["columns"][1]),
    "no trees": lambda d: d["boosters"]["alone"]["learner"]["gradient_booster"].update(model={}),
    "another objective": lambda d: d["boosters"]["alone"]["learner"]["objective"].update(name="x"),
    "another kind": lambda d: d["boosters"]["alone"]["learner"]["gradient_booster"].update(
        name="gblinear"
    ),
    "a regression too many": lambda d: d["boosters"].update(more=d["boosters"]["alone"]),
    "no upper quantile": lambda d: d["boosters"].pop("upper"),
    "a negative cost": lambda d: d["costs"]["direct_sparse"].update(calls=-1),
    "a cost of words": lambda d: d["costs"].update(direct_sparse="low"),
    "no costs of the rest": lambda d: d["costs"].pop(""),
    "an infinite margin": lambda d: d.update(margins=[0, float("inf")]),
    "a margin too many": lambda d: d.update(margins=[0, 0, 0]),
    "a list of regressions": lambda d: d.update(boosters=[]),
    "a target of words": lambda d: d["covers"].update(target={"family": "x86"}),
    "a version of words": lambda d: d["covers"].update(kernels={"direct_sparse": "new"}),
    "a card of words": lambda d: d.update(card="good"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_model_is_refused(saved: Path, what: str) -> None:
    edit(saved, HOSTILE[what])
    with pytest.raises(CostModelError, match=r"model\.json is broken, .*; train it again"):
        LatencyModel.load(saved)


def edit(path: Path, change: Edit) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))
