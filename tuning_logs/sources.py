"""Which logs are asked: the user's own, those beside it, and those that came with the package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import platformdirs

from topiarist.errors import MissingRecordsError, TopiaristError, TuningLogError
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.index import Level, Site
from topiarist.tuning_logs.lines import Defect
from topiarist.tuning_logs.record import Measured, MeasureInput, TuningRecord
from topiarist.tuning_logs.store import Match, TuningLog, Usable, anything

SUFFIX = ".jsonl"
SHIPPED = Path(__file__).parent  # has a folder of logs for each instruction set


class TuningLogs:
    """Several logs as one: the first is written to, the others only read.

    Of answers that are equally close that of the earlier log counts.
    """

    def __init__(self, own: TuningLog, others: Sequence[TuningLog] = ()) -> None:
        self.own = own
        self.logs = (own, *others)

    def append(self, records: Iterable[TuningRecord]) -> None:
        """Add records to the first log; see `TuningLog.append`."""
        self.own.append(records)

    @property
    def defects(self) -> list[Defect]:
        """The lines that reading has skipped."""
        return [defect for log in self.logs for defect in log.defects]

    def read(self) -> Iterator[TuningRecord]:
        """All records of all logs; see `read_all`."""
        return read_all(self.logs)

    def find(
        self,
        what: MeasureInput,
        measured: Measured = "alone",
        *,
        loosest: Level = "near",
        usable: Usable = anything,
    ) -> Match | None:
        """The record that answers best for a candidate; see `TuningLog.find`."""
        found = (log.find(what, measured, loosest=loosest, usable=usable) for log in self.logs)
        return min((match for match in found if match), key=lambda m: m.rank, default=None)

    def best(
        self,
        site: Site,
        measured: Measured = "alone",
        *,
        loosest: Level = "near",
        usable: Usable = anything,
    ) -> list[Match]:
        """The records that compete at a site, fastest first; see `TuningLog.best`."""
        found = (log.best(site, measured, loosest=loosest, usable=usable) for log in self.logs)
        return min((matches for matches in found if matches), key=lambda m: m[0].rank, default=[])

    def not_found(self, what: str) -> TopiaristError:
        """The error for records that are needed and missing; lines that can't be read may be they.

        `what` says which records. A MissingRecordsError, or a TuningLogError for a broken log.
        """
        if not self.defects:
            return MissingRecordsError(what)
        count = len(self.defects)
        lines = "a line" if count == 1 else f"{count} lines"
        return TuningLogError(
            f"{what}; but {lines} of the logs can't be read, see `topiarist log check`: "
            f"{self.defects[0]}"
        )

    def history(self, what: MeasureInput, measured: Measured = "alone") -> list[TuningRecord]:
        """All records of exactly this measurement, those of the first log last."""
        return [r for log in reversed(self.logs) for r in log.history(what, measured)]


def read_all(logs: Iterable[TuningLog]) -> Iterator[TuningRecord]:
    """The records of logs, one log after the other; repeated ones once."""
    seen = set()
    for log in logs:
        for record in log.read():
            if record.id not in seen:
                seen.add(record.id)
                yield record


def open_logs(path: Path | None, target: TargetSpec, *, shipped: bool = True) -> TuningLogs:
    """The logs to ask about a target: a path's, then those that came with the package.

    The path is one log (`*.jsonl`) or a folder: all logs in it are read, and the one named after
    the target's family is written. Without a path it is the user's own folder.
    """
    path = user_folder() if path is None else path
    own = default_log(target, path) if is_folder(path) else path
    beside = logs_in(path) if is_folder(path) else []
    others = [*beside, *(shipped_logs(target) if shipped else ())]
    return TuningLogs(TuningLog(own), [TuningLog(p) for p in others if p != own])


def is_folder(path: Path) -> bool:
    """Whether a path, which need not exist, is meant as a folder of logs."""
    return path.is_dir() or (path.suffix != SUFFIX and not path.is_file())


def user_folder() -> Path:
    """Where the user's logs are."""
    return platformdirs.user_data_path("topiarist", appauthor=False) / "tuning_logs"


def default_log(target: TargetSpec, folder: Path | None = None) -> Path:
    """The log for the target's family in a folder, the user's unless given."""
    return (user_folder() if folder is None else folder) / f"{target.family}{SUFFIX}"


def shipped_logs(target: TargetSpec, folder: Path = SHIPPED) -> list[Path]:
    """The committed logs for the target's instruction set."""
    return logs_in(folder / f"{target.family}-{target.isa}")


def logs_in(folder: Path) -> list[Path]:
    """The logs in a folder, by name."""
    return sorted(folder.glob(f"*{SUFFIX}"))
