"""The profile: a text file with the level of each layer, one a line.

The form is that of SPDY (ICML 2022): the share of zeros, a space, the layer. A pattern other than
unstructured follows the share after a comma:

    0.88 layer1.0.conv1
    0.75,block4x1 layer1.0.conv2
    0 layer1.1.conv1
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path

from topiarist.errors import ProfileError
from topiarist.pruning.level import DENSE, Level

_UNSTRUCTURED = "unstructured"


def write_profile(path: str | Path, levels: Mapping[str, Level]) -> None:
    """Write the levels, in their order. Raises ValueError for a layer that is no single line."""
    for layer in levels:
        if len(layer.splitlines()) != 1 or layer != layer.strip():
            raise ValueError(f"layer {layer!r} can't be written to one line of a profile")
    lines = [f"{_level_text(level)} {layer}\n" for layer, level in levels.items()]
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_profile(path: str | Path) -> dict[str, Level]:
    """The level of each layer, in the order of the file; empty lines don't count.

    Raises ProfileError for a file that can't be read, and for the first wrong line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"The profile {path} can't be read: {error}.") from None
    levels: dict[str, Level] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        level_text, _, layer = line.strip().partition(" ")
        layer = layer.strip()
        level = _parse_level(level_text)
        where = f"{path}, line {number}"
        if level is None or not layer:
            raise ProfileError(
                f"{where}: {line.strip()!r} is not the share of zeros, 0 to below 1, perhaps with "
                "a pattern, and a layer, such as `0.88 conv1` or `0.75,block4x1 conv1`."
            )
        if layer in levels:
            raise ProfileError(
                f"{where}: the layer {layer!r} has a line above; remove one of them."
            )
        levels[layer] = level
    return levels


def _level_text(level: Level) -> str:
    """Decimals: 1 - 0.12 is to be read back as 0.12."""
    zeros = f"{1 - Decimal(repr(level.density)):f}"
    return zeros if level.pattern in (DENSE.pattern, _UNSTRUCTURED) else f"{zeros},{level.pattern}"


def _parse_level(text: str) -> Level | None:
    """The level, or None for a text that is none."""
    share, comma, pattern = text.partition(",")
    try:
        zeros = Decimal(share)
    except InvalidOperation:
        return None
    if not zeros.is_finite() or not 0 <= zeros < 1 or bool(comma) != bool(pattern):
        return None
    if not zeros and not pattern:
        return DENSE
    return Level(pattern or _UNSTRUCTURED, float(1 - zeros))
