"""MetaSchedule's JSON databases as records of ours, and back.

A database is a folder with two files. Each line of `database_workload.json` is [hash, module],
each of `database_tuning_record.json` [line of the workload, [trace, seconds, target, arguments]].
TVM loses the whole database over one broken line and crashes on an empty one; its lookup ignores
the target. Here every line is checked by itself, a record is of one target, and what is written
has records of one target and only whole ones. A record keeps module and trace unchanged, so it can
be given back to TVM; kernels of ours have no trace, so their records can't.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topiarist.errors import MissingRecordsError, TuningLogError
from topiarist.targets.spec import TargetSpec
from topiarist.tuning_logs.lines import LINE_LIMIT, Defect
from topiarist.tuning_logs.record import (
    PACKAGES,
    TEXT_LIMIT,
    MeasureInput,
    TargetKey,
    TuningRecord,
    encode,
)

KERNEL = "metaschedule"
WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"
NO_TIME = 1e10  # seconds, by which MetaSchedule marks a candidate that failed
UNDATED = "1970-01-01T00:00:00Z"  # a database has no times of day: older than anything


@dataclass(frozen=True)
class Expected:
    """Which records of a database are wanted: those of one TVM target, measured on a device.

    `mcpu` is LLVM's name of the processor, which has to be the same; `kind` is TVM's.
    """

    target: TargetSpec
    kind: str
    mcpu: str
    threads: int | None = None  # None: as many as the database says, else one

    @staticmethod
    def of(target: TargetSpec, mcpu: str | None = None, threads: int | None = None) -> Expected:
        """What a target compiles for, unless another processor is named."""
        tvm = target.tvm_target
        return Expected(target, str(tvm["kind"]), mcpu or str(tvm.get("mcpu", "")), threads)


@dataclass(frozen=True)
class _Workload:
    hash: str
    module: bytes  # JSON, with its length before it
    tvm: str


@dataclass(frozen=True)
class Database:
    """What a database holds: records, lines that can't be read, and lines of other targets."""

    records: tuple[TuningRecord, ...]
    broken: tuple[Defect, ...]
    foreign: tuple[Defect, ...]


class _ForeignError(ValueError):
    """A record is sound, and of another target."""


def read_database(folder: Path, expected: Expected) -> Database:
    """Read a database line by line. Raises MissingRecordsError where there is none."""
    workloads: dict[int, _Workload] = {}
    broken: list[Defect] = []
    foreign: list[Defect] = []
    for number, text in _lines(folder / WORKLOADS):
        try:
            workloads[number - 1] = _workload(_json_list(text, 2))
        except ValueError as error:
            broken.append(Defect(folder / WORKLOADS, number, str(error)))
    records = []
    for number, text in _lines(folder / RECORDS):
        try:
            index, content = _json_list(text, 2)
            if type(index) is not int or index not in workloads:
                raise ValueError(f"there is no workload {index!r:.20}")
            records.append(_record(workloads[index], content, expected))
        except _ForeignError as error:
            foreign.append(Defect(folder / RECORDS, number, str(error)))
        except ValueError as error:
            broken.append(Defect(folder / RECORDS, number, str(error)))
    return Database(tuple(records), tuple(broken), tuple(foreign))


def database_files(records: Iterable[TuningRecord]) -> tuple[dict[str, str], int]:
    """The files of a database by name, and how many records were left out, being no schedules.

    Raises MissingRecordsError for no records and TuningLogError for records of several targets.
    """
    chosen: list[tuple[str, list[Any]]] = []
    targets: dict[str, Any] = {}
    others = 0
    for record in records:
        if record.input.kernel != KERNEL:
            others += 1
            continue
        workload, content = _to_lines(record)
        chosen.append((workload, content))
        targets[encode(content[2])] = None
    if not chosen:
        raise MissingRecordsError(
            f"no record came from MetaSchedule, and the {others} of kernels of Topiarist have no "
            "schedule that TVM could apply"
        )
    if len(targets) > 1:
        raise TuningLogError(
            f"records of {len(targets)} targets can't share a database, since TVM's lookup ignores "
            f"the target; choose one with --mcpu: {'; '.join(sorted(targets))}"
        )
    modules = {workload: i for i, workload in enumerate(dict.fromkeys(w for w, _ in chosen))}
    lines = [json.dumps([modules[workload], content]) for workload, content in chosen]
    return {WORKLOADS: _text(modules), RECORDS: _text(lines)}, others


def mcpu_of(record: TuningRecord) -> str | None:
    """LLVM's name of the processor that a record of MetaSchedule's is for."""
    target = record.input.config.get("target")
    return target.get("mcpu") if isinstance(target, dict) else None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file by number, from 1."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingRecordsError(f"there is no MetaSchedule database: {path}") from error
    except OSError as error:
        raise TuningLogError(f"can't read {path}: {error.strerror}") from error
    return enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1)


def _json_list(text: bytes, length: int) -> list[Any]:
    if not text.strip():
        raise ValueError("the line is empty")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("the line is no JSON") from error
    return _list(values, length, "the line")


def _list(value: Any, length: int | None, name: str) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise ValueError(f"{name} is no list" + (f" of {length}" if length else ""))
    return value


def _workload(values: Sequence[Any]) -> _Workload:
    hashed, text = values
    if not (isinstance(hashed, str) and hashed.lstrip("-").isdigit() and isinstance(text, str)):
        raise ValueError("the line is not a hash and a module")
    try:
        module = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("the module is no base64") from error
    return _Workload(hashed, module, _tvm_version(module))


def _tvm_version(module: bytes) -> str:
    """The version of TVM that wrote a module, which has to be whole."""
    if int.from_bytes(module[:8], "little") != len(module) - 8:
        raise ValueError("the module is cut off")
    try:
        graph = json.loads(module[8:])
        nodes, root = graph["nodes"], graph["root_index"]
        if type(root) is int and 0 <= root < len(_list(nodes, None, "nodes")):
            return str(graph["metadata"]["tvm_version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError("the module is not what TVM writes") from error
    raise ValueError("the module has no root")


def _record(workload: _Workload, content: Any, expected: Expected) -> TuningRecord:
    trace, seconds, target, arguments = _list(content, 4, "the record")
    _check_trace(trace)
    _check_target(target, expected)
    cores = target.get("num-cores")
    threads = expected.threads or (cores if type(cores) is int and cores > 0 else 1)
    what = MeasureInput(
        workload={
            "kind": KERNEL,
            "structural_hash": workload.hash,
            "arguments": arguments,
            "module": _packed(workload.module),
        },
        kernel=KERNEL,
        kernel_version=1,
        config={"target": target, "trace": _packed(json.dumps(trace).encode())},
        input_layout="plain",
        output_layout="plain",
        residual_layout="none",
        target=TargetKey.of(expected.target, threads),
        versions=dict.fromkeys(PACKAGES, "none") | {"apache-tvm": workload.tvm},
    )
    record = _timed(what, _list(seconds, None, "the list of seconds"))
    if len(record.to_line()) >= LINE_LIMIT - 1:
        raise ValueError("module and trace are too long for a record")
    return record


def _timed(what: MeasureInput, seconds: list[Any]) -> TuningRecord:
    if NO_TIME in seconds:
        message = "MetaSchedule gives no time: it did not build, crashed or took too long"
        return TuningRecord(what, status="crash", message=message, timestamp=UNDATED)
    return TuningRecord(what, tuple(seconds), timestamp=UNDATED)


def _check_trace(trace: Any) -> None:
    """Raise ValueError for what TVM would refuse, and its whole database with it."""
    instructions, decisions = _list(trace, 2, "the trace")
    for instruction in _list(instructions, None, "the list of instructions"):
        name, *parts = _list(instruction, 4, "an instruction")
        if not isinstance(name, str) or not all(isinstance(part, list) for part in parts):
            raise ValueError("an instruction is no name with three lists")
    for decision in _list(decisions, None, "the list of decisions"):
        at, _ = _list(decision, 2, "a decision")
        if type(at) is not int or not 0 <= at < len(instructions):
            raise ValueError("a decision is of no instruction")


def _check_target(target: Any, expected: Expected) -> None:
    if not isinstance(target, dict):
        raise ValueError("the target is no JSON object")
    if target.get("kind") != expected.kind:
        raise _ForeignError(f"for {target.get('kind')!r:.40}, not {expected.kind!r}")
    mcpu = target.get("mcpu", "")
    if mcpu != expected.mcpu:
        raise _ForeignError(f"for the processor {mcpu!r:.40}, not {expected.mcpu!r} (see --mcpu)")
    triple = expected.target.tvm_target.get("mtriple")
    if target.get("mtriple") not in (None, triple):
        raise _ForeignError(f"for {target['mtriple']!r:.40}, not this target's system")


def _to_lines(record: TuningRecord) -> tuple[str, list[Any]]:
    """The workload's line, and the content of the record's. Raises TuningLogError."""
    what = record.input
    try:
        workload, config = what.workload, what.config
        text = base64.b64encode(_unpacked(workload["module"])).decode()
        line = [workload["structural_hash"], text]
        _workload(line)
        trace = json.loads(_unpacked(config["trace"]))
        _check_trace(trace)
        seconds = list(record.seconds) if record.status == "ok" else [NO_TIME]
        return json.dumps(line), [trace, seconds, config["target"], workload["arguments"]]
    except (KeyError, TypeError, ValueError, RecursionError, zlib.error) as error:
        raise TuningLogError(f"record {record.id} is no record of MetaSchedule: {error}") from error


def _packed(data: bytes) -> list[str]:
    """Data compressed, as texts that a record can hold."""
    text = base64.b64encode(zlib.compress(data, 9)).decode()
    return [text[at : at + TEXT_LIMIT] for at in range(0, len(text), TEXT_LIMIT)]


def _unpacked(texts: Iterable[str]) -> bytes:
    return zlib.decompress(base64.b64decode("".join(texts), validate=True))


def _text(lines: Iterable[str] | Mapping[str, int]) -> str:
    return "".join(f"{line}\n" for line in lines)
