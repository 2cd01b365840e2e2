"""The channels of a network that only go together: cut one filter, and what else must be cut.

Every value of the graph gets a number for each of its channels. Operators that keep channels apart
(activations, pools, batch norm, depthwise convolutions) hand the numbers on, sums unite them,
Concat and Flatten line them up; a number is then a channel that can go, with everything that
carries it. Channels that go the same way form a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.pruning.channel_flow import Count, Cut, Flow, follow_channels
from topiarist.pruning.layers import WeightedLayer

Numbers = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that run through the same operators; `name` is the first layer that makes them.

    `channels` are their numbers, in the order of that layer's filters. `producers` lose filters
    with them (depthwise convolutions too) and `consumers` input channels; `reason_kept` says why
    they can't be cut, None if they can.
    """

    name: str
    channels: Numbers
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    reason_kept: str | None

    @property
    def size(self) -> int:
        """How many channels there are."""
        return len(self.channels)


@dataclass(frozen=True, eq=False)
class LayerChannels:
    """The channel numbers of a layer's filters [O] and of its input channels [C].

    A depthwise convolution has equal ones, its outputs perhaps several times.
    """

    layer: WeightedLayer
    inputs: Numbers
    outputs: Numbers
    depthwise: bool


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """All channels of a network, numbered from 0 to `total`."""

    total: int
    groups: tuple[ChannelGroup, ...]
    layers: tuple[LayerChannels, ...]
    cuts: tuple[Cut, ...]
    counts: tuple[Count, ...]

    def group(self, name: str) -> ChannelGroup:
        """The group of that name. Raises ValueError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        known = ", ".join(group.name for group in self.groups[:5])
        raise ValueError(f"no group of channels {name!r}; there are {known}, ...")

    def mask(self, kept: Mapping[str, Sequence[int] | Numbers]) -> NDArray[np.bool_]:
        """Which channels [total] stay, given the indices that stay of some groups.

        Raises ValueError for a group that can't be cut or an index that it doesn't have.
        """
        mask = np.ones(self.total, np.bool_)
        for name, indices in kept.items():
            group = self.group(name)
            stay = np.asarray(indices, np.intp)
            if group.reason_kept is not None and len(stay) < group.size:
                raise ValueError(f"the channels of {name} can't be cut: {group.reason_kept}")
            if not stay.size or stay.min() < 0 or stay.max() >= group.size:
                raise ValueError(f"{name} keeps at least one of its channels 0 to {group.size - 1}")
            mask[group.channels] = False
            mask[group.channels[stay]] = True
        return mask


def channel_map(model: onnx.ModelProto) -> ChannelMap:
    """How the channels of the network hang together.

    Raises ModelError for weights that are not loaded.
    """
    flow = follow_channels(model)
    number = _numbers(flow)
    reasons = _reasons(flow, number)
    layers = tuple(
        LayerChannels(item.layer, number[item.inputs], number[item.outputs], item.depthwise)
        for item in flow.layers
    )
    return ChannelMap(
        total=int(number.max(initial=-1)) + 1,
        groups=tuple(_groups(flow, number, layers, reasons)),
        layers=layers,
        cuts=tuple(cut.renumbered(number) for cut in flow.cuts),
        counts=tuple(count.renumbered(number) for count in flow.counts),
    )


def _numbers(flow: Flow) -> Numbers:
    """For each channel that was made, the number of the channel that it is united with."""
    roots = np.array([flow.root(channel) for channel in range(flow.total)], np.intp)
    return np.unique(roots, return_inverse=True)[1].reshape(-1)


def _reasons(flow: Flow, number: Numbers) -> dict[int, str]:
    """Channel number -> the first reason why it can't be cut."""
    reasons: dict[int, str] = {}
    for channels, reason in flow.fixed:
        for channel in np.unique(number[channels]).tolist():
            reasons.setdefault(channel, reason)
    return reasons


def _groups(
    flow: Flow, number: Numbers, layers: Sequence[LayerChannels], reasons: Mapping[int, str]
) -> Iterator[ChannelGroup]:
    """Groups in the order of their first layers; channels that no layer makes are in none."""
    ways = _ways(flow, number)
    grouped: set[int] = set()
    names: set[str] = set()
    for layer in layers:
        own: dict[object, list[int]] = {}
        for channel in dict.fromkeys(layer.outputs.tolist()):
            if channel not in grouped:
                own.setdefault(ways[channel], []).append(channel)
        for channels in own.values():
            grouped.update(channels)
            name = _new_name(layer.layer.name, names)
            names.add(name)
            yield ChannelGroup(
                name=name,
                channels=np.array(channels, np.intp),
                producers=_having(channels[0], layers, producing=True),
                consumers=_having(channels[0], layers, producing=False),
                reason_kept=reasons.get(channels[0]),
            )


def _ways(flow: Flow, number: Numbers) -> list[tuple[tuple[int, int], ...]]:
    """For each channel, the values that carry it and how many times."""
    ways: list[list[tuple[int, int]]] = [[] for _ in range(int(number.max(initial=-1)) + 1)]
    for index, channels in enumerate(flow.values.values()):
        found, times = np.unique(number[channels], return_counts=True)
        for channel, count in zip(found.tolist(), times.tolist(), strict=True):
            ways[channel].append((index, count))
    return [tuple(way) for way in ways]


def _having(channel: int, layers: Sequence[LayerChannels], *, producing: bool) -> tuple[str, ...]:
    """The layers that make or that read the channel; depthwise ones only hand it on."""
    return tuple(
        item.layer.name
        for item in layers
        if (producing or not item.depthwise)
        and channel in (item.outputs if producing else item.inputs)
    )


def _new_name(name: str, names: set[str]) -> str:
    """The name, numbered if a group has it: a layer's filters can be of several groups."""
    copies, new = 1, name
    while new in names:
        copies += 1
        new = f"{name}#{copies}"
    return new
