"""What cutting channels does to the network's outputs, to compare one group with another.

What a layer loses says which channel of a group goes first. It says little about how much a group
matters: a loss in a residual sum reaches everything behind it, one inside a block is small beside
the sum. So a cut of each group alone is tried, compensated, on the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx

from topiarist.pruning.calibration import Arrays, Images
from topiarist.pruning.channel_order import ChannelOrder
from topiarist.pruning.compensation import compensate
from topiarist.pruning.forward import chunks, run_chunks

TRIED = 0.75  # share of a group's channels that stay
MOST_IMAGES = 64  # to fit, and as many others to test
_LEAST = 1e-12


def output_errors(
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
    portions = chunks(model, _after(images, len(fitted_on)).first(MOST_IMAGES))
    expected = _outputs(model, portions)
    found = {}
    for done, (name, order) in enumerate(orders.items(), 1):
        size = len(order.order)
        count = max(1, round(TRIED * size))
        cut = compensate(model, {name: order.kept(count)}, fitted_on)
        error = _distance(_outputs(cut, portions), expected)
        factor = error / max(float(order.errors[size - count]), _LEAST)
        found[name] = replace(order, errors=factor * order.errors)
        progress(done / len(orders))
    return found


def _after(images: Images, count: int) -> Images:
    """All but the first `count`: what the fit has not seen."""
    return Images({name: array[count:] for name, array in images.arrays.items()})


def _outputs(model: onnx.ModelProto, portions: Sequence[Arrays]) -> Arrays:
    """The outputs for all images."""
    names = [value.name for value in model.graph.output]
    parts = list(run_chunks(model, portions, names))
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _distance(some: Arrays, expected: Arrays) -> float:
    """The mean over the outputs of the squared difference over the variance between images."""
    shares = []
    for name, array in expected.items():
        whole = array.astype(np.float64)
        variance = float(np.square(whole - whole.mean(axis=0)).sum())
        shares.append(float(np.square(some[name] - whole).sum()) / max(variance, _LEAST))
    return float(np.mean(shares))
