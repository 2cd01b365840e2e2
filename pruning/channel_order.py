"""In which order the channels of a group go, and how much of the network's work each one was.

With images: optimal brain surgeon on whole columns. For a layer that reads the channels, with
weight w and the second moments H of its inputs, removing the columns P of a channel costs
w_P (H^-1_PP)^-1 w_P^T if the other columns make up for them as well as they can (Optimal Brain
Compression, NeurIPS 2022, section 4); costs are shares of w H w^T, and those of all layers that
read the channel add up. Without images: the squared norm of the filters that make the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from topiarist.pruning.batch_scale import output_scale
from topiarist.pruning.calibration import Images
from topiarist.pruning.channels import ChannelGroup, ChannelMap, LayerChannels, Numbers
from topiarist.pruning.cores import on_all_cores
from topiarist.pruning.forward import chunks, run_chunks
from topiarist.pruning.moments import damped, gather_moments

Array = NDArray[np.float64]

MOST_COLUMNS = 5000  # of a layer whose moments are gathered: 200 MB
MOST_IMAGES = 256  # more change little: whole channels leave much for each statistic
_ROUNDS = 64  # of a larger group this share of what is left goes at once


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """A group's channels in the order in which they go, and the error after each.

    `order` is [size], indices into the group; `errors` is [size], after 0, 1, ... removals; the
    last channel stays.
    """

    group: str
    order: Numbers
    errors: Array

    def kept(self, count: int) -> Numbers:
        """The indices that are left when `count` stay, ascending."""
        return np.sort(self.order[len(self.order) - count :])


def magnitude_orders(channels: ChannelMap) -> dict[str, ChannelOrder]:
    """By the norms of filters, for each group that can be cut."""
    found = {}
    for group in channels.groups:
        if group.reason_kept is None:
            norms = filter_norms(channels, group)
            order = np.argsort(norms, kind="stable")
            errors = np.concatenate([[0.0], np.cumsum(norms[order])[:-1]])
            found[group.name] = ChannelOrder(group.name, order, errors)
    return found


def filter_norms(channels: ChannelMap, group: ChannelGroup) -> Array:
    """For each channel [size], its share of the squared norm of all layers that make it."""
    norms = np.zeros(channels.total)
    for item in channels.layers:
        if item.layer.name in group.producers:
            weight = item.layer.weight.astype(np.float64)
            energy = (weight**2).sum(axis=(1, 2, 3))
            np.add.at(norms, item.outputs, energy / (energy.sum() or 1.0))
    return norms[group.channels]


def obs_orders(
    model: onnx.ModelProto,
    channels: ChannelMap,
    images: Images,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, ChannelOrder]:
    """By what the layers that read the channels lose, for each group that can be cut.

    Raises CalibrationError where a layer's inputs have no usable statistics.
    """
    groups = [group for group in channels.groups if group.reason_kept is None]
    names = {name for group in groups for name in group.consumers}
    readers = [item for item in channels.layers if item.layer.name in names]
    states = _states(model, readers, images.first(MOST_IMAGES))

    def order(group: ChannelGroup) -> ChannelOrder:
        own = [item for item in readers if item.layer.name in group.consumers]
        return _greedy(
            group, [_Part(states[item.layer.name], _columns(item, group)) for item in own]
        )

    found = {}
    for done, result in enumerate(on_all_cores(order, groups), 1):
        found[result.group] = result
        progress(done / len(groups))
    return found


@dataclass(frozen=True, eq=False)
class _State:
    """A layer before anything is removed: weight [O, c], inverse moments [c, c], w H w^T.

    Of layers with too many columns only the diagonal of the inverse is known: [c].
    """

    weight: Array
    inverse: Array
    energy: float


def _states(
    model: onnx.ModelProto, readers: Sequence[LayerChannels], images: Images
) -> dict[str, _State]:
    """The layers' states, by name."""
    narrow = [item for item in readers if item.layer.weight[0].size <= MOST_COLUMNS]
    moments = gather_moments(model, [item.layer for item in narrow], images)
    found = {}
    for item, gathered in zip(narrow, moments, strict=True):
        matrix, inverse = damped(item.layer.name, gathered.matrix[0])
        weight = _weight(model, item)
        found[item.layer.name] = _State(weight, inverse, _energy(weight @ matrix, weight))
    for item in readers:
        if item.layer.name not in found:
            power = _power(model, item, images)
            weight = _weight(model, item)
            inverse = 1 / np.maximum(power, 1e-12)
            found[item.layer.name] = _State(weight, inverse, _energy(weight * power, weight))
    return found


def _weight(model: onnx.ModelProto, item: LayerChannels) -> Array:
    """[O, c], filters scaled as the batch norm that follows scales them."""
    weight = item.layer.weight.astype(np.float64).reshape(len(item.layer.weight), -1)
    return weight * output_scale(model, item.layer)[:, None]


def _energy(some: Array, others: Array) -> float:
    """The sum of products; 1 for a layer that makes nothing, whose losses are 0 anyway."""
    return float(np.einsum("oc,oc->", some, others)) or 1.0


def _power(model: onnx.ModelProto, item: LayerChannels, images: Images) -> Array:
    """The mean square of each input channel of a layer, for each of its columns [c]."""
    total, count = np.zeros(len(item.inputs)), 0
    name = item.layer.node.input[0]
    for values in run_chunks(model, chunks(model, images), [name]):
        by_channel = np.moveaxis(values[name], 1, 0).reshape(len(item.inputs), -1)
        total += np.square(by_channel, dtype=np.float64).sum(axis=1)
        count += by_channel.shape[1]
    return np.repeat(total / count, item.layer.weight[0].size // len(item.inputs))


def _columns(item: LayerChannels, group: ChannelGroup) -> Numbers:
    """The layer's columns [size, p] that belong to each channel of the group."""
    taps = item.layer.weight[0, 0].size
    places = np.argsort(item.inputs, kind="stable")
    sorted_inputs = item.inputs[places]
    first = np.searchsorted(sorted_inputs, group.channels, side="left")
    times = int(np.searchsorted(sorted_inputs, group.channels[0], side="right") - first[0])
    positions = places[first[:, None] + np.arange(times)]
    columns: Numbers = (positions[:, :, None] * taps + np.arange(taps)).reshape(group.size, -1)
    return columns


class _Part:
    """A layer that loses the columns of channels one after the other."""

    def __init__(self, state: _State, columns: Numbers) -> None:
        self.columns = columns
        self.weight = state.weight.copy()
        self.inverse = state.inverse.copy()
        self.energy = state.energy

    def losses(self, alive: Numbers) -> Array:
        """What removing each of the channels would cost."""
        columns = self.columns[alive]
        weight = self.weight[:, columns].transpose(1, 0, 2)  # [alive, O, p]
        if self.inverse.ndim == 1:
            squares = np.square(weight).sum(axis=1)
            alone: Array = (squares / self.inverse[columns]).sum(axis=1) / self.energy
            return alone
        blocks = np.linalg.inv(self.inverse[columns[:, :, None], columns[:, None, :]])
        gram = np.matmul(weight.transpose(0, 2, 1), weight)
        losses: Array = np.einsum("kpq,kpq->k", gram, blocks) / self.energy
        return losses

    def remove(self, gone: Numbers, alive: Numbers) -> float:
        """Remove channels for good and let the others make up for them; returns the cost."""
        columns = self.columns[gone].ravel()
        weight = self.weight[:, columns]
        if self.inverse.ndim == 1:
            return float((weight**2 / self.inverse[columns]).sum()) / self.energy
        rows = self.inverse[columns]
        factor = np.linalg.solve(rows[:, columns], rows)
        change = np.linalg.solve(rows[:, columns], weight.T)
        cost = float(np.einsum("po,op->", change, weight)) / self.energy
        self.weight -= weight @ factor
        self.inverse -= rows.T @ factor
        self._compact(alive)
        return cost

    def _compact(self, alive: Numbers) -> None:
        """Leave out the columns that are gone, when they are many."""
        total = self.weight.shape[1]
        gone = np.setdiff1d(np.arange(len(self.columns)), alive)
        dead = self.columns[gone]
        dead = dead[dead >= 0]
        if dead.size * 8 < total:
            return
        stay = np.ones(total, np.bool_)
        stay[dead] = False
        self.weight = self.weight[:, stay]
        self.inverse = self.inverse[np.ix_(stay, stay)]
        place = np.where(stay, np.cumsum(stay) - 1, -1)
        self.columns = np.where(self.columns >= 0, place[self.columns], -1)


def _greedy(group: ChannelGroup, parts: Sequence[_Part]) -> ChannelOrder:
    """The cheapest channels first, with what the others make up for them counted in."""
    alive = np.arange(group.size)
    order: list[int] = []
    errors = [0.0]
    while len(alive) > 1:
        losses = np.sum([part.losses(alive) for part in parts], axis=0)
        many = max(1, len(alive) // _ROUNDS)
        cheapest = np.argsort(losses, kind="stable")[:many]
        gone = alive[cheapest]
        alive = np.delete(alive, cheapest)
        cost = sum(part.remove(gone, alive) for part in parts)
        order.extend(gone.tolist())
        share = np.cumsum(losses[cheapest])
        errors.extend(errors[-1] + cost * share / (share[-1] or 1.0))
    return ChannelOrder(group.name, np.array([*order, *alive], np.intp), np.array(errors))
