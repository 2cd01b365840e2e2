"""What is wrong with a log, and what in it won't answer; nothing is changed."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from topiarist.errors import MissingRecordsError, NewerLogError, TuningLogError
from topiarist.tuning_logs.lines import Defect, no_log, raw_lines
from topiarist.tuning_logs.record import TuningRecord, horizon

CONTRADICTION = 1.3  # times of one measurement, on a steady machine, should lie closer
LINES_NAMED = 5


@dataclass(frozen=True)
class Current:
    """What records have to be of to count today; of other kernels than these nothing is said."""

    tvm: str
    kernel_versions: Mapping[str, int]
    target_prefix: str = ""  # of a target key: `x86/avx2/8/`; empty for any


@dataclass(frozen=True)
class CheckedLog:
    """The findings: `broken` lines can't be read; `notes` are each one line about the others."""

    path: Path
    records: int
    broken: tuple[Defect, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Read:
    line: int
    record: TuningRecord


def check_log(path: Path, current: Current) -> CheckedLog:
    """Read every line. Raises MissingRecordsError for no file and TuningLogError for no log."""
    found: list[_Read] = []
    broken: list[Defect] = []
    blank: list[int] = []
    end = 0
    with _opened(path) as file:
        for line in raw_lines(file):
            end = line.end
            if line.blank:
                blank.append(line.number)
                continue
            try:
                found.append(_Read(line.number, line.record()))
            except TuningLogError as error:
                newer = isinstance(error, NewerLogError)
                broken.append(Defect(path, line.number, str(error), newer))
        torn = file.seek(0, os.SEEK_END) - end
    if broken and not found and not any(defect.newer for defect in broken):
        raise no_log(broken[0])
    notes = [*_torn(torn), *_note(blank, "empty"), *_notes(found, current)]
    return CheckedLog(path, len(found), tuple(broken), tuple(notes))


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise MissingRecordsError(f"there is no tuning log {path}") from error
    except OSError as error:
        raise TuningLogError(f"can't read {path}: {error.strerror}") from error


def _torn(size: int) -> Iterator[str]:
    if size > 0:
        yield f"the last line is torn ({size} bytes): it is left out, and a writer moves it aside"


def _notes(found: Sequence[_Read], current: Current) -> Iterator[str]:
    yield from _note(_repeated(found), "the same record again")
    yield from _note(_backwards(found), "older than the line before: a clock went back, or two met")
    yield from _contradictions(found)
    limit = horizon()
    unusual: dict[str, list[int]] = defaultdict(list)
    for line, record in ((read.line, read.record) for read in found):
        what = record.input
        tvm, version = what.versions["apache-tvm"], current.kernel_versions.get(what.kernel)
        if record.timestamp > limit:
            unusual["from the future, so any other record is believed before"].append(line)
        if record.disturbed:
            unusual["measured while the machine drifted"].append(line)
        if not what.target_key.startswith(current.target_prefix):
            unusual[f"of another target, {what.target_key}"].append(line)
        if version not in (None, what.kernel_version):
            text = f"of {what.kernel} version {what.kernel_version}, which is now {version}"
            unusual[f"{text}: they don't answer"].append(line)
        if tvm != current.tvm:
            unusual[f"of TVM {tvm}, here is {current.tvm}: they only rank"].append(line)
    for text, lines in unusual.items():
        yield from _note(lines, text)


def _note(lines: Sequence[int], text: str) -> list[str]:
    """`3 lines: text (2, 5, 9)`; nothing without lines."""
    if not lines:
        return []
    named = ", ".join(map(str, lines[:LINES_NAMED]))
    more = ", ..." if len(lines) > LINES_NAMED else ""
    return [f"{len(lines)} line{'s' * (len(lines) > 1)}: {text} ({named}{more})"]


def _repeated(found: Iterable[_Read]) -> list[int]:
    seen: set[str] = set()
    lines = []
    for read in found:
        if read.record.id in seen:
            lines.append(read.line)
        seen.add(read.record.id)
    return lines


def _backwards(found: Sequence[_Read]) -> list[int]:
    return [b.line for a, b in pairwise(found) if b.record.timestamp < a.record.timestamp]


def _contradictions(found: Iterable[_Read]) -> Iterator[str]:
    """Measurements that were repeated on a steady machine and differ too much."""
    groups: dict[tuple[str, str], list[_Read]] = defaultdict(list)
    for read in found:
        record = read.record
        if record.status == "ok" and not record.disturbed:
            groups[record.measurement_key, record.measured].append(read)
    for group in groups.values():
        low = min(group, key=lambda read: read.record.run_us)
        high = max(group, key=lambda read: read.record.run_us)
        if high.record.run_us > CONTRADICTION * low.record.run_us:
            yield (
                f"lines {low.line} and {high.line}: one measurement took "
                f"{low.record.run_us:.1f} us and {high.record.run_us:.1f} us; the newer counts"
            )
