"""Targets by name: the profiles, and `host` for this machine."""

from __future__ import annotations

import difflib

from topiarist.errors import TargetError
from topiarist.targets import arm, x86
from topiarist.targets.detect import detect
from topiarist.targets.spec import TargetSpec

HOST = "host"
_PROFILES = {spec.name: spec for spec in (*x86.PROFILES, *arm.PROFILES)}


def names() -> list[str]:
    """All target names; `host`, this machine, is the first."""
    return [HOST, *sorted(_PROFILES)]


def get(name: str) -> TargetSpec:
    """The target of this name. Raises TargetError, with the nearest names, for an unknown one."""
    if name == HOST:
        return detect()
    if name in _PROFILES:
        return _PROFILES[name]
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise TargetError(f"no target {name!r}; {hint}`topiarist targets list` shows them all")
