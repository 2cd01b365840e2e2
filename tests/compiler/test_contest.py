"""Ways of pruning against each other, with invented prices and an invented clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from topiarist.compiler.bench import Ratio
from topiarist.compiler.choose import Advice
from topiarist.compiler.contest import ROUNDS, TOLERANCE, Contest
from topiarist.compiler.prunable import Proposal
from topiarist.pruning.allocation import Allocation, Option
from topiarist.pruning.level import Level

DENSE_US = 400.0


@dataclass
class Way:
    """One layer, which takes 200 us times its density by price and `slowness` times that in truth.

    The error is `weight` times the share of zeros.
    """

    way: str
    slowness: float
    weight: float
    least_density: float = 0.1
    wrong: float = 1.0
    mends: bool = True
    prices: str = ""

    @property
    def least_us(self) -> float:
        return 200 * self.least_density * self.wrong

    def propose(self, wanted_us: float) -> Proposal:
        density = min(1.0, wanted_us / (200 * self.wrong))
        option = Option(Level("unstructured", density), 200 * density * self.wrong, 0.0)
        return Proposal(None, Allocation({"a": option}), option.run_us)  # type: ignore[arg-type]

    def error(self, proposal: Proposal) -> float:
        return self.weight * (1 - proposal.allocation.levels["a"].density)

    def advice(self, proposal: Proposal) -> Advice:
        return Advice(None, {})  # type: ignore[arg-type]

    def with_zeros(self, levels: dict[str, Level]) -> tuple[Way, float]:
        return self, levels["a"].density

    def shares_prices(self, other: Way) -> bool:
        return self is other or (bool(self.prices) and self.prices == other.prices)

    def correct(self, proposal: Proposal, manifest: Any, run_us: float) -> None:
        if self.mends:
            self.wrong *= run_us / proposal.expected_us


class Clock:
    """Builds nothing; what was timed is in `timed`."""

    dense_us = DENSE_US

    def __init__(self) -> None:
        self.timed_ways: list[str] = []

    def timed(self, model: tuple[Way, float], name: str, advice: Advice) -> tuple[Any, Ratio]:
        way, density = model
        self.timed_ways.append(way.way)
        ratio = DENSE_US / (200 * density * way.slowness)
        return _Manifest(), Ratio(ratio, ratio, ratio)


class _Manifest:
    layers = ()


def hold(ways: Sequence[Way], wanted_us: float = 100.0) -> tuple[Contest, Clock]:
    clock = Clock()
    error = lambda network, proposal: network.error(proposal)  # noqa: E731
    return Contest(ways, wanted_us, clock, error), clock  # type: ignore[arg-type]


def test_the_one_that_only_prices_favour_loses() -> None:
    """At 100 us by price "flattered" loses 0.5 and "maligned" 0.6, by the clock 0.75 and 0.36."""
    ways = [Way("flattered", 2.0, 1.0), Way("maligned", 0.7, 1.2)]
    held, clock = hold(ways)
    won = held.winner()
    assert won.network.way == "maligned"
    assert won.run_us == pytest.approx(100)
    assert clock.timed_ways == ["flattered", "maligned", "maligned"]
    assert [one.way for one in held.rounds] == clock.timed_ways
    assert held.rounds[-1].error == pytest.approx(1.2 * (1 - 1 / 1.4))


def test_of_equals_the_one_that_was_timed_wins() -> None:
    """ "slow" would lose a little less once it was timed again, but "good" has done with that."""
    held, clock = hold([Way("slow", 1.1, 0.9), Way("good", 1.0, 1.0)])
    assert held.winner().network.way == "good"
    assert clock.timed_ways == ["slow", "good"]


def test_what_is_hopeless_is_not_compiled() -> None:
    held, clock = hold([Way("good", 1.0, 0.1), Way("bad", 1.0, 0.5)])
    assert held.winner().network.way == "good"
    assert clock.timed_ways == ["good"]


def test_what_is_too_late_loses_whatever_its_error() -> None:
    slow = Way("slow", 1.5, 0.3, least_density=0.5)
    held, _ = hold([slow, Way("in time", 1.0, 0.8)])
    won = held.winner()
    assert won.network.way == "in time"
    assert won.run_us == pytest.approx(100)


def test_alone_and_too_late_it_wins() -> None:
    held, clock = hold([Way("slow", 1.5, 0.3, least_density=0.5)])
    assert held.winner().run_us == pytest.approx(150)
    assert len(clock.timed_ways) == 1


def test_after_so_many_rounds_it_is_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections that overshoot each time: 130, 90, 130, ... us."""
    way = Way("restless", 1.3, 1.0, mends=False)
    factors = iter([1.3 / 0.9, 0.9 / 1.3] * ROUNDS)

    def correct(proposal: Proposal, manifest: Any, run_us: float) -> None:
        way.wrong *= next(factors)

    monkeypatch.setattr(way, "correct", correct)
    held, _ = hold([way])
    won = held.winner()
    assert len(held.rounds) == 1 + ROUNDS
    assert won.run_us == pytest.approx(90)
    assert held.distance(won.run_us) > TOLERANCE


def test_the_final_build_may_take_something_else() -> None:
    way = Way("only", 1.0, 1.0)
    held, clock = hold([way])
    won = held.winner()
    way.slowness = 1.2
    held.correct(won, _Manifest(), 120.0)  # type: ignore[arg-type]
    again = held.winner()
    assert again.run_us == pytest.approx(100)
    assert len(clock.timed_ways) == 2


def test_what_is_learned_of_one_way_is_proposed_in_the_other() -> None:
    """Both know the same prices, so the second one need not be timed to be compared."""
    ways = [Way("guided", 1.5, 1.0, prices="a"), Way("even", 1.5, 1.1, prices="a")]

    def correct(proposal: Proposal, manifest: Any, run_us: float) -> None:
        for way in ways:
            way.wrong = 1.5

    for way in ways:
        way.correct = correct  # type: ignore[method-assign]
    held, clock = hold(ways)
    assert held.winner().network.way == "guided"
    assert clock.timed_ways == ["guided", "guided"]
