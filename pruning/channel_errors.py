"""What cutting channels does to the network's outputs, to compare one group with another.

What a layer loses says which channel of a group goes first. It says little about how much a group
matters: a loss in a residual sum reaches everything behind it, one inside a block is small beside
the sum. So a cut of each group alone is tried, compensated, on the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import onnx

from topiarist.pruning.calibration import Images
from topiarist.pruning.channel_order import ChannelOrder
from topiarist.pruning.compensation import compensate
from topiarist.pruning.output_error import MOST_IMAGES, OutputError

TRIED = 0.75  # share of a group's channels that stay
_LEAST = 1e-12


def channel_errors(
    model: onnx.ModelProto,
    orders: Mapping[str, ChannelOrder],
    images: Images,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, ChannelOrder]:
    """The same orders with their errors as shares of the variance of the network's outputs.

    The errors of a group all change by one factor. A network with a fixed batch size needs images
    for two batches.
    """
    fitted_on = images.first(min(MOST_IMAGES, len(images) // 2))
    outputs = OutputError(model, images.after(len(fitted_on)))
    found = {}
    for done, (name, order) in enumerate(orders.items(), 1):
        size = len(order.order)
        count = max(1, round(TRIED * size))
        error = outputs.of(compensate(model, {name: order.kept(count)}, fitted_on))
        factor = error / max(float(order.errors[size - count]), _LEAST)
        found[name] = replace(order, errors=factor * order.errors)
        progress(done / len(orders))
    return found
