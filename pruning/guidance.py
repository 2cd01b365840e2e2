"""Guided sparsity learning: which layers training makes sparse, and when it stops at each.

Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning", ICLR 2017, section
2.4. Their bounds are densities of a formula; here they are times, whatever predicts them. This is
the decisions alone: `pruning/gsl` trains, `compiler/zero_prices.py` predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

State = Literal["excluded", "pruned", "frozen", "given up"]
Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Bounds:
    """Microseconds of a layer with a dense kernel, and of a sparse one with hardly a weight left.

    `least_us` is None where no sparse kernel runs the layer.
    """

    dense_us: float
    least_us: float | None


@dataclass(frozen=True)
class Rules:
    """When zeros count as worth it; times are shares of the layer's dense time.

    Both are a tenth because predictions of single layers are not better than that. A density is
    settled when it moved by less than `settled` over the last `checks` checks.
    """

    least_gain: float = 0.1  # what sparse has to save
    enough: float = 0.1  # what all zeros to come could save, below which they don't pay
    settled: float = 0.005
    checks: int = 3

    def __post_init__(self) -> None:
        shares = (self.least_gain, self.enough, self.settled)
        if not all(0 <= share < 1 for share in shares) or self.checks < 1:
            raise ValueError(f"needs shares of 0 to 1 and a check, got {self}")


@dataclass(frozen=True)
class LayerPath:
    """A layer on its way: what is done with it and why, and its densities at all checks."""

    state: State
    bounds: Bounds
    reason: str
    densities: tuple[float, ...] = ()
    run_us: float | None = None  # predicted with the zeros of the last check, by a sparse kernel

    def gain(self, run_us: float | None) -> float:
        """The share of the dense time that a sparse kernel would save; none saves nothing."""
        return 0.0 if run_us is None else 1 - run_us / self.bounds.dense_us


Paths = Mapping[str, LayerPath]


class Prices(Protocol):
    """What predicts times."""

    def bounds(self) -> Mapping[str, Bounds]:
        """Of all layers that could be pruned."""
        ...

    def sparse_us(self, weights: Weights) -> Mapping[str, float | None]:
        """With a sparse kernel and these zeros; None where none runs the layer."""
        ...


class EveryZeroPays:
    """Prices by which no layer is ever left out or done: pruning without guidance."""

    def __init__(self, layers: Collection[str]) -> None:
        self.layers = tuple(layers)

    def bounds(self) -> dict[str, Bounds]:
        """One microsecond dense, none without weights."""
        return {name: Bounds(1.0, 0.0) for name in self.layers}

    def sparse_us(self, weights: Weights) -> dict[str, float | None]:
        """Half a microsecond."""
        return dict.fromkeys(weights, 0.5)


class Trainer(Protocol):
    """What trains the whole network, and prunes the layers that it is told to."""

    def prune(self, layers: Collection[str]) -> None:
        """These, and no others, are pruned from now on."""
        ...

    def freeze(self, layer: str) -> None:
        """Its zeros stay as they are."""
        ...

    def restore(self, layer: str) -> None:
        """Its weights become, bit by bit, what they were before training."""
        ...

    def weights(self, layers: Collection[str]) -> Weights:
        """As they are now, [O, C / groups, kh, kw] each."""
        ...

    def train_round(self, number: int) -> None:
        """Some hundred steps; rounds are counted from 0."""
        ...


def start(bounds: Mapping[str, Bounds], rules: Rules) -> dict[str, LayerPath]:
    """Every layer is pruned but those that can't get faster."""
    paths = {name: LayerPath("pruned", one, "") for name, one in bounds.items()}
    return {
        name: path
        if path.gain(path.bounds.least_us) > rules.least_gain
        else replace(path, state="excluded", reason="no zeros would make it faster")
        for name, path in paths.items()
    }


def check(
    paths: Paths,
    densities: Mapping[str, float],
    sparse_us: Mapping[str, float | None],
    rules: Rules,
    *,
    last: bool = False,
) -> dict[str, LayerPath]:
    """What becomes of the layers that are being pruned; `last` leaves none of them open."""
    return {
        name: _checked(path, densities[name], sparse_us[name], rules, last)
        if path.state == "pruned"
        else path
        for name, path in paths.items()
    }


def _checked(
    path: LayerPath, density: float, run_us: float | None, rules: Rules, last: bool
) -> LayerPath:
    path = replace(path, densities=(*path.densities, density), run_us=run_us)
    assert path.bounds.least_us is not None  # or it had been excluded
    pays = path.gain(run_us) > rules.least_gain
    if pays and path.gain(path.bounds.least_us) - path.gain(run_us) <= rules.enough:
        return replace(path, state="frozen", reason="more zeros would not make it faster")
    if not pays and (last or _settled(path.densities, rules)):
        when = "when pruning ended" if last else "where its density settled"
        return replace(path, state="given up", reason=f"not faster than dense {when}")
    return replace(path, state="frozen", reason="pruning ended") if last else path


def _settled(densities: tuple[float, ...], rules: Rules) -> bool:
    recent = densities[-rules.checks - 1 :]
    return len(recent) > rules.checks and max(recent) - min(recent) < rules.settled


def learn(
    trainer: Trainer,
    prices: Prices,
    rules: Rules,
    rounds: int,
    *,
    paths: Paths | None = None,
    begin: int = 0,
    after: Callable[[int, Paths], None] = lambda rounds, paths: None,
) -> dict[str, LayerPath]:
    """Train in rounds, check after each, and do what comes of it, while any layer is pruned.

    `paths` and `begin` are of a training that goes on after so many rounds. `after` is told how
    many rounds are done and what became of the layers, when the trainer knows it, too.
    """
    found = start(prices.bounds(), rules) if paths is None else dict(paths)
    for number in range(begin, rounds):
        pruned = [name for name, path in found.items() if path.state == "pruned"]
        if not pruned:
            break
        trainer.prune(pruned)
        trainer.train_round(number)
        weights = trainer.weights(pruned)
        densities = {name: float((weight != 0).mean()) for name, weight in weights.items()}
        last = number == rounds - 1
        found = check(found, densities, prices.sparse_us(weights), rules, last=last)
        for name in pruned:
            if found[name].state == "frozen":
                trainer.freeze(name)
            elif found[name].state == "given up":
                trainer.restore(name)
        after(number + 1, found)
    return found
