"""Tuning logs: append-only files of records, one JSON line each, shared between processes.

A writer holds the lock file beside the log. Readers take no lock: what they see is a beginning of
the log, whose last line may be torn and is then left out.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import filelock
import platformdirs

from topiarist.errors import OutputError, TuningLogError
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.record import Measured, TuningRecord, parse

LINE_LIMIT = 64 * 1024  # bytes; records have about 1000
LOCK_TIMEOUT_S = 60.0
MARK_BYTES = 128  # before the place read up to, compared to notice a rewritten file
KEEP_BEST = 8


def default_log(target: TargetSpec, folder: Path | None = None) -> Path:
    """The user's log for the target's family; `folder` instead of the one for user data."""
    if folder is None:
        folder = platformdirs.user_data_path("topiarist", appauthor=False) / "tuning_logs"
    return folder / f"{target.family}.jsonl"


@dataclass(frozen=True)
class _Line:
    """A record, the offset where its line ends, and how many lines end up to there."""

    record: TuningRecord
    end: int
    ended: int


class TuningLog:
    """The log in one file, which need not exist yet. For one thread at a time.

    Reading raises TuningLogError naming the file and line of what can't be read; a torn last line
    is skipped. Writing raises OutputError and leaves the file as it was.
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

    def read(self) -> Iterator[TuningRecord]:
        """All records in the order of the file; none where there is no file."""
        with self._open() as file:
            for line in self._lines(file):
                yield line.record

    def lookup(self, measurement_key: str, measured: Measured = "alone") -> TuningRecord | None:
        """The newest record of exactly this measurement, whatever its status."""
        self._refresh()
        found = [r for r in self._by_key.get(measurement_key, ()) if r.measured == measured]
        return newest(found) if found else None

    def best(
        self,
        workload_key: str,
        target_key: str,
        *,
        layouts: tuple[str, str, str] | None = None,
        measured: Measured = "alone",
    ) -> list[TuningRecord]:
        """Records with a time of a workload on a target, fastest first.

        Of repeated measurements the newest counts. `layouts` leaves only those between them.
        """
        self._refresh()
        found = self._by_workload.get((workload_key, target_key), ())
        current = _latest(r for r in found if r.measured == measured)
        fitting = (r for r in current if r.status == "ok" and layouts in (None, r.input.layouts))
        return sorted(fitting, key=lambda r: (r.run_us, r.id))

    def merge(self, paths: Iterable[Path]) -> int:
        """Make this log the union with others and return how many records came in.

        The file is written anew, ordered by time and id, so that it doesn't matter which log is
        merged into which. Raises TuningLogError for a log that is missing.
        """
        others = [record for path in paths for record in _existing(path).read()]
        with self._writing():
            before = {record.id for record in self.read()}
            union = sort_union([*self.read(), *others])
            self._rewrite(union)
        return len(union) - len(before)

    def compact(self, keep_best: int = KEEP_BEST) -> int:
        """Leave out what newer or faster records outdo, and return how many records went.

        Of repeated measurements the newest stays. Then, for each workload, layouts, target and
        kernel (of one version, on one TVM), the `keep_best` fastest stay, and all that failed.
        """
        if keep_best < 1:
            raise ValueError(f"keep_best must be at least 1, got {keep_best}")
        with self._writing():
            records = list(self.read())
            kept = _outstanding(records, keep_best)
            self._rewrite(kept)
        return len(records) - len(kept)

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file for reading, or an empty one where there is none."""
        try:
            with self.path.open("rb") as file:
                yield file
        except FileNotFoundError:
            yield BytesIO()
        except OSError as error:
            raise TuningLogError(f"can't read {self.path}: {error.strerror}") from error

    def _lines(self, file: BinaryIO, start: int = 0, ended: int = 0) -> Iterator[_Line]:
        """The lines from an offset on, before which `ended` lines end."""
        left = file.seek(0, os.SEEK_END) - start  # what is written from now on may look torn
        file.seek(start)
        while left > 0:
            raw = file.readline(min(left, LINE_LIMIT))
            left -= len(raw)
            whole = raw.endswith(b"\n")
            if not raw or (not whole and not left and _is_torn(raw)):
                return
            record = self._decode(raw, ended + 1) if raw.strip() else None
            start += len(raw)
            ended += whole
            if record is not None:
                yield _Line(record, start, ended)

    def _decode(self, raw: bytes, number: int) -> TuningRecord:
        where = f"{self.path}, line {number}"
        if len(raw) >= LINE_LIMIT:
            raise TuningLogError(f"{where} is longer than {LINE_LIMIT} bytes: no tuning log?")
        try:
            return TuningRecord.from_line(raw)
        except TuningLogError as error:
            remedy = "" if "upgrade" in str(error) else "; delete the line or restore the file"
            raise TuningLogError(f"{where}: {error}{remedy}") from error

    def _forget(self) -> None:
        self._by_key: dict[str, list[TuningRecord]] = defaultdict(list)
        self._by_workload: dict[tuple[str, str], list[TuningRecord]] = defaultdict(list)
        self._end = self._ended = 0  # the offset read up to, and the lines that end before it
        self._mark = b""
        self._seen: tuple[int, ...] = ()

    def _refresh(self) -> None:
        """Bring the index up to date with the file, by reading only what is new."""
        seen = _identity(self.path)
        if seen == self._seen:
            return
        with self._open() as file:
            same_file = seen[:2] == self._seen[:2]
            if not same_file or self._before_end(file) != self._mark:  # replaced, or cut
                self._forget()
            for line in self._lines(file, self._end, self._ended):
                what = line.record.input
                self._by_key[what.key].append(line.record)
                self._by_workload[what.workload_key, what.target_key].append(line.record)
                self._end, self._ended = line.end, line.ended
            self._mark = self._before_end(file)
        self._seen = seen

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
            if not _is_torn(tail):
                _write_all(file, b"\n")
                return
            with Path(f"{self.path}.torn").open("ab", buffering=0) as side:
                _write_all(side, tail + b"\n")
            file.truncate(file.seek(0, os.SEEK_END) - len(tail))

    def _rewrite(self, records: list[TuningRecord]) -> None:
        """Replace the file in one step."""
        aside = Path(f"{self.path}.new")
        try:
            with aside.open("wb", buffering=0) as file:
                if self.path.exists():
                    aside.chmod(self.path.stat().st_mode)
                _write_all(file, b"".join(map(_encode, records)))
            aside.replace(self.path)
        except OSError:
            with suppress(OSError):
                aside.unlink()
            raise
        _sync_folder(self.path.parent)


def newest(records: Iterable[TuningRecord]) -> TuningRecord:
    """The last one measured; of those of one second the last one given."""
    chosen: TuningRecord | None = None
    for record in records:
        if chosen is None or record.timestamp >= chosen.timestamp:
            chosen = record
    if chosen is None:
        raise ValueError("there is no newest of no records")
    return chosen


def sort_union(records: Iterable[TuningRecord]) -> list[TuningRecord]:
    """Each record once, ordered by time and id."""
    unique = {record.id: record for record in records}
    return sorted(unique.values(), key=lambda r: (r.timestamp, r.id))


def _latest(records: Iterable[TuningRecord]) -> list[TuningRecord]:
    """The newest record of each measurement."""
    groups: dict[tuple[str, str], list[TuningRecord]] = defaultdict(list)
    for record in records:
        groups[record.measurement_key, record.measured].append(record)
    return [newest(group) for group in groups.values()]


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
        raise TuningLogError(f"there is no tuning log {path}")
    return TuningLog(path)


def _encode(record: TuningRecord) -> bytes:
    line = record.to_line().encode() + b"\n"
    if len(line) >= LINE_LIMIT:
        raise ValueError(f"a record has {len(line)} bytes, more than {LINE_LIMIT}")
    return line


def _is_torn(raw: bytes) -> bool:
    """Whether an unended last line is the beginning of a record: no such beginning is JSON."""
    if len(raw) >= LINE_LIMIT:
        return False
    try:
        parse(raw)
    except ValueError:
        return True
    return False


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


def _identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a crash, where the file system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
