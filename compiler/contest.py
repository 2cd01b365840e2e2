"""Which way of pruning a network loses least at a latency: timed first, compared then.

A network with more or fewer channels, and one level for all layers, are priced by the same latency
model, but what it gets wrong differs from one to the next, and from one latency to another. So each
is compiled and timed once, and then the outputs are compared at the levels that corrected prices
allow. The one that is nearest to the dense network's outputs is timed again, until it is the one
that takes what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from topiarist.compiler.choose import Advice
from topiarist.compiler.manifest import Manifest
from topiarist.compiler.prunable import Proposal, Prunable, narrowed
from topiarist.compiler.timed_builds import TimedBuilds

TOLERANCE = 0.03  # of the latency asked for
ROUNDS = 6  # of compiling and timing, at most, once each entrant was timed
HOPELESS = 1.6  # times the least error, at prices not yet corrected for this latency
TIE = 1.03  # times the least error: images can't tell such networks apart

ErrorOf = Callable[[Prunable, Proposal], float]


@dataclass(frozen=True)
class Round:
    """A choice that was compiled and timed; `error` is that of its outputs, as far as is known."""

    way: str
    expected_us: float
    measured_us: float
    error: float


@dataclass(frozen=True)
class Attempt:
    """Levels that were timed, and the kernels that won with them."""

    network: Prunable
    proposal: Proposal
    advice: Advice
    run_us: float


@dataclass(eq=False)
class _Entrant:
    """A network with the levels that it would have now, and what was timed of it."""

    network: Prunable
    proposal: Proposal
    error: float
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """Whether what it would have now is what was timed last."""
        levels = self.proposal.allocation.levels
        return bool(self.attempts) and self.attempts[-1].proposal.allocation.levels == levels


class Contest:
    """Networks that are to take `wanted_us`; `error_of` says what levels do to the outputs.

    `rounds` is all that was timed. Those whose error is HOPELESS to begin with are timed only if
    the others are too late.
    """

    def __init__(
        self,
        networks: Sequence[Prunable],
        wanted_us: float,
        builds: TimedBuilds,
        error_of: ErrorOf,
    ) -> None:
        self.wanted_us = wanted_us
        self.rounds: list[Round] = []
        self._builds = builds
        self._error_of = error_of
        proposals = [(network, self._propose(network)) for network in networks]
        self._entrants = [_Entrant(*one, error_of(*one)) for one in proposals]

    def winner(self) -> Attempt:
        """What loses least of all that takes as long; the nearest to that after ROUNDS."""
        limit = HOPELESS * min(entrant.error for entrant in self._entrants)
        for entrant in self._entrants:
            if entrant.error <= limit and not self._was_timed(entrant):
                self._time(entrant)
        while True:
            best = self._leader()
            if best.settled:
                return best.attempts[-1]
            if len(self.rounds) >= len(self._entrants) + ROUNDS:
                attempts = best.attempts or [a for one in self._entrants for a in one.attempts]
                return min(attempts, key=lambda one: self.distance(one.run_us))
            self._time(best)

    def distance(self, run_us: float) -> float:
        """From what was asked for, as a share of it."""
        return abs(run_us / self.wanted_us - 1)

    def correct(self, attempt: Attempt, manifest: Manifest, run_us: float) -> None:
        """What the winner took when it was built again, if that is not what was asked for."""
        entrant = next(one for one in self._entrants if one.network is attempt.network)
        self._correct(entrant, attempt.proposal, manifest, run_us)

    def _was_timed(self, entrant: _Entrant) -> bool:
        """Whether it was, or another way of pruning the same network."""
        timed = [one.network for one in self._entrants if one.attempts]
        return any(entrant.network.shares_prices(network) for network in timed)

    def _leader(self) -> _Entrant:
        """What loses least, or as good as that without timing anything again."""
        best = min(self._entrants, key=self._rank)
        late, error = self._rank(best)
        settled = [one for one in self._entrants if one.settled]
        good = [one for one in settled if self._rank(one) <= (late, TIE * error)]
        return min(good, key=self._rank, default=best)

    def _time(self, entrant: _Entrant) -> None:
        network, proposal = entrant.network, entrant.proposal
        advice = network.advice(proposal)
        model = network.with_zeros(proposal.allocation.levels)
        manifest, ratio = self._builds.timed(model, "candidate", advice)
        run_us = self._builds.dense_us / ratio.median
        self.rounds.append(Round(network.way, proposal.expected_us, run_us, entrant.error))
        entrant.attempts.append(Attempt(network, proposal, narrowed(advice, manifest), run_us))
        self._correct(entrant, proposal, manifest, run_us)

    def _correct(
        self, timed: _Entrant, proposal: Proposal, manifest: Manifest, run_us: float
    ) -> None:
        """Propose again what prices have changed for, but not what has taken what it was to."""
        timed.network.correct(proposal, manifest, run_us)
        for entrant in self._entrants:
            if entrant is timed:
                again = self.distance(run_us) > TOLERANCE
            else:
                again = not entrant.settled and entrant.network.shares_prices(timed.network)
            if again:
                self._propose_again(entrant)

    def _propose_again(self, entrant: _Entrant) -> None:
        """At corrected prices."""
        before = entrant.proposal.allocation.levels
        entrant.proposal = self._propose(entrant.network)
        if entrant.proposal.allocation.levels != before:
            entrant.error = self._error_of(entrant.network, entrant.proposal)

    def _propose(self, network: Prunable) -> Proposal:
        """What it would have at what was asked for, or the least that it can take."""
        return network.propose(max(self.wanted_us, network.least_us))

    def _rank(self, entrant: _Entrant) -> tuple[float, float]:
        """By error, of those that are expected to be in time."""
        late = entrant.proposal.expected_us / self.wanted_us
        return max(late, 1 + TOLERANCE), entrant.error
