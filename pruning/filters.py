"""Whole filters by magnitude, without images: every group of channels is cut to a share."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from topiarist.pruning.channel_order import filter_norms
from topiarist.pruning.channels import ChannelGroup, ChannelMap, Numbers, channel_map
from topiarist.pruning.masks import largest
from topiarist.pruning.shrink import shrink


def cut_filters(
    model: onnx.ModelProto, density: float, layer_density: Mapping[str, float]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """A smaller copy of the model, and for each layer that keeps all its filters the reason.

    Of each group of channels that can be cut the share `density` stays, or what `layer_density`
    says for a layer that makes them: those whose filters have the largest norm. Raises ValueError
    for a layer named there whose filters can't be cut, or two of a group that differ.
    """
    channels = channel_map(model)
    shares = _shares(channels, density, layer_density)
    kept: dict[str, Numbers] = {}
    for group in channels.groups:
        if group.reason_kept is None:
            stay = largest(filter_norms(channels, group), shares[group.name])
            kept[group.name] = stay.nonzero()[0]
    reasons = {}
    for item in channels.layers:
        own = _made_by(channels, item.layer.name)
        if all(len(kept.get(group.name, group.channels)) == group.size for group in own):
            reasons[item.layer.name] = own[0].reason_kept or _all(shares[own[0].name], own[0].size)
    return shrink(model, kept), reasons


def _shares(
    channels: ChannelMap, density: float, layer_density: Mapping[str, float]
) -> dict[str, float]:
    """Group -> the share that stays."""
    shares: dict[str, float] = {}
    for layer, share in layer_density.items():
        for group in _made_by(channels, layer):
            if group.reason_kept is not None and share < 1:
                raise ValueError(f"the filters of {layer} can't be cut: {group.reason_kept}")
            if shares.setdefault(group.name, share) != share:
                raise ValueError(
                    f"{layer} goes together with {', '.join(group.producers)}: one density for all"
                )
    return {group.name: shares.get(group.name, density) for group in channels.groups}


def _made_by(channels: ChannelMap, layer: str) -> list[ChannelGroup]:
    """The groups that the layer makes channels of."""
    return [group for group in channels.groups if layer in group.producers]


def _all(share: float, size: int) -> str:
    """Why no filter goes although they could."""
    return (
        "density 1 was asked for" if share == 1 else f"{share:g} of {size} filters is all of them"
    )
