"""Checking what a person wrote in a file: every field, with what it may be."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from topiarist.errors import TargetError


@dataclass(frozen=True)
class Field:
    """A field of a table: `allowed` says in words which values `accepts` takes."""

    allowed: str
    accepts: Callable[[Any], bool]
    required: bool = True


def text() -> Field:
    """Some words on one line."""
    return Field("one line of text", _line)


def flag() -> Field:
    """Yes or no, which may be left out."""
    return Field("true or false", lambda v: isinstance(v, bool), required=False)


def one_of(values: Iterable[str]) -> Field:
    """One of some words."""
    words = tuple(values)
    return Field(f"one of {', '.join(words)}", lambda v: isinstance(v, str) and v in words)


def some_of(values: Iterable[str]) -> Field:
    """A list of some words, which may be left out."""
    words = tuple(values)
    return Field(f"a list of {', '.join(words)}", lambda v: _texts(v) and {*v} <= {*words}, False)


def texts() -> Field:
    """A list of any words, which may be left out."""
    return Field("a list of texts", _texts, required=False)


def count(most: int, *, least: int = 1, required: bool = True) -> Field:
    """A whole number."""
    return Field(
        f"a whole number from {least} to {most}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most,
        required,
    )


def amount(most: float, *, required: bool = True) -> Field:
    """A number above zero."""
    return Field(f"a number above 0, at most {most:g}", lambda v: _amount(v, most), required)


def tables() -> Field:
    """A list of tables, at least one."""
    return Field(
        "one or more tables ([[cores]])",
        lambda v: _list(v) and v != [] and all(isinstance(t, dict) for t in v),
    )


def check(values: Mapping[str, Any], fields: Mapping[str, Field], place: str) -> None:
    """Raise TargetError, naming the place, for the first field that is wrong."""
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise TargetError(f"{place}: there is no field {name!r}; {hint}")
    for name, field in fields.items():
        if name not in values:
            if field.required:
                raise TargetError(f"{place}: {name} is missing; it takes {field.allowed}")
        elif not field.accepts(values[name]):
            raise TargetError(f"{place}: {name} takes {field.allowed}, got {values[name]!r}")


def _list(value: object) -> bool:
    return isinstance(value, list)


def _line(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _texts(value: Any) -> bool:
    return _list(value) and all(isinstance(v, str) and v for v in value)


def _amount(value: Any, most: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 < value <= most
