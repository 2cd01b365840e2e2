"""Smaller copies of a network, by whole channels: what zeros are then put into."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx

from topiarist.errors import BudgetError
from topiarist.pruning.calibration import Images
from topiarist.pruning.channel_errors import channel_errors
from topiarist.pruning.channel_order import obs_orders
from topiarist.pruning.channel_steps import Price, choose_counts, layer_channels
from topiarist.pruning.channels import ChannelMap, channel_map
from topiarist.pruning.compensation import compensate
from topiarist.pruning.shrink import shrink


class ChannelCuts:
    """Cuts a share of a network's time out of it, channels that matter least first.

    `dense_us` is what layers take; with fewer channels a layer is taken to need as much less. How
    much channels matter is measured once (see `channel_errors`), for all shares.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        images: Images,
        dense_us: Mapping[str, float],
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.model = model
        self.images = images
        self.channels = channel_map(model)
        orders = obs_orders(model, self.channels, images)
        self.orders = channel_errors(model, orders, images, progress)
        self.price = _in_proportion(self.channels, dense_us)
        self.dense_us = sum(dense_us.get(i.layer.name, 0.0) for i in self.channels.layers)

    def without(self, share: float) -> onnx.ModelProto | None:
        """The network without this share of its time, layers refitted; None if it can't be."""
        try:
            budget_us = (1 - share) * self.dense_us
            counts = choose_counts(self.channels, self.orders, self.price, budget_us)
        except BudgetError:
            return None
        kept = {name: self.orders[name].kept(count) for name, count in counts.items()}
        return shrink(compensate(self.model, kept, self.images), kept)


def _in_proportion(channels: ChannelMap, dense_us: Mapping[str, float]) -> Price:
    """Prices as multiply-adds go."""
    whole = layer_channels(channels, {})
    depthwise = {item.layer.name for item in channels.layers if item.depthwise}

    def price(layer: str, inputs: int, outputs: int) -> float:
        all_inputs, all_outputs = whole[layer]
        share = outputs / all_outputs
        if layer not in depthwise:
            share *= inputs / all_inputs
        return dense_us.get(layer, 0.0) * share

    return price
