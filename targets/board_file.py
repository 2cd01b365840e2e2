"""A board as a file: a few lines of TOML, each checked, become a target."""

from __future__ import annotations

import contextlib
import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs

from topiarist.errors import TargetError
from topiarist.targets import arm, fields, llvm
from topiarist.targets.cores import BY_MCPU
from topiarist.targets.spec import Cluster, TargetSpec

FOLDER = Path(__file__).parent / "boards"  # those that come with the package
SUFFIX = ".toml"
GENERIC = "generic"  # LLVM's name of what all cores of a triple have in common
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MOST_KIB = 1 << 20

_BOARD = {
    "model": fields.text(),
    "triple": fields.one_of(arm.SETS),
    "features": fields.some_of(arm.FEATURES),
    "compatible": fields.texts(),
    "l3_kib": fields.count(_MOST_KIB, least=0, required=False),
    "bandwidth_gbs": fields.amount(10_000, required=False),
    "cores": fields.tables(),
}
_CORES = {
    "mcpu": fields.text(),
    "count": fields.count(1024),
    "clock_ghz": fields.amount(10),
    "fma_per_cycle": fields.amount(16, required=False),
    "out_of_order": fields.flag(),
    "l1d_kib": fields.count(_MOST_KIB),
    "l2_kib": fields.count(_MOST_KIB),
}


@dataclass(frozen=True)
class Board:
    """A target, and the names by which a device tree gives the board away."""

    spec: TargetSpec
    compatible: tuple[str, ...]


@cache
def boards() -> tuple[Board, ...]:
    """The boards that come with the package."""
    return tuple(read(path) for path in sorted(FOLDER.glob(f"*{SUFFIX}")))


def user_folder() -> Path:
    """Where the user's own boards are, a file each."""
    return platformdirs.user_data_path("topiarist", appauthor=False) / "targets"


def users_files() -> list[Path]:
    """The files in the user's folder, by name."""
    return sorted(user_folder().glob(f"*{SUFFIX}"))


def board_of(compatible: Sequence[str]) -> Board | None:
    """The board that a device tree's names give away, the user's own ones first; else None."""
    known = [*_users_boards(), *boards()]
    return next((b for name in compatible for b in known if name in b.compatible), None)


def _users_boards() -> Iterator[Board]:
    """The user's, without the files that are wrong: `targets list` names these."""
    for path in users_files():
        with contextlib.suppress(TargetError):
            yield read(path)


def read(path: Path) -> Board:
    """The board of a file, named as the file is.

    Raises TargetError, which says what is wrong and what is allowed.
    """
    if not _NAME.fullmatch(path.stem):
        raise TargetError(
            f"{path}: the file's name is the target's, of small letters, digits, '-', '_' and '.'"
        )
    values = _load(path)
    fields.check(values, _BOARD, str(path))
    triple, features = values["triple"], values.get("features", [])
    if features and arm.SETS[triple] is not arm.NEON:
        raise TargetError(f"{path}: features are those of 64-bit cores; leave them out of {triple}")
    clusters = tuple(
        _cluster(cores, triple, f"{path}, cores {i}") for i, cores in enumerate(values["cores"], 1)
    )
    _check_order(clusters, path)
    first = values["cores"][0]
    spec = arm.target(
        *(path.stem, triple, clusters, features),
        model=values["model"],
        cache_bytes=(
            first["l1d_kib"] * arm.KIB,
            first["l2_kib"] * arm.KIB,
            values.get("l3_kib", 0) * arm.KIB,
        ),
        bandwidth_gbs=values.get("bandwidth_gbs"),
    )
    return Board(spec, tuple(values.get("compatible", ())))


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(f"can't read the target {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TargetError(f"{path} is no text in UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise TargetError(f"{path} is no TOML: {error}") from error


def _cluster(values: dict[str, Any], triple: str, place: str) -> Cluster:
    fields.check(values, _CORES, place)
    mcpu = values["mcpu"]
    core = BY_MCPU.get(mcpu)
    if core is None or not (core.aarch64 or arm.SETS[triple] is arm.NEON_V7):
        _check_mcpu(mcpu, triple, place)
    facts = {} if core is None else {"fma": core.fma_per_cycle, "order": core.out_of_order}
    fma = values.get("fma_per_cycle", facts.get("fma"))
    order = values.get("out_of_order", facts.get("order"))
    if fma is None or order is None:
        raise TargetError(
            f"{place}: of {mcpu} topiarist knows only the name: add fma_per_cycle (fused "
            "multiply-adds of four fp32 values that start in a cycle) and out_of_order (true or "
            "false)"
        )
    return Cluster(mcpu, values["count"], values["clock_ghz"], fma, order)


def _check_mcpu(mcpu: str, triple: str, place: str) -> None:
    known = llvm.processors(triple) | {GENERIC}
    if mcpu not in known:
        near = difflib.get_close_matches(mcpu, known, n=3) or sorted(known & BY_MCPU.keys())
        raise TargetError(
            f"{place}: LLVM has no mcpu {mcpu!r} for {triple}; it has {', '.join(near)} and others"
        )


def _check_order(clusters: tuple[Cluster, ...], path: Path) -> None:
    speeds = [(c.fma_per_cycle or 0.0) * (c.clock_ghz or 0.0) for c in clusters]
    if speeds != sorted(speeds, reverse=True):
        raise TargetError(f"{path}: put the fastest cores first, for code is made for them")
