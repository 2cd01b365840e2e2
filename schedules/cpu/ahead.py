"""Fetching dense weights before they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from topiarist.schedules.cpu import emit

LINE = 16  # values of a cache line


def one_per_unit(steps: Iterable[int], unit: int) -> list[int]:
    """The positions that lie `unit` or more behind the one taken before them."""
    taken: list[int] = []
    for step in steps:
        if not taken or abs(step - taken[-1]) >= unit:
            taken.append(step)
    return taken


@dataclass(frozen=True)
class Ahead:
    """While a panel of weights is used, the next one is fetched into the second-level cache.

    Weights are read once per run of a network and come from memory. A panel is used for `turns`
    tiles, each of which asks for its part of the next panel: `lines` cache lines every `channels`
    input channels.
    """

    channels: int
    lines: int
    parts: int
    panel_size: int

    @staticmethod
    def of(in_block: int, per_channel: int, turns: int) -> Ahead:
        """For `per_channel` values of each input channel."""
        near = max(1, LINE * turns // per_channel)
        channels = max(d for d in range(1, in_block + 1) if in_block % d == 0 and d <= near)
        lines = -(-channels * per_channel // (LINE * turns))
        return Ahead(channels, lines, in_block // channels, in_block * per_channel)

    def emit(self, weights: Any, panel: Any, turn: Any, part: Any) -> None:
        """The requests before a part of the channels."""
        for i in range(self.lines):
            line = (turn * self.parts + part) * self.lines + i
            emit.prefetch(weights, panel + self.panel_size + line * LINE, level=2)
