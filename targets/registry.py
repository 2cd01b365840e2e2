"""Targets by name: `host` for this machine, the profiles, the boards, and the user's own."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

from topiarist.errors import TargetError
from topiarist.targets import board_file, cuda, x86
from topiarist.targets.detect import detect
from topiarist.targets.spec import TargetSpec

HOST = "host"


def names() -> list[str]:
    """All target names: `host`, this machine, then family by family; the user's are the last."""
    return [HOST, *built_in(), *_of_users_folder()]


def get(name: str) -> TargetSpec:
    """The target of this name, or in this file (`*.toml`).

    Raises TargetError, with the nearest names, for an unknown one, and for a file that is wrong.
    """
    if name == HOST:
        return detect()
    if name.endswith(board_file.SUFFIX):
        return _of_user(Path(name))
    if name in built_in():
        return built_in()[name]
    if found := _of_users_folder().get(name):
        return _of_user(found)
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise TargetError(f"no target {name!r}; {hint}`topiarist targets list` shows them all")


@cache
def built_in() -> dict[str, TargetSpec]:
    """The targets that come with the package, by name."""
    specs = (*x86.PROFILES, *cuda.PROFILES, *(board.spec for board in board_file.boards()))
    return {spec.name: spec for spec in specs}


def _of_user(path: Path) -> TargetSpec:
    if path.stem == HOST or path.stem in built_in():
        raise TargetError(f"{path}: {path.stem} is a target already; give the file another name")
    return board_file.read(path).spec


def _of_users_folder() -> dict[str, Path]:
    """The user's files by name; one with a name that is taken by its path, to be complained of."""
    files = board_file.users_files()
    taken = {HOST, *built_in()}
    return {str(p) if p.stem in taken else p.stem: p for p in files}
