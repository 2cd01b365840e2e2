"""`topiarist log`: what is in tuning logs, and keeping them in order."""

from __future__ import annotations

import io
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topiarist.compiler.cli_output import (
    BROKEN_LOG,
    Debug,
    Json,
    command,
    complain,
    print_json,
    print_table,
    say,
)
from topiarist.compiler.output_file import write_file
from topiarist.compiler.runtime import versions
from topiarist.errors import MissingRecordsError, OutputError, TuningLogError
from topiarist.targets import registry
from topiarist.tuning_logs.sources import SHIPPED, is_folder, logs_in, read_all, user_folder
from topiarist.tuning_logs.store import KEEP_BEST, TuningLog

if TYPE_CHECKING:
    from topiarist.tuning_logs.check import CheckedLog, Current
    from topiarist.tuning_logs.record import TuningRecord
    from topiarist.tuning_logs.table import Contest

app = typer.Typer(no_args_is_help=True, help="What is in tuning logs, and keeping them in order.")


class Form(StrEnum):
    """What records can be written as."""

    CSV = "csv"
    METASCHEDULE = "metaschedule"


Logs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[LOG]...",
        help="Logs, or folders of them. Without any: the user's, then those of the package.",
    ),
]
Log = Annotated[Path, typer.Argument(metavar="LOG", help="The log, a .jsonl file.")]


@app.command("list")
@command
def list_logs(logs: Logs = None, as_json: Json = False, debug: Debug = False) -> None:
    """List the workloads that were tuned, and the fastest kernel of each."""
    from topiarist.tuning_logs.table import contests

    opened = _open(logs)
    found = contests(read_all(opened))
    if as_json:
        defects = [str(defect) for log in opened for defect in log.defects]
        paths = [str(log.path) for log in opened]
        print_json({"logs": paths, "workloads": [asdict(c) for c in found], "skipped": defects})
        return
    print_table(
        ["workload", "layer", "density", "pattern", "target", "measured", "tried", "failed",
         "best us", "kernel", "newest"],
        [_contest_row(contest) for contest in found],
    )  # fmt: skip
    say(f"{sum(c.records for c in found)} records in {_count(len(opened), 'log')}")
    _name_defects(opened)


@app.command("show")
@command
def show_records(
    key: Annotated[str, typer.Argument(help="A workload as listed, or a record; a beginning.")],
    logs: Logs = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the records of one workload, the fastest first, or one record.

    Exit code 3 if there are none.
    """
    from topiarist.tuning_logs.table import row

    opened = _open(logs)
    found = [r for r in read_all(opened) if _is_meant(r, key)]
    if not found:
        _name_defects(opened)
        raise MissingRecordsError(f"no record and no workload begins with {key!r}: see `log list`")
    found.sort(key=lambda record: (record.run_us, record.id))
    if as_json:
        print_json({"records": [row(r) | {"seconds": r.seconds} for r in found]})
        return
    print_table(
        ["record", "us", "slowest us", "kernel", "version", "config", "layouts", "target", "TVM",
         "measured", "status", "drift", "when"],
        [_record_row(record) for record in found],
    )  # fmt: skip
    _name_defects(opened)


@app.command("merge")
@command
def merge_logs(
    log: Log,
    others: Annotated[
        list[Path], typer.Argument(metavar="OTHER...", help="Logs, or folders of them.")
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add the records of other logs to a log, each once, ordered by time."""
    came = TuningLog(log).merge(_files(others))
    if as_json:
        print_json({"log": str(log), "added": came})
    else:
        say(f"{_count(came, 'record')} came into {log}")


@app.command("compact")
@command
def compact_log(
    log: Log,
    keep: Annotated[
        int, typer.Option(min=1, help="How many of the fastest stay, of each kernel at each place.")
    ] = KEEP_BEST,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Drop the records that newer or faster ones outdo."""
    if not log.exists():
        raise MissingRecordsError(f"there is no tuning log {log}")
    went = TuningLog(log).compact(keep)
    if as_json:
        print_json({"log": str(log), "dropped": went})
    else:
        say(f"{_count(went, 'record')} went from {log}")


@app.command("check")
@command
def check_logs(
    logs: Logs = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Name records that are of another target.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move broken lines to LOG.broken.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Name every line that can't be read, and what else is odd; exit code 4 for broken lines."""
    from topiarist.tuning_logs.check import check_log

    current = _current(target)
    paths = _files(logs) if logs else _default_files()
    checked = []
    for path in paths:
        moved = TuningLog(path).repair() if repair and path.exists() else 0
        checked.append((check_log(path, current), moved))
    if as_json:
        print_json({"logs": [_checked_json(*found) for found in checked]})
    else:
        for found in checked:
            _say_checked(*found)
    if any(log.broken for log, _ in checked):
        raise typer.Exit(BROKEN_LOG)


@app.command("export")
@command
def export_logs(
    logs: Logs = None,
    form: Annotated[
        Form, typer.Option("--format", help="csv: all records. metaschedule: those from TVM.")
    ] = Form.CSV,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file, or a new folder for metaschedule."),
    ] = None,
    mcpu: Annotated[
        str | None, typer.Option(help="metaschedule: only records for this processor (LLVM's name)")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the records as a table (CSV, to stdout without -o), or a MetaSchedule database."""
    opened = _open(logs)
    if form is Form.METASCHEDULE:
        if output is None:
            raise ValueError("--format metaschedule needs a folder: -o DIR")
        document = _export_database(opened, output, mcpu)
    else:
        document = _export_csv(opened, output, to_stdout=not as_json)
    if as_json:
        print_json(document)
    elif output is not None:
        say(f"wrote {_count(document['records'], 'record')} to {output}")
        if document["left_out"]:
            complain(f"left out {_count(document['left_out'], 'record')}: no schedules of TVM")
    _name_defects(opened)


@app.command("import")
@command
def import_database(
    database: Annotated[Path, typer.Argument(metavar="DIR", help="A MetaSchedule work folder.")],
    into: Annotated[Path, typer.Option("--into", help="The log to add to.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="Where it was tuned; host: on this machine.")
    ] = registry.HOST,
    mcpu: Annotated[
        str | None, typer.Option(help="Take records for this processor, LLVM's name of it.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that it was tuned with, if it doesn't say.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add the records of a MetaSchedule database to a log; broken lines are named and skipped."""
    from topiarist.tuning_logs.metaschedule import Expected, read_database

    expected = Expected.of(registry.get(target), mcpu, threads)
    found = read_database(database, expected)
    skipped = [str(defect) for defect in (*found.broken, *found.foreign)]
    for text in skipped:
        complain(f"skipped {text}")
    if found.broken and not found.records:
        raise TuningLogError(f"no record of {database} can be read")
    if not found.records:
        raise MissingRecordsError(f"{database} has no record for {target}")
    log = TuningLog(into)
    known = {record.id for record in log.read()}
    new = {record.id: record for record in found.records if record.id not in known}
    log.append(new.values())
    if as_json:
        print_json({"log": str(into), "added": len(new), "skipped": skipped})
    else:
        say(f"{_count(len(new), 'record')} came into {into}")


def _export_csv(opened: list[TuningLog], output: Path | None, *, to_stdout: bool) -> dict[str, Any]:
    from topiarist.tuning_logs.table import write_csv

    text = io.StringIO()
    count = write_csv(read_all(opened), text)
    if output is not None:
        write_file(output, text.getvalue().encode())
    elif to_stdout:
        sys.stdout.write(text.getvalue())
    return _exported(output, count, 0)


def _export_database(opened: list[TuningLog], output: Path, mcpu: str | None) -> dict[str, Any]:
    from topiarist.tuning_logs.metaschedule import database_files, mcpu_of

    records = [r for r in read_all(opened) if mcpu is None or mcpu_of(r) == mcpu]
    files, others = database_files(records)
    if output.exists():
        raise OutputError(f"{output} exists already; name a new folder")
    try:
        output.mkdir()
    except OSError as error:
        raise OutputError(f"can't write {output}: {error.strerror}") from error
    for name, text in files.items():
        write_file(output / name, text.encode())
    return _exported(output, len(records) - others, others)


def _exported(output: Path | None, records: int, left_out: int) -> dict[str, Any]:
    return {
        "output": None if output is None else str(output),
        "records": records,
        "left_out": left_out,
    }


def _open(paths: list[Path] | None) -> list[TuningLog]:
    """The named logs, or the user's and the package's."""
    return [TuningLog(path) for path in (_files(paths) if paths else _default_files())]


def _default_files() -> list[Path]:
    folders = (user_folder(), *sorted(p for p in SHIPPED.iterdir() if p.is_dir()))
    return [path for folder in folders for path in logs_in(folder)]


def _files(paths: list[Path]) -> list[Path]:
    """The logs of these names, each folder as the logs in it; all have to be there."""
    found = []
    for path in paths:
        files = logs_in(path) if is_folder(path) else [path]
        if not files or not all(file.exists() for file in files):
            raise MissingRecordsError(f"there is no tuning log {path}")
        found += files
    return found


def _is_meant(record: TuningRecord, key: str) -> bool:
    return record.input.workload_key.startswith(key) or record.id.startswith(key)


def _current(target: str | None) -> Current:
    from topiarist.schedules.kernels import CONV_KERNELS
    from topiarist.tuning_logs.check import Current

    kernels = {kernel.name: kernel.version for kernel in CONV_KERNELS}
    prefix = ""
    if target is not None:
        spec = registry.get(target)
        prefix = f"{spec.family}/{spec.isa}/{spec.lanes}/"
    return Current(versions()["apache-tvm"], kernels, prefix)


def _contest_row(contest: Contest) -> list[object]:
    c = contest
    best = None if c.run_us is None else f"{c.run_us:.1f}"
    return [
        *(c.workload_key, c.workload, c.density, c.pattern, c.target, c.measured),
        *(c.candidates, c.failed, best, c.kernel, c.newest),
    ]


def _record_row(record: TuningRecord) -> list[object]:
    what = record.input
    ok = record.status == "ok"
    knobs = " ".join(f"{name}={_brief(value)}" for name, value in what.config.items())
    return [
        record.id,
        f"{record.run_us:.1f}" if ok else None,
        f"{max(record.seconds) * 1e6:.1f}" if ok else None,
        *(what.kernel, what.kernel_version, knobs, " | ".join(what.layouts), what.target_key),
        *(what.versions["apache-tvm"], record.measured),
        record.status if ok else f"{record.status}: {record.message}",
        None if record.drift is None else f"{record.drift:.2f}",
        record.timestamp,
    ]


def _brief(value: object) -> str:
    return "..." if isinstance(value, list | dict) else str(value)


def _checked_json(log: CheckedLog, moved: int) -> dict[str, Any]:
    broken = [{"line": d.line, "problem": d.problem, "newer": d.newer} for d in log.broken]
    return {
        "log": str(log.path),
        "records": log.records,
        "broken": broken,
        "notes": list(log.notes),
        "moved": moved,
    }


def _say_checked(log: CheckedLog, moved: int) -> None:
    state = f"{_count(len(log.broken), 'broken line')}" if log.broken else "sound"
    say(f"{log.path}: {_count(log.records, 'record')}, {state}")
    if moved:
        say(f"  {_count(moved, 'broken line')} moved to {log.path}.broken")
    for defect in log.broken:
        say(f"  line {defect.line}: {defect.problem}")
    for note in log.notes:
        say(f"  {note}")
    if any(not defect.newer for defect in log.broken):
        say("  `topiarist log check --repair` moves the broken lines aside")


def _name_defects(opened: list[TuningLog]) -> None:
    for log in opened:
        for defect in log.defects:
            complain(f"skipped {defect}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
