"""The lines of a log file: where they are, which are torn, and what is wrong with one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from topiarist.errors import TuningLogError
from topiarist.tuning_logs.record import TuningRecord, parse

LINE_LIMIT = 64 * 1024  # bytes; records have about 1000


class RawLine(NamedTuple):
    """A line as it is in the file; of one that is too long for a record, the beginning."""

    text: bytes
    start: int  # offset
    end: int
    number: int  # from 1
    ended: bool  # by a newline

    @property
    def blank(self) -> bool:
        """Whether nothing is on the line."""
        return not self.text.strip()

    def record(self) -> TuningRecord:
        """The record on the line. Raises TuningLogError saying what is wrong with it."""
        if len(self.text) >= LINE_LIMIT:
            raise TuningLogError(f"longer than {LINE_LIMIT} bytes")
        return TuningRecord.from_line(self.text)


@dataclass(frozen=True)
class Defect:
    """A line that is no record, or that only a newer version can read."""

    path: Path
    line: int
    problem: str
    newer: bool = False

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}: {self.problem}"


def no_log(first: Defect) -> TuningLogError:
    """The error for a file with lines of which none is a record; `first` is one of them."""
    return TuningLogError(f"{first.path} is no tuning log: line {first.line}: {first.problem}")


def raw_lines(file: BinaryIO, start: int = 0, ended: int = 0) -> Iterator[RawLine]:
    """The lines from an offset on, before which `ended` lines end; not a torn last one."""
    size = file.seek(0, os.SEEK_END)  # what is written from now on may look torn
    file.seek(start)
    number = ended
    while start < size:
        text = chunk = file.readline(min(size - start, LINE_LIMIT))
        end = start + len(chunk)
        while chunk and end < size and not chunk.endswith(b"\n"):
            chunk = file.readline(min(size - end, LINE_LIMIT))
            end += len(chunk)
        whole = chunk.endswith(b"\n")
        if not text or (not whole and is_torn(text)):
            return
        number += 1
        yield RawLine(text, start, end, number, whole)
        start = end


def is_torn(text: bytes) -> bool:
    """Whether an unended last line is the beginning of a record: no such beginning is JSON."""
    if len(text) >= LINE_LIMIT:
        return False
    try:
        parse(text)
    except ValueError:
        return True
    return False
