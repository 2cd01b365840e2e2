"""Guided sparsity learning without a network: a trainer and prices that are made up."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import pytest

from topiarist.pruning.guidance import (
    Bounds,
    EveryZeroPays,
    LayerPath,
    Paths,
    Rules,
    Weights,
    check,
    learn,
    start,
)

SIZE = 1000
RULES = Rules(least_gain=0.05, enough=0.05)


class FakeTrainer:
    """Each layer loses a share of its weights a round, down to a floor; notes what it is told."""

    def __init__(self, floors: Mapping[str, float], keeps: float = 0.5) -> None:
        self.dense = {n: np.random.default_rng(0).random(SIZE) + 0.1 for n in floors}
        self.now = {name: weight.copy() for name, weight in self.dense.items()}
        self.floors, self.keeps = floors, keeps
        self.pruned: list[str] = []
        self.told: list[str] = []

    def prune(self, layers: Collection[str]) -> None:
        self.pruned = list(layers)

    def freeze(self, layer: str) -> None:
        self.told.append(f"freeze {layer}")

    def restore(self, layer: str) -> None:
        self.told.append(f"restore {layer}")
        self.now[layer] = self.dense[layer].copy()

    def weights(self, layers: Collection[str]) -> Weights:
        return {name: self.now[name] for name in layers}

    def train_round(self, number: int) -> None:
        self.told.append(f"round {number}")
        for name in self.pruned:
            stay = max(self.floors[name], self.keeps ** (number + 1))
            self.now[name] = np.where(np.arange(SIZE) < stay * SIZE, self.dense[name], 0)


class FakePrices:
    """100 us dense; sparse 20 us and 200 us times the density; `slow` layers 88 us more."""

    def __init__(self, *layers: str, slow: Collection[str] = ()) -> None:
        self.least = {name: 110.0 if name in slow else 22.0 for name in layers}

    def bounds(self) -> dict[str, Bounds]:
        return {name: Bounds(100.0, least) for name, least in self.least.items()}

    def sparse_us(self, weights: Weights) -> dict[str, float | None]:
        return {n: self.least[n] - 2 + 200 * float((w != 0).mean()) for n, w in weights.items()}


def test_a_layer_that_can_not_get_faster_is_never_pruned() -> None:
    trainer = FakeTrainer({"one": 0.01, "stem": 0.01})
    found = learn(trainer, FakePrices("stem", "one", slow=["stem"]), RULES, 10)
    assert found["stem"].state == "excluded"
    assert found["stem"].densities == ()
    assert trainer.told.count("restore stem") == 0
    np.testing.assert_array_equal(trainer.now["stem"], trainer.dense["stem"])


def test_a_layer_without_a_sparse_kernel_is_excluded() -> None:
    found = start({"a": Bounds(100, None), "b": Bounds(100, 96), "c": Bounds(100, 94)}, RULES)
    assert [path.state for path in found.values()] == ["excluded", "excluded", "pruned"]


def test_at_the_upper_bound_it_is_frozen_and_training_ends() -> None:
    trainer = FakeTrainer({"one": 0.001})
    found = learn(trainer, FakePrices("one"), RULES, 10)
    # 20 us + 200 us * 1/32 is within 5 us of 22 us; 1/16 is not.
    assert found["one"].state == "frozen"
    assert "would not make it faster" in found["one"].reason
    assert found["one"].densities == (0.5, 0.25, 0.125, 0.063, 0.032)
    assert trainer.told[-2:] == ["round 4", "freeze one"]
    assert np.count_nonzero(trainer.now["one"]) == 32


def test_settled_below_the_lower_bound_it_is_given_up_and_restored() -> None:
    trainer = FakeTrainer({"one": 0.6, "other": 0.001})
    found = learn(trainer, FakePrices("one", "other"), RULES, 10)
    assert found["one"].state == "given up"
    assert "settled" in found["one"].reason
    assert found["one"].densities == (0.6, 0.6, 0.6, 0.6)
    assert trainer.told.index("restore one") < trainer.told.index("round 4")
    assert trainer.now["one"].tobytes() == trainer.dense["one"].tobytes()
    assert found["other"].state == "frozen"


def test_what_still_moves_is_not_given_up_before_the_end() -> None:
    trainer = FakeTrainer({"one": 0.001}, keeps=0.97)
    found = learn(trainer, FakePrices("one"), RULES, 6)
    assert found["one"].state == "given up"
    assert "when pruning ended" in found["one"].reason
    assert trainer.told == [*(f"round {n}" for n in range(6)), "restore one"]
    assert trainer.now["one"].tobytes() == trainer.dense["one"].tobytes()


def test_what_pays_at_the_end_is_frozen() -> None:
    trainer = FakeTrainer({"one": 0.25})
    found = learn(trainer, FakePrices("one"), RULES, 4)
    assert (found["one"].state, found["one"].reason) == ("frozen", "pruning ended")
    assert found["one"].run_us == pytest.approx(70)


def test_a_layer_settled_where_it_pays_goes_on() -> None:
    bounds = Bounds(100, 20)
    paths: Paths = {"one": LayerPath("pruned", bounds, "", (0.2, 0.2, 0.2))}
    found = check(paths, {"one": 0.2}, {"one": 60.0}, RULES)
    assert found["one"].state == "pruned"


def test_the_lower_bound_is_a_gain_that_is_more_than_noise() -> None:
    paths = start({"one": Bounds(100, 20)}, Rules(0.05, 0.05, checks=1))
    paths = check(paths, {"one": 0.4}, {"one": 96.0}, Rules(0.05, 0.05, checks=1))
    assert paths["one"].state == "pruned"
    assert (
        check(paths, {"one": 0.4}, {"one": 96.0}, Rules(0.05, 0.05, checks=1))["one"].state
        == "given up"
    )
    assert (
        check(paths, {"one": 0.4}, {"one": 94.0}, Rules(0.05, 0.05, checks=1))["one"].state
        == "pruned"
    )
    assert (
        check(paths, {"one": 0.4}, {"one": None}, Rules(0.05, 0.05, checks=1))["one"].state
        == "given up"
    )


def test_without_guidance_all_layers_are_pruned_to_the_end() -> None:
    trainer = FakeTrainer({"one": 0.6, "two": 0.001})
    found = learn(trainer, EveryZeroPays(["one", "two"]), RULES, 12)
    assert {path.state for path in found.values()} == {"frozen"}
    assert {path.reason for path in found.values()} == {"pruning ended"}
    assert trainer.told[-3:] == ["round 11", "freeze one", "freeze two"]


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_goes_on_where_it_was_interrupted(done: int) -> None:
    floors = {"one": 0.001, "two": 0.6, "stem": 0.1}
    prices = FakePrices(*floors, slow=["stem"])
    whole = FakeTrainer(floors)
    wanted = learn(whole, prices, RULES, 8)
    first, saved = FakeTrainer(floors), []
    learn(first, prices, RULES, 8, after=lambda rounds, paths: saved.append((rounds, paths)))
    rounds, paths = saved[done - 1]
    second = FakeTrainer(floors)
    found = learn(second, prices, RULES, 8, paths=paths, begin=rounds)
    assert found == wanted
    assert second.told == whole.told[whole.told.index(f"round {done}") :]


def test_rules_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="shares"):
        Rules(least_gain=1.5)
    with pytest.raises(ValueError, match="shares"):
        Rules(checks=0)
