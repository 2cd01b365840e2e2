"""How many channels of each group stay, so that the network meets a latency.

Step by step, as NetAdapt (ECCV 2018) goes: the step that loses the least error for the time that
it saves is taken, until the time is met. A layer's time depends on its input and its output
channels together, so there is no sum over groups that dynamic programming could go over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from topiarist.errors import BudgetError
from topiarist.pruning.channel_order import ChannelOrder
from topiarist.pruning.channels import ChannelMap, Numbers

Price = Callable[[str, int, int], float]
"""(layer, input channels, output channels) -> us. Of a depthwise layer the two go together."""

_STEPS = 16  # for a group, at most
_WHOLE = 8  # channels that kernels like to have together


@dataclass(frozen=True)
class _Size:
    """A layer's number of channels on one side: `other`, and some times each group's."""

    groups: Mapping[str, int]
    other: int

    def at(self, counts: Mapping[str, int]) -> int:
        """The number when the groups have these counts."""
        return self.other + sum(times * counts[group] for group, times in self.groups.items())


def step_counts(size: int) -> tuple[int, ...]:
    """The counts that a group of this size may be cut to, the largest first.

    Multiples of 8, of larger powers of two for groups of more than 128, smaller ones below 64.
    """
    step = 1
    while step * 2 <= size / 8 and (step < _WHOLE or size / step > _STEPS):
        step *= 2
    return tuple(range((size - 1) // step * step, 0, -step))


def layer_channels(channels: ChannelMap, counts: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Layer -> its input and output channels when groups have these counts, others all."""
    whole = {group.name: group.size for group in channels.groups} | dict(counts)
    return {
        layer: (inputs.at(whole), outputs.at(whole))
        for layer, (inputs, outputs) in _sizes(channels).items()
    }


def choose_counts(
    channels: ChannelMap,
    orders: Mapping[str, ChannelOrder],
    us_of: Price,
    budget_us: float,
) -> dict[str, int]:
    """Group -> how many of its channels stay, with all layers within `budget_us` together.

    Only groups with an order are cut. Raises BudgetError if the steps don't lead there.
    """
    walk = _Walk(channels, orders, us_of)
    while walk.run_us > budget_us:
        step = walk.cheapest_step()
        if step is None:
            raise BudgetError(
                f"The layers can't take {budget_us:.1f} us together by cutting channels: the least "
                f"that was reached is {walk.run_us:.1f} us. Ask for that or more."
            )
        walk.take(*step)
    while (step := walk.step_back(budget_us)) is not None:
        walk.take(*step)
    return {name: walk.counts[name] for name in orders}


class _Walk:
    """The counts on the way, and what every step from here would bring."""

    def __init__(
        self, channels: ChannelMap, orders: Mapping[str, ChannelOrder], us_of: Price
    ) -> None:
        self.orders = orders
        self.counts = {group.name: group.size for group in channels.groups}
        self.candidates = {
            name: (len(order.order), *step_counts(len(order.order)))
            for name, order in orders.items()
        }
        self.sizes = _sizes(channels)
        self.layers_of = {
            name: [
                layer
                for layer, (inputs, outputs) in self.sizes.items()
                if name in inputs.groups or name in outputs.groups
            ]
            for name in orders
        }
        self._us_of = cache(us_of)
        self._saved: dict[str, dict[int, float]] = {}

    @property
    def run_us(self) -> float:
        """What all layers take now."""
        return sum(self._layer_us(layer, self.counts) for layer in self.sizes)

    def cheapest_step(self) -> tuple[str, int] | None:
        """The group and its new count that lose the least error for each us saved."""
        steps = [
            (self._lost(name, count) / saved, -saved, name, count)
            for name in self.orders
            for count, saved in self._savings(name).items()
            if count < self.counts[name] and saved > 0
        ]
        return min(steps)[2:] if steps else None

    def step_back(self, budget_us: float) -> tuple[str, int] | None:
        """The group and its larger count that win back the most error within the budget."""
        spare = budget_us - self.run_us
        steps = [
            (self._lost(name, count), name, count)
            for name in self.orders
            for count, saved in self._savings(name).items()
            if count > self.counts[name] and -saved <= spare
        ]
        best = min(steps, default=None)
        return best[1:] if best is not None and best[0] < 0 else None

    def take(self, name: str, count: int) -> None:
        """Go there."""
        self.counts[name] = count
        touched = set(self.layers_of[name])
        for other, layers in self.layers_of.items():
            if touched.intersection(layers):
                self._saved.pop(other, None)

    def _lost(self, name: str, count: int) -> float:
        """The error that another count adds."""
        errors = self.orders[name].errors
        size = len(self.orders[name].order)
        return float(errors[size - count] - errors[size - self.counts[name]])

    def _savings(self, name: str) -> dict[int, float]:
        """The us that each count of a group saves."""
        if name not in self._saved:
            layers = self.layers_of[name]
            now = sum(self._layer_us(layer, self.counts) for layer in layers)
            self._saved[name] = {
                count: now - sum(self._layer_us(i, self.counts | {name: count}) for i in layers)
                for count in self.candidates[name]
            }
        return self._saved[name]

    def _layer_us(self, layer: str, counts: Mapping[str, int]) -> float:
        inputs, outputs = self.sizes[layer]
        return self._us_of(layer, inputs.at(counts), outputs.at(counts))


def _sizes(channels: ChannelMap) -> dict[str, tuple[_Size, _Size]]:
    """Layer -> how its input and output channels follow from the counts of groups."""
    group_of = {
        channel: group.name for group in channels.groups for channel in group.channels.tolist()
    }
    whole = {group.name: group.size for group in channels.groups}
    return {
        item.layer.name: (
            _size(item.inputs, group_of, whole),
            _size(item.outputs, group_of, whole),
        )
        for item in channels.layers
    }


def _size(numbers: Numbers, group_of: Mapping[int, str], whole: Mapping[str, int]) -> _Size:
    """How many of a layer's channels are of which group."""
    found = Counter(group_of.get(channel, "") for channel in numbers.tolist())
    other = found.pop("", 0)
    return _Size({name: count // whole[name] for name, count in found.items()}, other)
