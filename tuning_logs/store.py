"""Tuning logs: append-only files of records, one JSON line each, shared between processes.

A writer holds the lock file beside the log. Readers take no lock: what they see is a beginning of
the log, whose last line may be torn and is then left out.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import filelock

from topiarist.errors import MissingRecordsError, NewerLogError, OutputError, TuningLogError
from topiarist.tuning_logs.index import (
    LEVELS,
    Asked,
    Entry,
    Index,
    Level,
    Rank,
    Site,
    in_json,
)
from topiarist.tuning_logs.lines import LINE_LIMIT, Defect, RawLine, is_torn, no_log, raw_lines
from topiarist.tuning_logs.record import Measured, MeasureInput, TuningRecord, horizon

LOCK_TIMEOUT_S = 60.0
MARK_BYTES = 128  # before the place read up to, compared to notice a rewritten file
KEEP_BEST = 8


Usable = Callable[[TuningRecord], bool]


def anything(_: TuningRecord) -> bool:
    """Every record is usable."""
    return True


@dataclass(frozen=True)
class Match:
    """A record that answers for what was asked, and how well.

    `exact` is the same measurement. `near` is of a workload with the same shape and pattern whose
    density differs by `density_gap`, at most 0.02. `other TVM` and `other device` may differ in
    density too; their times only rank.
    """

    record: TuningRecord
    rank: Rank

    @property
    def level(self) -> Level:
        """In what it differs at most."""
        return LEVELS[self.rank.level]

    @property
    def density_gap(self) -> float:
        """Between the two workloads."""
        return self.rank.density_gap

    def __str__(self) -> str:
        what = self.record.input
        differs = {
            "exact": "",
            "near": f" (density {what.sparsity.get('density')})",
            "other TVM": f" ({what.versions['apache-tvm']})",
            "other device": f" ({' '.join((what.target.device_model, what.target.cores)).strip()})",
        }
        return self.level + differs[self.level]


class TuningLog:
    """The log in one file, which need not exist yet. For one thread at a time.

    Lines that can't be read are skipped and named in `defects`; what is no log at all raises
    TuningLogError. A torn last line is skipped. Writing raises OutputError and leaves the file as
    it was.
    """

    def __init__(self, path: Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self.path = Path(path).resolve()
        self._lock = filelock.FileLock(f"{self.path}.lock", timeout=lock_timeout_s)
        self._forget()

    def append(self, records: Iterable[TuningRecord]) -> None:
        """Add records at the end, all or none; they are on the disk when this returns."""
        lines = [_encode(record) for record in records]
        if not lines:
            return
        with self._writing():
            created = not self.path.exists()
            with self.path.open("ab", buffering=0) as file:
                _write_all(file, b"".join(lines))
            if created:
                _sync_folder(self.path.parent)

    @property
    def defects(self) -> list[Defect]:
        """The lines that reading has skipped, in order."""
        return [self._defects[line] for line in sorted(self._defects)]

    def read(self) -> Iterator[TuningRecord]:
        """All records in the order of the file; none where there is no file."""
        with self._open() as file:
            count = 0
            self._defects.clear()
            for line in raw_lines(file):
                record = None if line.blank else self._decode(line)
                if record is not None:
                    count += 1
                    yield record
            self._check_is_log(count)

    def read_whole(self) -> list[TuningRecord]:
        """All records. Raises TuningLogError if a line can't be read, and so would be lost."""
        records = list(self.read())
        for defect in self.defects:
            if defect.newer:
                raise NewerLogError(str(defect))
            raise TuningLogError(f"{defect}; `topiarist log check --repair` moves it aside")
        return records

    def find(
        self,
        what: MeasureInput,
        measured: Measured = "alone",
        *,
        loosest: Level = "near",
        usable: Usable = anything,
    ) -> Match | None:
        """The record that answers best for a candidate, whatever its status.

        Of repeated measurements the newest that the machine was steady for. Microseconds, but for
        the first call, which reads the file.
        """
        with self._current() as file:
            asked = Asked.of(Site.of(what))
            fitting = _fitting(self._index.of_candidate(what), asked, measured, loosest)
            for rank, entry in fitting:
                record = self._record(file, entry)
                if record is not None and usable(record):
                    return Match(record, rank)
        return None

    def best(
        self,
        site: Site,
        measured: Measured = "alone",
        *,
        loosest: Level = "near",
        usable: Usable = anything,
    ) -> list[Match]:
        """The records with a time that compete at a site, fastest first, one per candidate.

        They are all of one workload, device and version of TVM, so that their times compare: the
        closest that has any `usable` one.
        """
        with self._current() as file:
            asked = Asked.of(site)
            groups: dict[tuple[Rank, *tuple[bytes, ...]], list[Entry]] = defaultdict(list)
            for rank, entry in _fitting(self._index.of_site(asked), asked, measured, loosest):
                place = (entry.device, entry.cores, entry.tvm, entry.workload)
                groups[(rank, *place)].append(entry)
            for key in sorted(groups):
                records = filter(usable, self._last_of_each(file, groups[key]))
                ordered = sorted(records, key=lambda r: (r.run_us, r.id))
                if ordered:
                    return [Match(record, key[0]) for record in ordered]
        return []

    def history(self, what: MeasureInput, measured: Measured = "alone") -> list[TuningRecord]:
        """All records of exactly this measurement, what to believe last."""
        with self._current() as file:
            asked = Asked.of(Site.of(what))
            fitting = _fitting(self._index.of_candidate(what), asked, measured, "exact")
            found = [self._record(file, entry) for _, entry in fitting]
        return [record for record in reversed(found) if record is not None]

    def merge(self, paths: Iterable[Path]) -> int:
        """Make this log the union with others and return how many records came in.

        The file is written anew, ordered by time and id, so that it doesn't matter which log is
        merged into which. Raises MissingRecordsError for a log that isn't there and
        TuningLogError for one with a broken line.
        """
        others = [record for path in paths for record in _existing(path).read_whole()]
        with self._writing():
            own = self.read_whole()
            union = sort_union([*own, *others])
            self._rewrite(map(_encode, union))
        return len(union) - len({record.id for record in own})

    def compact(self, keep_best: int = KEEP_BEST) -> int:
        """Leave out what newer or faster records outdo, and return how many records went.

        Of repeated measurements the most credible stays. Then, for each workload, layouts, target
        and kernel (of one version, on one TVM), the `keep_best` fastest stay, and all that failed.
        """
        if keep_best < 1:
            raise ValueError(f"keep_best must be at least 1, got {keep_best}")
        with self._writing():
            records = self.read_whole()
            kept = _outstanding(records, keep_best)
            self._rewrite(map(_encode, kept))
        return len(records) - len(kept)

    def repair(self) -> int:
        """Move the lines that are no records to `*.broken` and return how many there were.

        Lines of a newer schema stay. Raises TuningLogError for what is no log.
        """
        with self._writing():
            list(self.read())
            broken = {defect.line for defect in self.defects if not defect.newer}
            if broken:
                moved, kept = self._parted(broken)
                with Path(f"{self.path}.broken").open("ab", buffering=0) as side:
                    _write_all(side, b"".join(moved))
                self._rewrite(kept)
        return len(broken)

    def _parted(self, numbers: Set[int]) -> tuple[list[bytes], list[bytes]]:
        """The lines of these numbers, whole, and all others."""
        picked: list[bytes] = []
        others: list[bytes] = []
        with self._open() as file:
            for line in list(raw_lines(file)):
                file.seek(line.start)
                text = file.read(line.end - line.start)
                (picked if line.number in numbers else others).append(text)
        return picked, others

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file for reading, or an empty one where there is none."""
        try:
            file: BinaryIO = self.path.open("rb") if self.path.exists() else BytesIO()
            with file:
                yield file
        except OSError as error:
            raise TuningLogError(f"can't read {self.path}: {error.strerror or error}") from error

    def _forget(self) -> None:
        self._index = Index()
        self._records: dict[int, TuningRecord | None] = {}  # by offset
        self._defects: dict[int, Defect] = {}  # by line
        self._end = self._ended = 0  # the offset read up to, and the lines that end before it
        self._mark = b""
        self._seen: tuple[int, ...] = ()

    @contextmanager
    def _current(self) -> Iterator[BinaryIO]:
        """The file for reading, and the index up to date with it."""
        with self._open() as file:
            self._refresh(file)
            yield file

    def _refresh(self, file: BinaryIO) -> None:
        """Bring the index up to date with the file, by reading only what is new."""
        seen = _identity(file)
        if seen == self._seen:
            return
        same_file = seen[:2] == self._seen[:2]
        if not same_file or self._before_end(file) != self._mark:  # replaced, or cut
            self._forget()
        for line in raw_lines(file, self._end, self._ended):
            if not line.blank and not self._index.add_line(line.text, line.start, line.number):
                record = self._decode(line)
                if record is not None:
                    self._index.add_record(record, line.start, len(line.text), line.number)
            self._end, self._ended = line.end, line.number - (not line.ended)
        self._check_is_log(len(self._index))
        self._mark = self._before_end(file)
        self._seen = seen

    def _record(self, file: BinaryIO, entry: Entry) -> TuningRecord | None:
        """The record of an entry, None if it turns out to be no record."""
        if entry.start not in self._records:
            file.seek(entry.start)
            text = file.read(entry.size)
            line = RawLine(text, entry.start, entry.start + entry.size, entry.number, True)
            record = self._decode(line)
            if record is not None and not self._index.holds(record, entry):
                record = None
            self._records[entry.start] = record
        return self._records[entry.start]

    def _last_of_each(self, file: BinaryIO, entries: list[Entry]) -> list[TuningRecord]:
        """Of each candidate's entries, the first that is a record, if it has a time."""
        found: dict[int, TuningRecord] = {}
        for entry in entries:
            if entry.candidate not in found:
                record = self._record(file, entry)
                if record is not None:
                    found[entry.candidate] = record
        return [record for record in found.values() if record.status == "ok"]

    def _decode(self, line: RawLine) -> TuningRecord | None:
        """The record on a line, or None and a defect."""
        try:
            return line.record()
        except TuningLogError as error:
            newer = isinstance(error, NewerLogError)
            self._defects[line.number] = Defect(self.path, line.number, str(error), newer)
            return None

    def _check_is_log(self, records: int) -> None:
        """Raise TuningLogError for a file with lines of which none is a record."""
        broken = [defect for defect in self.defects if not defect.newer]
        if broken and not records:
            raise no_log(broken[0])

    def _before_end(self, file: BinaryIO) -> bytes:
        """The bytes before the offset that the index was read up to."""
        first = max(0, self._end - MARK_BYTES)
        file.seek(first)
        return file.read(self._end - first)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock, the last line mended; failures to write become OutputError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._mend_tail()
                yield
        except filelock.Timeout as error:
            raise OutputError(
                f"another process is writing {self.path}; try again when it has finished"
            ) from error
        except OSError as error:
            raise OutputError(
                f"can't write {self.path}: {error.strerror or error}; "
                "make room or permit writing, or name another log"
            ) from error

    def _mend_tail(self) -> None:
        """End the last line: with a newline if it is whole, else by moving it to `*.torn`."""
        if not self.path.exists():
            return
        with self.path.open("r+b", buffering=0) as file:
            tail = _tail(file, self.path)
            if not tail:
                return
            if not is_torn(tail):
                _write_all(file, b"\n")
                return
            with Path(f"{self.path}.torn").open("ab", buffering=0) as side:
                _write_all(side, tail + b"\n")
            file.truncate(file.seek(0, os.SEEK_END) - len(tail))

    def _rewrite(self, lines: Iterable[bytes]) -> None:
        """Replace the file in one step."""
        aside = Path(f"{self.path}.new")
        try:
            with aside.open("wb", buffering=0) as file:
                if self.path.exists():
                    aside.chmod(self.path.stat().st_mode)
                _write_all(file, b"".join(lines))
            aside.replace(self.path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        _sync_folder(self.path.parent)


def most_credible(records: Iterable[TuningRecord]) -> TuningRecord:
    """Of repeated measurements the one to believe; of equals the last one given."""
    limit = horizon()
    return max(reversed(list(records)), key=lambda record: record.credit(limit))


def sort_union(records: Iterable[TuningRecord]) -> list[TuningRecord]:
    """Each record once, ordered by time and id."""
    unique = {record.id: record for record in records}
    return sorted(unique.values(), key=lambda r: (r.timestamp, r.id))


def _latest(records: Iterable[TuningRecord]) -> list[TuningRecord]:
    """The record to believe of each measurement."""
    groups: dict[tuple[str, str], list[TuningRecord]] = defaultdict(list)
    for record in records:
        groups[record.measurement_key, record.measured].append(record)
    return [most_credible(group) for group in groups.values()]


def _outstanding(records: list[TuningRecord], keep_best: int) -> list[TuningRecord]:
    groups: dict[tuple[object, ...], list[TuningRecord]] = defaultdict(list)
    kept = set()
    for record in _latest(records):
        what = record.input
        task = (what.workload_key, what.layouts, what.target_key, record.measured)
        kernel = (what.kernel, what.kernel_version, what.versions["apache-tvm"])
        if record.status == "ok":
            groups[*task, *kernel].append(record)
        else:
            kept.add(record.id)
    for group in groups.values():
        best = sorted(group, key=lambda r: (r.run_us, r.id))[:keep_best]
        kept.update(record.id for record in best)
    unique = {record.id: record for record in records}
    return [record for record in unique.values() if record.id in kept]


def _existing(path: Path) -> TuningLog:
    if not path.is_file():
        raise MissingRecordsError(f"there is no tuning log {path}")
    return TuningLog(path)


def _encode(record: TuningRecord) -> bytes:
    line = record.to_line().encode() + b"\n"
    if len(line) >= LINE_LIMIT:
        raise ValueError(f"a record has {len(line)} bytes, more than {LINE_LIMIT}")
    return line


def _tail(file: BinaryIO, path: Path) -> bytes:
    """What follows the last newline. Raises OutputError where that is too long for a record."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LINE_LIMIT))
    tail = file.read(LINE_LIMIT).rpartition(b"\n")[2]
    if len(tail) >= LINE_LIMIT:
        raise OutputError(f"{path} is no tuning log: its last line is too long; name another")
    return tail


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write at the end of an unbuffered file, or leave it as it was and raise OSError."""
    size = file.seek(0, os.SEEK_END)
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            file.truncate(size)
        raise


def _identity(file: BinaryIO) -> tuple[int, ...]:
    """What changes when a file is written or replaced; empty where there is no file."""
    if isinstance(file, BytesIO):
        return ()
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _fitting(
    entries: Iterable[Entry], asked: Asked, measured: Measured, loosest: Level
) -> list[tuple[Rank, Entry]]:
    """The entries that may answer, the closest first, and of those the most credible."""
    wanted, worst = in_json(measured), LEVELS.index(loosest)
    ranked = [
        (rank, entry)
        for entry in entries
        if entry.measured == wanted and (rank := asked.rank(entry)) is not None and rank[0] <= worst
    ]
    limit = in_json(horizon())
    ranked.sort(key=lambda found: found[1].credit(limit), reverse=True)
    return sorted(ranked, key=lambda found: found[0])


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a crash, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
